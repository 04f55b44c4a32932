"""Device code of the router: scores of a tile of logits, their derivatives, keys that sort, groups of experts."""

from __future__ import annotations

from ...hardware import tl, triton

TAKEN = tl.constexpr(-2147483648)  # ranks below every key
NEG_INF = tl.constexpr(float("-inf"))


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
def key_of(x):
    """A float's place in order; NaN before every number but -inf, -inf out of the choice."""
    gone = x == NEG_INF
    x = tl.where(x != x, -3.4028234663852886e38, tl.where(x == 0, 0.0, x))  # the two zeros are one
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(gone, TAKEN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def argmax(key):
    """`(largest, its first index)` of each row."""
    return tl.max(key, 1, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def keep_groups(
    choice, BT: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr,
    TOP2: tl.constexpr, MASK_VALUE: tl.constexpr,
):  # fmt: skip
    """The choice values with all but the KEPT best groups masked; groups are scored by their best or two best."""
    G: tl.constexpr = LANES // SIZE
    lane = tl.arange(0, SIZE)[None, :]
    grouped = tl.reshape(choice, (BT * G, SIZE))
    best, first = tl.max(grouped, 1, return_indices=True, return_indices_tie_break_left=True)
    if TOP2:
        best += tl.max(tl.where(lane == first[:, None], NEG_INF, grouped), 1)
    group = tl.arange(0, G)[None, :]
    # a group of which nothing is left still ranks before the lanes that stand for no group
    score = tl.maximum(tl.reshape(best, (BT, G)), -3.4028234663852886e38)
    key = tl.where(group < GROUPS, key_of(score), TAKEN)
    keep = tl.zeros((BT, G), tl.int1)
    for _ in tl.static_range(KEPT):
        _, chosen = argmax(key)
        hit = group == chosen[:, None]
        keep = keep | hit
        key = tl.where(hit, TAKEN, key)
    keep = tl.reshape(keep, (BT * G, 1))
    masked = tl.where(keep | (grouped == NEG_INF), grouped, MASK_VALUE)
    return tl.reshape(masked, (BT, LANES))
