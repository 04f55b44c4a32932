"""Device code of the router: scores of a tile of logits, their derivatives, keys that sort, groups of experts."""

from __future__ import annotations

from ...hardware import tl, triton

GONE = tl.constexpr(-2139095041)  # the key of -inf: never a candidate
TAKEN = tl.constexpr(-2147483648)  # no longer one
NAN_KEY = tl.constexpr(-2139095040)  # NaN's: that of the lowest finite number
NONE = tl.constexpr(0xFFFFFFFF)  # a choice that found no lane
NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def log1p(u):
    """`ln(1 + u)` to the last bit also where 1 + u rounds to 1 (Kahan)."""
    w = 1 + u
    return tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))


@triton.jit
def tanh(x):
    """A series below 0.3, where `1 - exp(-2|x|)` would cancel."""
    s = x * x
    series = x * (1 - s * (1.0 / 3 - s * (2.0 / 15 - s * (17.0 / 315 - s * (62.0 / 2835)))))
    t = tl.exp(-2 * tl.abs(x))
    far = (1 - t) / (1 + t)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -far, far))


@triton.jit
def transform_logits(x, MULTIPLIER: tl.constexpr, CAP: tl.constexpr):
    z = x
    if MULTIPLIER != 1.0:
        z = z * MULTIPLIER
    if CAP > 0:
        z = tl.where(x == NEG_INF, x, CAP * tanh(z / CAP))
    return z


@triton.jit
def elementwise(z, SCORE: tl.constexpr):
    if SCORE == 1:
        return 1 / (1 + tl.exp(-z))
    rest = log1p(tl.exp(-tl.abs(z)))
    if SCORE == 2:
        return tl.sqrt(tl.maximum(z, 0.0) + rest)
    return tl.minimum(z, 0.0) - rest


@triton.jit
def derivative(z, s, SCORE: tl.constexpr):
    """Of the elementwise score s at z."""
    if SCORE == 1:
        return s * (1 - s)
    up = 1 / (1 + tl.exp(-z))
    if SCORE == 2:
        return tl.where(s > 0, up / (2 * tl.where(s > 0, s, 1.0)), 0.0)
    return 1 / (1 + tl.exp(z))


@triton.jit
def exp_rows(z):
    """`(exp(z - top), top, sum)` of each row; top is 0 and the sum 1 where a row is nothing but -inf."""
    top = tl.max(z, 1)
    top = tl.where(top == NEG_INF, 0.0, top)
    e = tl.exp(z - top[:, None])
    total = tl.sum(e, 1)
    return e, top, tl.where(total == 0, 1.0, total)


@triton.jit
def expert_of(lane, E: tl.constexpr, SIZE: tl.constexpr, GROUP_LANES: tl.constexpr):
    """`(expert, is there one)` of each lane; groups of SIZE experts have GROUP_LANES lanes."""
    expert = lane // GROUP_LANES * SIZE + lane % GROUP_LANES
    return expert, (lane % GROUP_LANES < SIZE) & (expert < E)


@triton.jit
def _load_piece(
    ptr, stride_t, token, alive_t, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr,
    GROUP_LANES: tl.constexpr,
):  # fmt: skip
    expert, is_lane = expert_of(FIRST + tl.arange(0, WIDTH), E, SIZE, GROUP_LANES)
    ptrs = ptr + token.to(tl.int64)[:, None] * stride_t + expert[None, :]
    return tl.load(ptrs, mask=alive_t[:, None] & is_lane[None, :], other=NEG_INF).to(tl.float32)


@triton.jit
def _load_two(
    ptr, stride_t, token, alive_t, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr,
    GROUP_LANES: tl.constexpr,
):  # fmt: skip
    low = _load_piece(ptr, stride_t, token, alive_t, FIRST, WIDTH, E, SIZE, GROUP_LANES)
    return tl.join(low, _load_piece(ptr, stride_t, token, alive_t, FIRST + WIDTH, WIDTH, E, SIZE, GROUP_LANES))


@triton.jit
def _load_four(
    ptr, stride_t, token, alive_t, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr,
    GROUP_LANES: tl.constexpr,
):  # fmt: skip
    low = _load_two(ptr, stride_t, token, alive_t, FIRST, WIDTH, E, SIZE, GROUP_LANES)
    return tl.join(low, _load_two(ptr, stride_t, token, alive_t, FIRST + 2 * WIDTH, WIDTH, E, SIZE, GROUP_LANES))


@triton.jit
def load_rows(
    ptr, stride_t, token, alive_t, BT: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, GROUP_LANES: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """`(BT, LANES)` fp32 rows, -inf outside, with `PIECE / 4` threads a row; at most eight pieces.

    Reducing rows is the work here, and the fewer threads share a row, the less they have to exchange. Of a plain load
    Triton would give a thread 16 bytes; joined pieces stay in the registers of the threads that loaded them.
    """
    PIECES: tl.constexpr = LANES // PIECE
    if PIECES == 1:
        x = _load_piece(ptr, stride_t, token, alive_t, 0, PIECE, E, SIZE, GROUP_LANES)
    elif PIECES == 2:
        x = tl.permute(_load_two(ptr, stride_t, token, alive_t, 0, PIECE, E, SIZE, GROUP_LANES), (0, 2, 1))
    elif PIECES == 4:
        x = tl.permute(_load_four(ptr, stride_t, token, alive_t, 0, PIECE, E, SIZE, GROUP_LANES), (0, 3, 2, 1))
    else:
        low = _load_four(ptr, stride_t, token, alive_t, 0, PIECE, E, SIZE, GROUP_LANES)
        high = _load_four(ptr, stride_t, token, alive_t, 4 * PIECE, PIECE, E, SIZE, GROUP_LANES)
        x = tl.permute(tl.join(low, high), (0, 4, 3, 2, 1))
    return tl.reshape(x, (BT, LANES))


@triton.jit
def ranked(x):
    """x with NaN as the lowest finite number: after every other, before -inf."""
    return tl.where(x != x, LOWEST, x)


@triton.jit
def key_of(x):
    """A number's place in order, with one zero."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The number of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def choose(
    key, want, p, BT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, RAGGED: tl.constexpr,
    THRESHOLD: tl.constexpr,
):  # fmt: skip
    """`(lanes, keys, number, taken)`: the `want` highest keys of each row, the lower lane first where keys are equal.

    Exact with one word a lane: its distance from the row's highest key, in units in the last place, before its lane.
    What is further away than a word can say (128 lanes: a sixteenth of the highest) waits for the next window, which
    starts at the highest key left; hardly any batch needs one. Words differ, so that a sweep is one minimum: of the
    distances above the last choice, which wrap around for those taken before.
    """
    WINDOW: tl.constexpr = 4294967296 // LANES - 1
    lanes = tl.arange(0, LANES)[None, :].to(tl.uint32)
    column = tl.arange(0, WIDTH)[None, :]
    ids = tl.full((BT, WIDTH), -1, tl.int32)
    keys = tl.full((BT, WIDTH), GONE, tl.int32)
    number = tl.zeros((BT,), tl.int32)
    mass = tl.zeros((BT,), tl.float32)
    base = tl.max(key, 1)
    more = tl.full((), 1, tl.int32)
    while more > 0:
        # GONE is WINDOW below the lowest base, so that it is in no window
        base = tl.maximum(base, GONE + WINDOW)
        distance = (base[:, None] - key).to(tl.uint32, bitcast=True)
        window = tl.where(number < want, WINDOW, 0).to(tl.uint32)[:, None]
        word = tl.where(distance < window, distance * LANES + lanes, NONE)
        next = tl.zeros((BT,), tl.uint32)
        chosen = tl.full((BT, WIDTH), NONE, tl.uint32)
        for _ in tl.range(0, K):
            best = tl.where(number < want, tl.min(word - next[:, None], 1) + next, NONE)
            found = best != NONE
            chosen = tl.where(column == number[:, None], best[:, None], chosen)
            number += found.to(tl.int32)
            next = tl.where(found, best + 1, next)
            if RAGGED == 1:  # until the choices' probabilities reach the threshold
                mass += tl.sum(tl.where((word == best[:, None]) & found[:, None], p, 0.0), 1)
                want = tl.where(mass < THRESHOLD, want, number)
        key = tl.where(word < next[:, None], TAKEN, key)
        new = chosen != NONE
        ids = tl.where(new, (chosen % LANES).to(tl.int32), ids)
        keys = tl.where(new, base[:, None] - (chosen // LANES).to(tl.int32), keys)
        more = (tl.min(number - want, 0) < 0).to(tl.int32)
        if more > 0:
            base = tl.max(key, 1)
            more = tl.max(((number < want) & (base > GONE)).to(tl.int32), 0)
    return ids, keys, number, key == TAKEN


@triton.jit
def _two_best(a1, a2, b1, b2):
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@triton.jit
def keep_groups(
    choice, BT: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr,
    TOP2: tl.constexpr, MASK_VALUE: tl.constexpr,
):  # fmt: skip
    """The choice values with all but the KEPT best groups masked; groups are scored by their best or two best."""
    G: tl.constexpr = LANES // SIZE
    grouped = tl.reshape(choice, (BT, G, SIZE))
    if TOP2:
        best, second = tl.reduce((grouped, tl.full((BT, G, SIZE), NEG_INF, tl.float32)), 2, _two_best)
        best += second
    else:
        best = tl.max(grouped, 2)
    group = tl.arange(0, G)
    # a group of which nothing is left still ranks before the lanes that stand for no group
    key = tl.where((group < GROUPS)[None, :], key_of(tl.maximum(best, LOWEST)), GONE)
    want = tl.full((BT,), KEPT, tl.int32)
    _, _, _, keep = choose(key, want, key, BT, G, G, KEPT, 0, 0.0)
    masked = tl.where(keep[:, :, None] | (grouped == NEG_INF), grouped, MASK_VALUE)
    return tl.reshape(masked, (BT, LANES))
