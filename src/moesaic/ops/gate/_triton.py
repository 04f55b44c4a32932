"""The gate in one launch, for few tokens: product, scores, choice, weights and tables."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...hardware import tl, triton
from ...launch import Bound, Kernel, ceil_div, follow, unit_rows
from ..index._triton import Cut, Tables, empty, lanes_of
from ..route._triton import choosing, cut_tokens
from ..route._triton_route import route_range

GATE_PROGRAMS = 128  # about one for each multiprocessor
_arrived: dict[tuple, Tensor] = {}


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Why the fused kernel cannot take this gate, or None."""
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"needs x and weight in one half precision, got {x.dtype} and {weight.dtype}"
    if weight.shape[0] > 512:
        return f"needs at most 512 experts, got {weight.shape[0]}"
    return None


def _counter(device: torch.device) -> Tensor:
    """A zero for the programs to count on, one a stream: launches of a stream follow each other."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)  # the graph's own
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _arrived:
        _arrived[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _arrived[key]


@functools.lru_cache(maxsize=1024)
def _gate(T: int, E: int, H: int, logit_bias: bool, bias: bool, config) -> tuple[Bound, Cut, tuple[int, int, int]]:
    """Of at most 16 tokens, which make two cuts or three."""
    cut = cut_tokens(T, 1, lanes_of(E, config.num_groups)[1], least=16)  # the least that its product takes
    block_n = 16 if E * H <= 1 << 19 else 32
    tiles = ceil_div(E, block_n)
    split = max(64, ceil_div(ceil_div(H, max(1, GATE_PROGRAMS // tiles)), 64) * 64)
    splits, block_k = ceil_div(H, split), 128 if split % 128 == 0 else 64
    bound = gate_route_kernel.bind(
        H=H, SPLIT=split, SPLITS=splits, TILES=tiles, BLOCK_N=block_n, BLOCK_K=block_k, HAS_LOGIT_BIAS=logit_bias,
        num_warps=cut.num_warps, **choosing(E, bias, False, cut.single, cut.block, cut.piece, config),
    )  # fmt: skip
    return bound, cut, (tiles, splits, 1)


def route_few(x: Tensor, weight: Tensor, logit_bias: Tensor | None, bias: Tensor | None, config):
    """`(logits, weights, ids, tables)` in one launch; at most 16 tokens."""
    x, weight = unit_rows(x), unit_rows(weight)
    (T, H), E, K, f32 = x.shape, weight.shape[0], config.top_k, torch.float32
    strides = (x.stride(0), weight.stride(0))
    bound, cut, grid = _gate(T, E, H, logit_bias is not None, bias is not None, config)
    logits, weights, ids = empty(x, T, E, dtype=f32), empty(x, T, K, dtype=f32), empty(x, T, K)
    made, partial = Tables(ids, T * K, E, cut), empty(x, grid[1], T, E, dtype=f32)
    pointers = (x, weight, logit_bias, partial, _counter(x.device), logits, bias, weights, ids, *made.pointers)
    bound(grid, pointers, strides, (T,))
    return logits, weights, ids, *made.pointers


@Kernel
@triton.jit(do_not_specialize=["T"])
def gate_route_kernel(
    x_ptr, w_ptr, logit_bias_ptr, partial_ptr, arrived_ptr, logits_ptr,
    bias_ptr, weights_ptr, ids_ptr, tokens_ptr, offsets_ptr, order_ptr, index_ptr,
    stride_x, stride_w, T,
    H: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_LOGIT_BIAS: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, K_POW2: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_LANES: tl.constexpr, LANES: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    MASK_VALUE: tl.constexpr, SCORE: tl.constexpr, POST: tl.constexpr, RENORM: tl.constexpr, EPS: tl.constexpr,
    MIN: tl.constexpr, SCALE: tl.constexpr, MULTIPLIER: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    ON_LOGITS: tl.constexpr, RAGGED: tl.constexpr, THRESHOLD: tl.constexpr, STATISTICS: tl.constexpr,
    SINGLE: tl.constexpr, BT: tl.constexpr, PIECE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Few tokens from hidden states to tables: every program multiplies a piece of W, the last to finish routes.

    `arrived` counts the programs and is zero again at the end. The pieces' sums are added in their order, whoever adds.
    """
    follow(OVERLAP)
    e = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    t = tl.arange(0, BT)
    acc = tl.zeros((BT, BLOCK_N), tl.float32)
    for k in range(split * SPLIT, tl.minimum(H, split * SPLIT + SPLIT), BLOCK_K):
        h = k + tl.arange(0, BLOCK_K)
        inside = h < tl.minimum(H, split * SPLIT + SPLIT)
        x = tl.load(x_ptr + t.to(tl.int64)[:, None] * stride_x + h[None, :],
                    mask=(t < T)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        w = tl.load(w_ptr + e.to(tl.int64)[None, :] * stride_w + h[:, None],
                    mask=(e < E)[None, :] & inside[:, None], other=0.0)  # fmt: skip
        acc = tl.dot(x, w, acc)
    tl.store(partial_ptr + (split * T + t[:, None]) * E + e[None, :], acc, mask=(t < T)[:, None] & (e < E)[None, :])
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == SPLITS * TILES - 1:
        tl.debug_barrier()
        tl.store(arrived_ptr, 0)
        lane = tl.arange(0, LANES)
        whole = (t < T)[:, None] & (lane < E)[None, :]
        logits = tl.zeros((BT, LANES), tl.float32)
        for s in range(SPLITS):
            logits += tl.load(partial_ptr + (s * T + t[:, None]) * E + lane[None, :], mask=whole, other=0.0)
        if HAS_LOGIT_BIAS:
            logits += tl.load(logit_bias_ptr + lane, mask=lane < E, other=0.0).to(tl.float32)[None, :]
        tl.store(logits_ptr + t[:, None] * E + lane[None, :], logits, mask=whole)
        tl.debug_barrier()
        route_range(
            logits_ptr, bias_ptr, weights_ptr, ids_ptr, None, None, None, None,
            tokens_ptr, offsets_ptr, order_ptr, index_ptr, E, 0, 0, T,
            E, K, K_POW2, GROUPS, GROUP_LANES, LANES, KEPT, TOP2, MASK_VALUE, SCORE, POST, RENORM, EPS, MIN, SCALE,
            MULTIPLIER, CAP, HAS_BIAS, ON_LOGITS, RAGGED, THRESHOLD, STATISTICS, SINGLE, BT, PIECE,
        )  # fmt: skip
