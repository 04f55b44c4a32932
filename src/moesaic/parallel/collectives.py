"""Rows between ranks on torch's functional collectives: issued, waited for, differentiated; failures reported by name.

Legend: W ranks of a group; R rows. A *flight* is a collective that was issued and not yet waited for. On NCCL it runs
on NCCL's stream and the wait is one of the device's; on gloo the wait is the host's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import check_choice

WIRES = ("same", "bf16", "fp8")
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


class PeerFailed(RuntimeError):
    """A collective of a dispatcher did not end: a rank died, stalled past the group's timeout, or runs something else.

    The message names the dispatcher, the phase and this rank; `__cause__` is the transport's own error. The group is
    of no further use: leave, and restart from a checkpoint.
    """


def group_of(mesh: Any, who: str) -> dist.ProcessGroup:
    """The process group of a one-dimensional `DeviceMesh`, of a `ProcessGroup` itself, or of all ranks for None."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{who}: torch.distributed must be initialised, got no process group; call init_process_group, or "
            "use Local."
        )
    if mesh is None:
        return dist.group.WORLD  # pyright: ignore[reportReturnType]
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"{who}: the mesh must have one dimension, got {mesh.ndim} ({mesh.mesh_dim_names}); pass mesh['ep']."
            )
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise ValueError(f"{who}: mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}.")
    return mesh


# ---------------------------------------------------------------- what travels
def encode(rows: Tensor, wire: str) -> Tensor:
    """Rows as they travel: as they are, in bf16, or as bytes of e4m3 with the row's fp32 scale behind them.

    The scale is the row's largest magnitude over 448. A NaN or an infinity makes its own row NaN and no other.
    """
    if wire == "same" or (wire == "bf16" and rows.dtype == torch.bfloat16):
        return rows.contiguous()
    if wire == "bf16":
        return rows.to(torch.bfloat16)
    wide = rows.float()
    scale = wide.abs().amax(1, keepdim=True) / _FP8_MAX if wide.shape[1] else wide.new_zeros(wide.shape[0], 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    bytes_ = (wide / scale).to(_FP8).view(torch.uint8)
    return torch.cat([bytes_, scale.contiguous().view(torch.uint8)], 1)


def decode(moved: Tensor, wire: str, dtype: torch.dtype) -> Tensor:
    """The rows that `encode` made, in `dtype`."""
    if wire != "fp8":
        return moved.to(dtype)
    scale = moved[:, -4:].contiguous().view(torch.float32)
    return (moved[:, :-4].contiguous().view(_FP8).float() * scale).to(dtype)


class Flight:
    """One uneven all-to-all of rows, issued at construction. `ins` rows go to each rank, `outs` come from each."""

    def __init__(self, rows: Tensor, ins: list[int], outs: list[int], group: dist.ProcessGroup, wire: str, who: str):
        self.dtype, self.ins, self.outs, self.group, self.wire, self.who = rows.dtype, ins, outs, group, wire, who
        if rows.shape[0] != sum(ins):
            raise ValueError(
                f"{who}: rows must be as many as were announced ({sum(ins)}), got {rows.shape[0]}; pass what dispatch "
                "returned, row for row."
            )
        sent = encode(rows.detach(), wire)
        if group.size() == 1:
            self.moved, self.pending = sent, False
            return
        self.pending = True
        self.moved = _guarded(
            who, group, lambda: torch.ops._c10d_functional.all_to_all_single(sent, outs, ins, group.group_name)
        )
        self.sent = sent  # kept until the wait

    def wait(self) -> Tensor:
        """The rows that came, after the device (or on gloo the host) has waited for them."""
        if self.pending:
            moved = self.moved
            self.moved = _guarded(self.who, self.group, lambda: torch.ops._c10d_functional.wait_tensor(moved))
            self.pending, self.sent = False, None
        return decode(self.moved, self.wire, self.dtype)


class _Arrive(torch.autograd.Function):
    """The rows of a flight; their gradient flies back the other way."""

    @staticmethod
    def forward(ctx, rows, flight, back_wire):
        ctx.way = (flight.outs, flight.ins, flight.group, back_wire, f"{flight.who}, backward")
        out = flight.wait()
        return out.view_as(out) if out is rows else out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Flight(grad, *ctx.way).wait(), None, None


def arrive(rows: Tensor, flight: Flight, back_wire: str = "same") -> Tensor:
    """Wait for a flight of `rows`; differentiable in rows."""
    return _Arrive.apply(rows, flight, back_wire)  # pyright: ignore[reportReturnType]


def gather(values: Tensor, group: dist.ProcessGroup, who: str) -> Tensor:
    """`(n, ...)` of every rank, one behind the other: `(W·n, ...)`. The same n everywhere. No gradient."""
    if group.size() == 1:
        return values
    op = torch.ops._c10d_functional
    return _guarded(
        who, group,
        lambda: op.wait_tensor(op.all_gather_into_tensor(values.contiguous(), group.size(), group.group_name)),
    )  # fmt: skip


def _guarded(who: str, group: dist.ProcessGroup, call) -> Tensor:
    try:
        return call()
    except RuntimeError as error:
        raise PeerFailed(
            f"{who}: rank {group.rank()} must reach all {group.size()} ranks of its group, got: "
            f"{str(error).splitlines()[0][:300]}; a rank has died, stalled past the group's timeout, or is at another "
            "call: leave, and restart from the last checkpoint."
        ) from error


def check_wire(who: str, name: str, wire: str) -> None:
    check_choice(who, name, wire, WIRES)
