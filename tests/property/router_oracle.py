"""What `route` must give, in plain Python floats: one token at a time, written from the words of `RouterConfig`.

It shares no line with the library. `Asked` holds the arguments of one call as lists; `route` gives an `Answer`, whose
`margin` is the smallest gap that a decision of the call hangs on, so that a test can set ambiguous draws apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from moesaic import RouterConfig

INF = math.inf
Row = list[float]


@dataclass
class Asked:
    """One call. `draws` are the noise's normal or uniform numbers, `anchor` the soft weights that straight-through
    gradients are measured from."""

    logits: list[Row]
    config: RouterConfig
    columns: int
    bias: Row | None = None
    expert_scale: Row | None = None
    ids: list[list[int]] | None = None
    token_mask: list[bool] | None = None
    expert_mask: list[list[bool]] | None = None
    noise_logits: list[Row] | None = None
    draws: list[Row] | None = None
    training: bool = False
    sequences: int = 1
    anchor: list[Row] | None = None


@dataclass
class Answer:
    weights: list[Row] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    raw: list[list[int]] = field(default_factory=list)
    soft: list[Row] = field(default_factory=list)
    queue: list[Row] = field(default_factory=list)
    shared: list[Row] = field(default_factory=list)
    identity: Row = field(default_factory=list)
    constant: list[Row] = field(default_factory=list)
    probability_sums: list[Row] = field(default_factory=list)
    logsumexp_squares: Row = field(default_factory=list)
    choices: list[list[int]] = field(default_factory=list)
    capacity: int | None = None
    margin: float = INF

    def tables(self, num_experts: int) -> dict[str, list]:
        """The index tables of `ids`: slots sorted by expert, in the order of tokens within one."""
        slots = [e for row in self.ids for e in row]
        groups = [[slot for slot, e in enumerate(slots) if e == expert] for expert in range(num_experts)]
        order = [slot for group in groups for slot in group]
        index = [order.index(slot) if e >= 0 else -1 for slot, e in enumerate(slots)]
        ends = [sum(len(g) for g in groups[:e]) for e in range(num_experts + 1)]
        return dict(
            tokens_per_expert=[len(g) for g in groups], expert_offsets=ends, row_index=index,
            row_order=order + [slot for slot, e in enumerate(slots) if e < 0],
        )  # fmt: skip


# ---------------------------------------------------------------- scores
def transform(x: float, c: RouterConfig) -> float:
    if x == -INF:
        return x
    z = c.multiplier * x
    return c.soft_cap * math.tanh(z / c.soft_cap) if c.soft_cap else z


def softmax(values: Row) -> Row:
    top = max(values, default=-INF)
    if top == -INF:
        return [0.0] * len(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def elementwise(z: float, score: str) -> float:
    if z == -INF:
        return -INF if score == "log_sigmoid" else 0.0
    sigmoid = 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))
    if score == "sigmoid":
        return sigmoid
    if score == "log_sigmoid":
        return math.log(sigmoid)
    return math.sqrt(math.log1p(math.exp(z)))


def scores_of(z: Row, score: str) -> Row:
    return softmax(z) if score == "softmax" else [elementwise(v, score) for v in z]


def probabilities(z: Row, score: str) -> Row:
    """The distribution behind top-p and the losses: softmax, or positive scores as shares of their sum."""
    if score in ("softmax", "log_sigmoid"):
        return softmax(z)
    s = scores_of(z, score)
    return [v / sum(s) for v in s] if sum(s) > 0 else s


def logsumexp(z: Row) -> float:
    top = max(z, default=-INF)
    return 0.0 if top == -INF else top + math.log(sum(math.exp(v - top) for v in z))


# ---------------------------------------------------------------- choice
class Chooser:
    def __init__(self, asked: Asked):
        self.c, self.margin, self.bias = asked.config, INF, asked.bias

    def split(self, a: float, b: float) -> None:
        """A decision hangs on a against b; equal values are decided by their index and count as clear."""
        if a != b and math.isfinite(a) and math.isfinite(b):
            self.margin = min(self.margin, abs(a - b))

    def ranked(self, values: Row) -> list[int]:
        """Falling; ties to the lowest index."""
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        for a, b in pairwise(order):
            self.split(values[a], values[b])
        return order

    def values(self, z: Row) -> Row:
        c = self.c
        on_logits = c.order == "post" or c.bias_on == "logits"
        base = z if on_logits else scores_of(z, c.score)
        bias = self.bias or [0.0] * len(z)
        return [-INF if v == -INF else s + b for v, s, b in zip(z, base, bias, strict=True)]

    def grouped(self, values: Row) -> Row:
        c, size = self.c, len(values) // self.c.num_groups
        if c.num_groups == 1:
            return values
        groups = [sorted(values[g * size : (g + 1) * size])[::-1] for g in range(c.num_groups)]
        best = [g[0] if c.group_score == "max" else g[0] + g[1] for g in groups]
        kept = self.ranked(best)[: c.topk_groups]
        return [v if e // size in kept or v == -INF else c.group_mask_value for e, v in enumerate(values)]

    def topk(self, z: Row) -> list[int]:
        values = self.grouped(self.values(z))
        return [e if values[e] > -INF else -1 for e in self.ranked(values)[: self.c.top_k]]

    def token(self, z: Row) -> list[int]:
        """top-k, top-p or entropy, for one token."""
        c, ids = self.c, self.topk(z)
        if c.policy == "top_p":
            p, held, out = probabilities(z, c.score), 0.0, []
            for e in ids:
                self.split(held, c.threshold)
                out.append(e if held < c.threshold else -1)
                held += p[e] if e >= 0 else 0.0
            return out
        if c.policy == "entropy":
            entropy = -sum(p * math.log(p) for p in softmax(z) if p > 0)
            self.split(entropy, c.threshold)
            self.split(entropy, 2 * c.threshold)
            most = 1 if entropy < c.threshold else 2 if entropy < 2 * c.threshold else c.top_k
            return [e if k < most else -1 for k, e in enumerate(ids)]
        return ids

    def expert_choice(self, z: list[Row], num_experts: int) -> list[list[int]]:
        c, T, columns = self.c, len(z), num_experts + self.c.extra_experts
        room = limit(T, columns, c.top_k if c.capacity_counts_k else 1, c.capacity_factor or 1.0, c.min_capacity)
        values = [self.values(row) for row in z]
        taken = [set() for _ in z]
        for e in range(columns):
            order = self.ranked([row[e] for row in values])
            for t in [t for t in order if values[t][e] > -INF][:room]:
                taken[t].add(e)
        width = min(c.max_choices or columns, columns)
        out = []
        for t in range(T):
            mine = [e for e in self.ranked(values[t]) if e in taken[t]][:width]
            out.append(mine + [-1] * (width - len(mine)))
        return out

    def sinkhorn(self, z: list[Row]) -> list[list[int]]:
        """Rows and columns divided by their sums in turn, until it no longer matters."""
        m = [[math.exp(v) for v in row] for row in z]
        for _ in range(300):
            for e in range(len(m[0]) if m else 0):
                column = sum(row[e] for row in m)
                for row in m:
                    row[e] = row[e] / column if column else 0.0
            m = [[v / sum(row) if sum(row) else 0.0 for v in row] for row in m]
        best = [self.ranked(row)[: self.c.top_k] for row in m]
        return [[e if z[t][e] > -INF else -1 for e in best[t]] for t in range(len(m))]


def sparsemixer(z: Row, c: RouterConfig, given: list[int] | None, chooser: Chooser):
    """`(ids, weights)` in evaluation: the best expert again and again, weighed among those within twice the jitter."""
    rest, ids, weights = list(z), [], []
    for k in range(c.top_k):
        best = max(rest)
        e = chooser.ranked(rest)[0] if given is None else given[k]
        if best == -INF or e < 0:
            ids.append(-1)
            weights.append(0.0)
            continue
        near = []
        for v, r in zip(z, rest, strict=True):
            away = (best - v) / max(abs(v), best) if r > -INF else INF
            chooser.split(away, 2 * c.noise_std)
            near.append(-INF if away > 2 * c.noise_std else r)
        ids.append(e)
        weights.append(softmax(near)[e])
        rest[e] = -INF
    return ids, weights


# ---------------------------------------------------------------- weights and capacity
def weigh(z: Row, ids: list[int], shared: Row, c: RouterConfig) -> tuple[Row, Row]:
    """`(weights, shared weights)` before scale and division."""
    live = [e for e in ids if e >= 0]
    tail = scores_of([transform(v, c) for v in shared], c.score) if shared else []
    if c.order == "post":
        w = scores_of([z[e] for e in live], c.score)
    else:
        s = scores_of(z, c.score)
        w = [s[e] for e in live]
    if c.order == "pre_renorm" and c.norm == "softmax":
        w = softmax(w + tail)
        w, tail = w[: len(live)], w[len(live) :]
    elif c.order == "pre_renorm":
        norm = sum(abs(v) ** c.norm_p for v in w + tail) ** (1 / c.norm_p)
        norm = max(norm, c.norm_min) + c.norm_eps
        w, tail = ([v / norm if norm else v for v in part] for part in (w, tail))
    rest = iter(w)
    return [next(rest) if e >= 0 else 0.0 for e in ids], tail


def limit(T: int, experts: int, choices: int, factor: float, least: int) -> int:
    return min(max(math.ceil(round(T * choices / experts * factor, 9)), least), T)


def drop(answer: Answer, c: RouterConfig, num_experts: int) -> None:
    T, K = len(answer.ids), len(answer.ids[0]) if answer.ids else 0
    slots = [(t, k) for t in range(T) for k in range(K)]
    if c.drop_policy == "choice":
        slots = [(t, k) for k in range(K) for t in range(T)]
    elif c.drop_policy == "probability":
        slots.sort(key=lambda s: -answer.queue[s[0]][s[1]])
        queue = sorted(answer.queue[t][k] for t, k in slots if answer.ids[t][k] >= 0)
        gaps = [b - a for a, b in pairwise(queue)]
        if not c.straight_through:
            answer.margin = min([answer.margin, *gaps])
    before = [sum(w for w, e in zip(*row, strict=True) if e >= 0)
              for row in zip(answer.weights, answer.ids, strict=True)]  # fmt: skip
    room = [answer.capacity] * num_experts
    for t, k in slots:
        e = answer.ids[t][k]
        if e >= 0 and room[e]:
            room[e] -= 1
        else:
            answer.ids[t][k], answer.weights[t][k] = -1, 0.0
    if c.renorm_after_drop:
        for t, row in enumerate(answer.weights):
            left = sum(row)
            answer.weights[t] = [w * before[t] / left if left else 0.0 for w in row]


# ---------------------------------------------------------------- all of it
def noisy(asked: Asked, t: int, row: Row) -> Row:
    c = asked.config
    out = []
    for e, x in enumerate(row):
        n = asked.draws[t][e] if asked.draws else 0.0
        if c.noise == "gaussian":
            x += c.noise_std * n
        elif c.noise == "jitter":
            x *= 1 - c.noise_std + 2 * c.noise_std * n
        elif c.noise == "noisy_topk":
            x += n * (math.log1p(math.exp(asked.noise_logits[t][e])) + 1e-2)
        elif c.noise == "gumbel":
            x -= math.log(-math.log(n))
        out.append(x / c.temperature)
    return out


def route(asked: Asked) -> Answer:
    c, answer, chooser = asked.config, Answer(), Chooser(asked)
    T = len(asked.logits)
    columns = asked.columns - c.shared_logits
    E = columns - c.extra_experts
    clean, wild, shared = [], [], []
    for t, row in enumerate(asked.logits):
        seen = asked.token_mask is None or asked.token_mask[t]
        open_ = asked.expert_mask[t] if asked.expert_mask else [True] * columns
        x = [v if seen and o else -INF for v, o in zip(row[:columns], open_, strict=True)]
        y = noisy(asked, t, x) if asked.training else x
        wild.append([transform(v, c) for v in y])
        clean.append([transform(v, c) for v in (y if asked.training and c.noise_in_weights else x)])
        shared.append(row[columns:])

    # choose
    own = None
    if asked.ids is not None:
        raw = [[e if e >= 0 and clean[t][e] > -INF else -1 for e in row] for t, row in enumerate(asked.ids)]
    elif c.policy == "expert_choice":
        raw = chooser.expert_choice(wild, E)
    elif c.policy == "sinkhorn" and asked.training:
        raw = chooser.sinkhorn(wild)
    else:
        raw = [chooser.token(z) for z in wild]
    if c.policy == "sparsemixer":
        pairs = [sparsemixer(clean[t], c, raw[t] if asked.ids else None, chooser) for t in range(T)]
        raw, own = [p[0] for p in pairs], [p[1] for p in pairs]
    answer.raw, answer.margin = raw, chooser.margin

    # weigh
    factor = c.scale / (c.top_k if c.divide_by_k else 1)
    for t in range(T):
        w, tail = weigh(clean[t], raw[t], shared[t], c)
        w = w if own is None else own[t]
        scale = asked.expert_scale or [1.0]
        scale = [factor * v for v in (scale if len(scale) > 1 else scale * columns)]
        answer.soft.append(w)
        if c.straight_through:
            hard = [1.0 if e >= 0 else 0.0 for e in raw[t]]
            anchor = w if asked.anchor is None else asked.anchor[t]
            w = [h + v - a for h, v, a in zip(hard, w, anchor, strict=True)]
        else:
            hard = w
        w, hard = ([v * scale[e] if e >= 0 else 0.0 for v, e in zip(part, raw[t], strict=True)] for part in (w, hard))
        answer.queue.append(hard)
        first, last = E + c.zero_experts, E + c.zero_experts + c.identity_experts
        answer.identity.append(sum(v for v, e in zip(w, raw[t], strict=True) if first <= e < last))
        answer.constant.append(
            [sum(v for v, e in zip(w, raw[t], strict=True) if e == last + n) for n in range(c.constant_experts)]
        )
        one = asked.expert_scale[0] if asked.expert_scale and len(asked.expert_scale) == 1 else 1.0
        answer.shared.append([v * factor * one for v in tail])
        answer.ids.append([e if e < E else -1 for e in raw[t]])
        answer.weights.append([v if 0 <= e < E else 0.0 for v, e in zip(w, raw[t], strict=True)])

    # drop
    factor = c.capacity_factor
    if not asked.training and c.eval_capacity_factor is not None:
        factor = c.eval_capacity_factor
    if factor is not None and c.policy != "expert_choice":
        answer.capacity = limit(T, E, c.top_k if c.capacity_counts_k else 1, factor, c.min_capacity)
        drop(answer, c, E)

    # sum
    for s in range(asked.sequences):
        mine = range(s * T // asked.sequences, (s + 1) * T // asked.sequences)
        p = [probabilities(clean[t], c.score) for t in mine]
        answer.probability_sums.append([sum(row[e] for row in p) for e in range(columns)])
        answer.logsumexp_squares.append(sum(logsumexp(clean[t]) ** 2 for t in mine))
        answer.choices.append([sum(row.count(e) for row in (raw[t] for t in mine)) for e in range(columns)])
    return answer
