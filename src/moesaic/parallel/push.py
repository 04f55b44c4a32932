"""Push: rows written into the other ranks' memory, inside one node, with no host in between.

Legend: W ranks, M = max_tokens places a rank, H hidden, K choices, L experts a rank. Token t of rank s has one place
everywhere, row `s·M + t`: no counts travel, nothing is sorted, and nobody waits for a host. A rank writes its ids to
all ranks (-1 where an expert lies elsewhere) and a token's row only to ranks that own one of its experts. What lies in
the place of a row that was not sent does not matter, since all of its ids are -1.

    send        rows, ids, weights                       -> barrier
    experts     on W·M rows; they add up a token's experts of this rank
    give back   one row a (token, rank) to its source    -> barrier
    add         out[t] = the ranks' sums in their order, in fp32

Two barriers order everything. A rank passes the second only when all experts have run, so that rows may be overwritten;
and it passes the first of the next call only when all have added. The backward pass is the same two ways: the gradient
of the output is sent, in memory of its own, and that of the rows is given back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import hardware
from ..errors import Unsupported, check_shape
from ..routing import Routing
from .collectives import PeerFailed, group_of
from .dispatcher import TokenDispatcher, experts_of

Shape = tuple[tuple[int, ...], torch.dtype]
# For each (shape, dtype) every rank's tensor, zeros or anything but the last, which must be zeros.
Views = Callable[[Sequence[Shape]], list[tuple[Tensor, ...]]]

SPINS_A_SECOND = 2_000_000  # looks at a flag in the own memory
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_kept: list[Any] = []  # symmetric memory and its handle: views do not own it


def symmetric(group: dist.ProcessGroup, device: torch.device) -> Views:
    """Views of one allocation of torch's symmetric memory, carved."""

    def views(shapes: Sequence[Shape]) -> list[tuple[Tensor, ...]]:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here is multicast
        import torch.distributed._symmetric_memory as symm

        sizes = [-(-torch.Size(s).numel() * d.itemsize // 256) * 256 for s, d in shapes]
        whole = symm.empty(sum(sizes), dtype=torch.uint8, device=device).fill_(255)  # rows of NaN
        whole[sum(sizes[:-1]) :] = 0
        handle = symm.rendezvous(whole, group)
        _kept.append((whole, handle))
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody writes before all are filled
        return [
            tuple(handle.get_buffer(p, s, d, sum(sizes[:i]) // d.itemsize) for p in range(group.size()))
            for i, (s, d) in enumerate(shapes)
        ]

    return views


class Channel:
    """The memory of one shape, and the launches over it. Layers of the same shape share one."""

    def __init__(
        self, rank: int, size: int, places: int, hidden_size: int, local: int, top_k: int, dtype: torch.dtype,
        views: Views, spins: int,
    ):  # fmt: skip
        W, M, H, K = size, places, hidden_size, top_k
        made = views((
            ((W * M, H), dtype), ((W * M, K), torch.int32), ((W * M, K), torch.float32), ((W * M, H), dtype),
            ((W * M, K), torch.float32), ((W * M, H), dtype), ((W,), torch.int32),
        ))  # fmt: skip
        turned = [v[rank + 1 :] + v[: rank + 1] for v in made]
        self.xs, self.ids, self.ws, self.backs, self.back_ws, self.grads, self.flags = turned
        device = self.xs[0].device
        self.state = torch.zeros(3, dtype=torch.int32, device=device)
        self.failed = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.rank, self.size, self.places, self.hidden, self.local, self.spins = rank, W, M, H, local, spins
        block = 2048 if H % 2048 == 0 else min(1024, _pow2(H))
        self.pieces = -(-H // block)
        programs = 4 * hardware.sm_count(device.index or 0) if device.type == "cuda" else 4
        self.grid = (max(1, min(programs, M * self.pieces)),)
        self.sizes = dict(H=H, K=K, K_POW2=_pow2(K), RANK=rank, W=W, BLOCK=block, num_warps=4)
        self.open = False

    def send(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Tokens to their experts; afterwards the own `xs`, `ids` and `ws` are whole."""
        if self.open:
            raise ValueError(
                "Push.dispatch: the last dispatch must be combined before the next, got another; layers that run side "
                "by side need memory of their own (shared=False)."
            )
        self.open = True
        self._send(x, ids, weights, self.xs, True)

    def send_gradient(self, grad: Tensor, ids: Tensor) -> None:
        """The output's gradient to the experts; afterwards the own `grads` is whole."""
        self._send(grad, ids, self.ws[-1], self.grads, False)

    def _send(self, x: Tensor, ids: Tensor, weights: Tensor, into: tuple[Tensor, ...], meta: bool) -> None:
        x = x if x.stride(-1) == 1 else x.contiguous()
        _kernels().send_kernel[self.grid](
            x, ids, weights, into, self.ids, self.ws, self.flags, self.state, self.failed, x.shape[0], self.places,
            self.spins, x.stride(0), L=self.local, META=meta, **self.sizes,
        )  # fmt: skip

    def give_back(self, y: Tensor, ids: Tensor, dw: Tensor | None = None) -> None:
        """Sums to their tokens; afterwards the own `backs` (with dw `back_ws`) is whole. `ids` are the local ones."""
        self.open = False
        _kernels().give_back_kernel[self.grid](
            y, ids, self.ws[-1] if dw is None else dw, self.backs, self.back_ws, self.flags, self.state, self.failed,
            self.places, self.spins, y.stride(0), META=dw is not None, **self.sizes,
        )  # fmt: skip

    def barrier(self) -> None:
        """Nothing but the wait for all ranks."""
        _kernels().give_back_kernel[(1,)](
            self.xs[-1], self.ids[-1], self.ws[-1], self.backs, self.back_ws, self.flags, self.state, self.failed, 0,
            self.spins, self.hidden, META=False, **self.sizes,
        )  # fmt: skip

    def add(self, ids: Tensor, y: Tensor, dw: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`(T, H)` and, with dw, `(T, K)`: what all ranks gave for this rank's tokens. `ids` are the global ones."""
        T = ids.shape[0]
        out = y.new_empty(T, self.hidden)
        out_w = None if dw is None else dw.new_empty(ids.shape)
        if T:
            _kernels().add_kernel[(T, self.pieces)](
                ids, y, self.backs[-1], self.ws[-1] if dw is None else dw, self.back_ws[-1], self.state, out,
                self.ws[-1] if out_w is None else out_w, self.places, y.stride(0), L=self.local, META=dw is not None,
                **self.sizes,
            )  # fmt: skip
        return out, out_w


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, ids, channel):
        channel.send(x.detach(), ids, weights.detach())
        local = channel.ids[-1].clone()
        ctx.channel = channel
        ctx.save_for_backward(ids, local)
        ctx.mark_non_differentiable(local)
        return channel.xs[-1].clone(), channel.ws[-1].clone(), local

    @staticmethod
    def backward(ctx, grad, dw, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        ids, local = ctx.saved_tensors
        grad, dw = grad.contiguous(), dw.contiguous()
        ctx.channel.give_back(grad, local, dw)
        return *ctx.channel.add(ids, grad, dw), None, None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, ids, local, channel, alone):
        y = y.contiguous()
        channel.give_back(y, local)
        ctx.channel, ctx.alone = channel, alone
        ctx.save_for_backward(ids)
        return channel.add(ids, y)[0]

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,) = ctx.saved_tensors
        ctx.channel.send_gradient(grad, ids)
        rows = ctx.channel.grads[-1]
        if ctx.alone:  # no gradient goes back to the tokens, whose barrier would guard this memory
            rows = rows.clone()
            ctx.channel.barrier()
        return rows, None, None, None, None


class Push(TokenDispatcher):
    """Rows pushed into the peers' memory by kernels: inside a node, no host synchronisation, capturable.

    The rows that the experts get are all W·M places; those that nobody filled have ids of -1. Without gradient they are
    the receive buffer itself, valid until `combine`; with gradient a copy, which lives until the backward pass.

    Memory a rank: `3 · W·M·H` elements (received tokens, returned sums, received gradients), shared by all layers of
    the same shapes. It is bounded by `max_tokens` and holds every token's row once: it cannot overflow, and more tokens
    than places are refused before anything is sent. A token goes to a rank at most once.

    Args:
        num_experts: E, a multiple of W.
        mesh: a one-dimensional `DeviceMesh`, a `ProcessGroup`, or None; its ranks must be on one host.
        max_tokens: M. The experts run over W·M places whatever T is: make one dispatcher for decoding and one for
            more tokens.
        hidden_size, top_k, dtype: of the tokens.
        patience: seconds that a rank waits for the others on the device. Then the outputs are NaN, and the next call or
            `check()` raises PeerFailed.
        shared: layers of the same shapes use the same memory; False for layers that run side by side.
        views: where the memory comes from, for other kinds of shared memory; by default torch's symmetric memory.

    Every rank must make the same calls. Gradients cross in the tokens' dtype. Deterministic. Source of the design:
    torchtitan's MinimalAsyncEP (two buffers, one barrier a way); one copy a rank and sums at the owner are added.
    """

    name = "push"

    def __init__(
        self, num_experts: int, mesh: Any = None, *, max_tokens: int, hidden_size: int, top_k: int,
        dtype: torch.dtype = torch.bfloat16, patience: float = 10.0, shared: bool = True, views: Views | None = None,
    ):  # fmt: skip
        self.group = group_of(mesh, "Push")
        self.num_experts, self.max_tokens = num_experts, max_tokens
        self.num_local_experts = experts_of(num_experts, self.group.size(), "Push")
        self.hidden_size, self.top_k, self.dtype = hidden_size, top_k, dtype
        for name, value in (("max_tokens", max_tokens), ("hidden_size", hidden_size), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"Push: {name} must be at least 1, got {value}.")
        if dtype not in DTYPES:
            raise ValueError(f"Push: dtype must be bf16, fp16 or fp32, got {dtype}.")
        if views is None and (reason := self.why_not()):
            raise Unsupported(f"Push: cannot run: {reason}.")
        key = (max_tokens, hidden_size, self.num_local_experts, top_k, dtype, int(patience * SPINS_A_SECOND))
        self.channel = _channel(self.group, key) if shared and views is None else _make(self.group, key, views)

    def why_not(self) -> str | None:
        if not torch.cuda.is_available():
            return "it needs GPUs whose memory the ranks of a host can share"
        return hardware.triton_why_not("cuda", hardware.arch_of(torch.device("cuda"))) or one_host(self.group.size())

    def check(self, x: Tensor, routing: Routing) -> None:
        super().check(x, routing)
        who, M, H = "Push.dispatch", self.max_tokens, self.hidden_size
        if x.shape[0] > M:
            raise ValueError(
                f"{who}: x must have at most max_tokens={M} rows, got {x.shape[0]}; make the dispatcher with more."
            )
        check_shape(who, "x", x, ("T", H))
        if routing.top_k != self.top_k or x.dtype != self.dtype or routing.topk_weights is None:
            raise ValueError(
                f"{who}: tokens must be {self.dtype} with {self.top_k} weighed choices, got {x.dtype} and "
                f"{routing.top_k}{' without weights' if routing.topk_weights is None else ''}; make the dispatcher for "
                "them."
            )
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if int(self.channel.failed[0]):
            raise PeerFailed(
                f"Push: rank {self.group.rank()} must be met by all {self.group.size()} ranks within its patience, got "
                "no sign of one; a rank has died, stalled, or is at another call, and outputs since then are NaN: "
                "leave, and restart from the last checkpoint."
            )

    def synchronize(self) -> None:
        """Wait for the device and raise PeerFailed if a rank did not come; for graphs, whose replays nobody checks."""
        if self.channel.state.is_cuda:
            torch.cuda.synchronize(self.channel.state.device)
        self._raise_if_failed()

    def send(self, x: Tensor, routing: Routing, plan: Any = None) -> Any:
        channel, ids, weights = self.channel, routing.topk_ids.int().contiguous(), routing.topk_weights
        assert weights is not None
        weights = weights.float().contiguous()
        graph = torch.is_grad_enabled()
        alone = not (graph and (x.requires_grad or weights.requires_grad))
        if graph:
            rows, w, local = _Send.apply(x, weights, ids, channel)  # pyright: ignore
        else:
            channel.send(x, ids, weights)
            rows, w, local = channel.xs[-1], channel.ws[-1], channel.ids[-1]
        return rows, Routing.from_topk(w, local, self.num_local_experts), (ids, local, alone)

    def receive(self, pending: Any) -> tuple[Tensor, Routing, Any]:
        return pending

    def give_back(self, rows: Tensor, metadata: Any) -> Any:
        ids, local, alone = metadata
        check_shape("Push.combine", "rows", rows, (self.group.size() * self.max_tokens, self.hidden_size))
        return _Back.apply(rows, ids, local, self.channel, alone)  # pyright: ignore

    def add(self, pending: Any) -> Tensor:
        return pending

    def __repr__(self) -> str:
        return (
            f"Push(experts={self.num_experts}, here={self.num_local_experts}, ranks={self.group.size()}, "
            f"max_tokens={self.max_tokens})"
        )


def one_host(size: int) -> str | None:
    """Why the ranks of a group of this size cannot all be on this host, as far as the environment tells."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count()))
    return None if size <= here else f"its {size} ranks must be on one host, and this one has {here}"


def _pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _kernels() -> Any:
    from . import _triton_push

    return _triton_push


def _make(group: dist.ProcessGroup, key: tuple, views: Views | None) -> Channel:
    places, hidden, local, top_k, dtype, spins = key
    if views is None:
        views = symmetric(group, torch.device("cuda", torch.cuda.current_device()))
    return Channel(group.rank(), group.size(), places, hidden, local, top_k, dtype, views, spins)


@lru_cache
def _channel(group: dist.ProcessGroup, key: tuple) -> Channel:
    return _make(group, key, None)
