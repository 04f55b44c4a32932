"""Inputs and judgement for tests, `moesaic verify` and `moesaic bench`.

The rule of judgement: an error is measured against an fp64 oracle on the *same rounded inputs*, and its bound scales
with the output's dtype and the contraction length. A bare absolute tolerance hides wrong results on small outputs and
fails right ones on large outputs, so none is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cases
from .activations import ACTIVATIONS
from .routing import Routing

# Unit roundoff u: the largest relative error of rounding once.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
ULP_EDGES = (0.5, 1, 2, 4, 16, 256)


@dataclass(frozen=True)
class ErrorReport:
    """How far `out` is from an oracle. All relative figures are relative to the oracle.

    Attributes:
        norm: `||out - ref|| / ||ref||`, the figure peers publish.
        worst: largest `|out - ref| / scale`; scale is |ref| or, if larger, the geometric mean of the rms of the
            element's row and of the whole reference (an element may be small by cancellation, a row by its condition).
        ulps: share of elements within 0.5, 1, 2, 4, 16, 256 ulp of the output dtype, and beyond.
        bias: mean signed error over rmse; far from 0 for truncation or a missing term.
    """

    dtype: torch.dtype
    count: int
    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    norm: float
    norm_ratio: float
    rmse: float
    worst: float
    worst_at: tuple[int, ...]
    cosine: float
    bias: float
    ulps: tuple[float, ...]
    finite_mismatch: int

    def __str__(self) -> str:
        return (
            f"norm {self.norm:.2e}  worst {self.worst:.2e} at {self.worst_at}  max abs {self.max_abs:.2e}  "
            f"norm ratio {self.norm_ratio:.6f}  cosine {self.cosine:.8f}  bias {self.bias:+.3f}"
        )


def error_report(out: Tensor, oracle: Tensor) -> ErrorReport:
    """Compare `out` with `oracle` (fp64, same shape). NaN and inf must stand in the same places to count as equal."""
    if out.shape != oracle.shape:
        raise ValueError(
            f"error_report: out must have the oracle's shape {tuple(oracle.shape)}, got {tuple(out.shape)}."
        )
    dtype = out.dtype
    x, ref = out.detach().double(), oracle.detach().double().to(out.device)
    if x.numel() == 0:
        return ErrorReport(dtype, 0, 0, 0, 0, 0, 0, 1, 0, 0, (), 1, 0, (0.0,) * (len(ULP_EDGES) + 1), 0)
    same_nonfinite = ~torch.isfinite(ref) & ((x == ref) | (torch.isnan(x) & torch.isnan(ref)))
    mismatch = int(((torch.isfinite(x) != torch.isfinite(ref)) | (~torch.isfinite(ref) & ~same_nonfinite)).sum())
    good = torch.isfinite(x) & torch.isfinite(ref)
    x, ref = torch.where(good, x, 0), torch.where(good, ref, 0)
    err = x - ref
    mag = ref.abs()
    rows = ref.reshape(-1, ref.shape[-1]) if ref.dim() > 1 else ref.reshape(1, -1)
    row_rms, all_rms = rows.square().mean(-1, keepdim=True).sqrt(), rows.square().mean().sqrt()
    scale = torch.maximum((row_rms * all_rms).sqrt().expand_as(rows), rows.abs()).reshape(ref.shape)
    relative = torch.where(scale > 0, err.abs() / scale, torch.where(err == 0, 0.0, math.inf))
    u = UNIT_ROUNDOFF[dtype]
    ulp = torch.exp2(torch.floor(torch.log2(mag.clamp_min(torch.finfo(dtype).tiny)))) * 2 * u
    in_ulps = err.abs() / ulp
    edges = [float((in_ulps <= e).double().mean()) for e in ULP_EDGES]
    ref_norm, x_norm, err_norm = (float(t.norm()) for t in (ref, x, err))
    rel = err.abs() / mag.clamp_min(torch.finfo(torch.float32).tiny)
    rmse = err_norm / math.sqrt(err.numel())
    at = int(relative.reshape(-1).argmax())
    return ErrorReport(
        dtype, err.numel(), float(err.abs().max()), float(err.abs().mean()), float(rel.max()), float(rel.median()),
        err_norm / ref_norm if ref_norm else (0.0 if err_norm == 0 else math.inf),
        x_norm / ref_norm if ref_norm else 1.0, rmse, float(relative.max()),
        tuple(int(i) for i in torch.unravel_index(torch.tensor(at), ref.shape)),
        float((x * ref).sum() / (x_norm * ref_norm)) if x_norm and ref_norm else 1.0,
        float(err.mean()) / rmse if rmse else 0.0, (*edges, 1.0 - edges[-1]), mismatch,
    )  # fmt: skip


# How many times a result is rounded to the working dtype on its way, by operator; a product of two rounded factors
# (gate times up) counts twice. Implementations that round less often simply stay further inside the bound.
STAGES = {
    "route": 1,
    "permute": 1,
    "unpermute": 1,
    "grouped_matmul": 1,
    "fused_experts": 6,
    "fused_experts_backward": 10,
}


def bounds(dtype: torch.dtype, contraction: int, stages: int = 1) -> tuple[float, float]:
    """`(norm, worst)`: what an honest computation may miss the oracle by.

    Each of `stages` roundings to `dtype` has an rms relative error of at most 0.6·u (u = unit roundoff), and they add
    like independent errors; sums of `contraction` products in fp32 (fp64 for fp64) add about u_acc·sqrt(contraction),
    doubled for the order of summation. Short contractions average few rounding errors, so theirs may be larger by
    `4 / sqrt(contraction)`. An element may miss its scale by ten times the norm bound: rounding errors are near normal,
    a tensor holds at most about 10⁸ elements, whose largest deviation is 6 sigma, and rows differ in condition.
    """
    u = UNIT_ROUNDOFF[dtype]
    u_acc = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    root = math.sqrt(max(contraction, 1))
    norm = 0.6 * u * math.sqrt(stages) * (1 + 4 / root) + 2 * u_acc * root + 4 * u_acc
    return norm, 10 * norm


def failure(
    out: Tensor, oracle: Tensor, contraction: int, stages: int = 1, dtype: torch.dtype | None = None
) -> str | None:
    """Why `out` is not an honest computation of `oracle`, or None. Arguments as in `assert_close`."""
    report, dtype = error_report(out, oracle), dtype or out.dtype
    norm, worst = bounds(dtype, contraction, stages)
    where = f"({dtype}, contraction {contraction}, {stages} stages)"
    if report.finite_mismatch:
        return f"{report.finite_mismatch} elements are NaN or inf where the oracle is not, or the reverse; {report}"
    if not report.norm <= norm:
        return f"norm error {report.norm:.2e} must be at most {norm:.2e} {where}; {report}"
    if not report.worst <= worst:
        return f"worst element {report.worst:.2e} must be at most {worst:.2e} {where}; {report}"
    return None


def assert_close(
    out: Tensor,
    oracle: Tensor,
    contraction: int,
    stages: int = 1,
    dtype: torch.dtype | None = None,
    name: str = "out",
) -> None:
    """Raise `AssertionError` unless `out` is within the rounding of its dtype and contraction length of the oracle.

    Args:
        out: the result.
        oracle: the same in fp64 from the same rounded inputs.
        contraction: the longest sum behind an element (H, I, rows of an expert for weight gradients).
        stages: roundings to the dtype on the way, the last included: `STAGES[operator]`.
        dtype: the dtype that intermediates were rounded to, where it is not the result's own (the gradient of the fp32
            routing weights of a bf16 layer).
    """
    reason = failure(out, oracle, contraction, stages, dtype)
    if reason:
        raise AssertionError(f"{name}: {reason}")


# ---------------------------------------------------------------- inputs
@dataclass(frozen=True)
class Inputs:
    """Tensors of one expert layer, ready for `fused_experts(**layer.arguments())`."""

    x: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    routing: Routing
    b_gate_up: Tensor | None
    b_down: Tensor | None
    case: cases.Case

    def arguments(self) -> dict:
        c = self.case
        return {
            "x": self.x,
            "w_gate_up": self.w_gate_up,
            "w_down": self.w_down,
            "routing": self.routing,
            "activation": c.activation,
            "b_gate_up": self.b_gate_up,
            "b_down": self.b_down,
            "layout": c.layout,
            "transposed": c.transposed,
        }


def make_inputs(
    case: cases.Case,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    distribution: str = "uniform",
    seed: int = 0,
    ids: Tensor | None = None,
) -> Inputs:
    """Random tensors of a case: unit-variance tokens, weights scaled by 1/sqrt(fan in), normalised random weights."""
    g = torch.Generator().manual_seed(seed)
    E, H, I, K = case.num_experts, case.hidden_size, case.intermediate_size, case.top_k
    N = ACTIVATIONS[case.activation].width(I)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        if torch.device(device).type == "cpu":
            return (torch.randn(*shape, generator=g) * scale).to(dtype)
        return (torch.randn(*shape, device=device) * scale).to(dtype)  # large: drawn where it lives

    if torch.device(device).type != "cpu":
        torch.manual_seed(seed)
    w_gate_up = randn(*((E, H, N) if case.transposed else (E, N, H)), scale=H**-0.5)
    w_down = randn(*((E, I, H) if case.transposed else (E, H, I)), scale=I**-0.5)
    if ids is None:
        ids = cases.DISTRIBUTIONS[distribution](tokens, E, K, g).topk(K, -1).indices
    weights = torch.rand(ids.shape, generator=g) + 0.1
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)
    weights = weights.double() if dtype == torch.float64 else weights
    routing = Routing.from_topk(weights.to(device), ids.to(device), E)
    bias = (randn(E, N, scale=0.5), randn(E, H, scale=0.5)) if case.bias else (None, None)
    return Inputs(randn(tokens, H), w_gate_up, w_down, routing, *bias, case)


def adversarial_ids(num_experts: int, top_k: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Routings that break careless code: `name -> (T, K)` ids. Each is legal input."""
    g = torch.Generator().manual_seed(seed)
    E, K = num_experts, top_k
    random = torch.rand(max(tokens, 1), E, generator=g).topk(K, -1).indices
    dropped = random.clone()
    dropped[torch.rand(dropped.shape, generator=g) < 0.4] = -1
    dropped[0] = -1
    half = torch.rand(max(tokens, 1), max(K, E // 2), generator=g).topk(K, -1).indices
    return {
        "random": random,
        "all to one": torch.arange(K).expand(max(tokens, 1), K).clone(),
        "last experts": (E - 1 - torch.arange(K)).expand(max(tokens, 1), K).clone(),
        "half of the experts empty": half,
        "dropped slots": dropped,
        "all dropped": torch.full((max(tokens, 1), K), -1),
        "one token": random[:1],
        "no token": random[:0],
        "same expert twice": torch.zeros(max(tokens, 1), K, dtype=torch.long),
    }
