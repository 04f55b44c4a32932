"""A layer's experts on many ranks: `nn.MoE(config, parallel=mesh)`, and FSDP2 around it.

Legend: E experts in all, L here; H hidden, I intermediate. Mesh dimensions by name: `ep` holds the experts' parts, `tp`
splits each expert's I, all others are copies of the experts.

Gradients follow data parallelism's convention: every rank has a loss of its own, and what is minimised is their mean.
An expert meets the tokens of all ranks of its `ep` group, so that its weights' gradients arrive summed over them; they
are divided by the size of that group here, and averaged over the copies by whoever averages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..routing import Routing
from .choice import choose
from .dispatcher import TokenDispatcher


class _DividedGradient(torch.autograd.Function):
    """The same values; the gradient over n."""

    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad / ctx.n, None


class _Sum(torch.autograd.Function):
    """Partial sums of all ranks, added; the gradient is every rank's own."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Shared(torch.autograd.Function):
    """What all ranks have alike; their gradients are added."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@dataclass(frozen=True)
class Parallel:
    """How a layer's experts are spread: what `nn.MoE(config, parallel=...)` takes when a mesh alone does not say it.

    Attributes:
        mesh: a `DeviceMesh` with a dimension named `ep` (or of one dimension), and `tp` if experts are split too.
        dispatcher: the transport over the `ep` dimension; None lets `choose` decide.
        divide: divide the expert weights' gradients by the size of `ep` (see the module). False leaves the sum, for a
            loss that is a sum over all ranks' tokens.
        options: for `choose`: `max_tokens` (without which neither Push nor AllGather can be chosen), `dtype` where
            tokens have another than the weights, `chunks`, `transport`, `verbose`.
    """

    mesh: DeviceMesh
    dispatcher: TokenDispatcher | None = None
    divide: bool = True
    options: Any = None

    def dim(self, name: str) -> DeviceMesh | None:
        """The one-dimensional mesh of that name, or None."""
        names = self.mesh.mesh_dim_names or ()
        if name == "ep" and self.mesh.ndim == 1:
            return self.mesh
        if name not in names:
            return None
        return self.mesh if self.mesh.ndim == 1 else self.mesh[name]


class ExpertParallel:
    """What `nn.MoE` calls in place of its experts. Made by `attach`.

    Attributes:
        dispatcher: the transport.
        group: all ranks of the mesh but those that split experts: over which losses are those of the whole batch.
    """

    def __init__(self, spread: Parallel, dispatcher: TokenDispatcher):
        self.spread, self.dispatcher = spread, dispatcher
        ep, tp = spread.dim("ep"), spread.dim("tp")
        assert ep is not None
        self.size, self.tp = ep.size(), None if tp is None or tp.size() == 1 else tp.get_group()
        data = [n for n in spread.mesh.mesh_dim_names or () if n != "tp"]
        if spread.mesh.ndim == 1:
            self.group = ep.get_group()
        else:
            part = spread.mesh[tuple(data)] if len(data) < spread.mesh.ndim else spread.mesh
            self.group = (part if part.ndim == 1 else part._flatten()).get_group()

    def __call__(
        self, experts: nn.Module, x: Tensor, routing: Routing, shared: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """The routed experts' sum for this rank's tokens, and what `shared()` gave while they travelled."""
        kept: list[Tensor | None] = []

        def compute(rows: Tensor, local: Routing) -> Tensor:
            if self.tp is None:
                return experts(rows, local)
            rows, weights = _Shared.apply(rows, self.tp), _Shared.apply(local.topk_weights, self.tp)
            local = Routing.from_topk(weights, local.topk_ids, local.num_experts)  # pyright: ignore
            return _Sum.apply(experts(rows, local), self.tp)  # pyright: ignore[reportReturnType]

        y = self.dispatcher(x, routing, compute, lambda: kept.append(shared()))
        return y, kept[0] if kept else shared()

    def local(self, parameter: Tensor) -> Tensor:
        """A parameter's part on this rank, as the operators read it."""
        if isinstance(parameter, DTensor):
            parameter = parameter.to_local()
        return _DividedGradient.apply(parameter, self.size) if self.spread.divide else parameter  # pyright: ignore

    def loss(self, name: str, loss: Callable[..., Tensor], routing: Routing) -> Tensor:
        """An auxiliary loss whose mean over the ranks is that of the whole batch, where it has such a form."""
        if name == "load_balancing_loss":
            return loss(routing, group=self.group)
        value = loss(routing)
        if name == "z_loss":  # a mean over tokens: ranks with more count more
            tokens = torch.tensor([float(routing.num_tokens)], device=value.device, dtype=value.dtype)
            total = tokens.clone()
            dist.all_reduce(total, group=self.group)
            value = value * (tokens * self.group.size() / total.clamp_min(1))[0]
        return value

    def __deepcopy__(self, memo: Any) -> ExpertParallel:
        return self  # communicators are shared, not copied

    def __repr__(self) -> str:
        return repr(self.dispatcher)


def attach(layer: Any, parallel: DeviceMesh | Parallel) -> ExpertParallel:
    """Spread an `nn.MoE`'s experts over a mesh: each of their parameters becomes a DTensor, `Shard(0)` on `ep`.

    Every rank keeps its own part of the values that it has, so ranks must have begun with the same seed. On the meta
    device nothing is copied; then `to_empty` and load a checkpoint.

    Args:
        layer: an `nn.MoE`.
        parallel: a mesh with a dimension `ep`, or a `Parallel`.

    Raises:
        ValueError: no such dimension; E is no multiple of it; I cannot be split as stored.
    """
    who = "MoE(parallel=...)"
    spread = parallel if isinstance(parallel, Parallel) else Parallel(parallel)
    if not isinstance(spread.mesh, DeviceMesh) or spread.dim("ep") is None:
        got = getattr(spread.mesh, "mesh_dim_names", type(spread.mesh).__name__)
        raise ValueError(
            f"{who}: the mesh must be a DeviceMesh with a dimension named 'ep', got {got}; make it with "
            'init_device_mesh(device, (data, experts), mesh_dim_names=("dp", "ep")).'
        )
    ep, tp, config = spread.dim("ep"), spread.dim("tp"), layer.config
    assert ep is not None
    if config.num_experts % ep.size():
        raise ValueError(
            f"{who}: num_experts={config.num_experts} must be a multiple of the {ep.size()} ranks of 'ep'; use a "
            "smaller mesh dimension."
        )
    dispatcher = spread.dispatcher
    if dispatcher is None:
        shape = dict(hidden_size=config.hidden_size, top_k=config.router.top_k, dtype=layer.experts.down_proj.dtype)
        options: dict[str, Any] = dict(verbose=False) | shape | dict(spread.options or {})
        dispatcher = choose(ep, num_experts=config.num_experts, **options)
    if dispatcher.num_experts != config.num_experts or dispatcher.num_local_experts * ep.size() != config.num_experts:
        raise ValueError(
            f"{who}: the dispatcher must spread {config.num_experts} experts over {ep.size()} ranks, got {dispatcher}."
        )
    if tp is not None and tp.size() > 1:
        _check_split(config, tp.size(), who)
    experts: Any = layer.experts
    for name, value in list(experts.named_parameters(recurse=False)):
        mesh, placements = ep, [Shard(0)]
        if tp is not None and tp.size() > 1:
            mesh = spread.mesh["ep", "tp"]
            first = name.startswith(experts.first)
            placements = [Shard(0), Shard(2 if first == config.transposed else 1)]
        part = distribute_tensor(value.data, mesh, placements, src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(part, requires_grad=value.requires_grad))
    made = ExpertParallel(spread, dispatcher)
    experts.localize = made.local
    return made


def _check_split(config: Any, size: int, who: str) -> None:
    from ..activations import resolve

    if config.intermediate_size % size:
        raise ValueError(
            f"{who}: intermediate_size={config.intermediate_size} must be a multiple of the {size} ranks of 'tp'."
        )
    if resolve(config.activation).gated and config.layout != "interleaved":
        raise ValueError(
            f"{who}: to split experts gate and up must lie side by side, got layout={config.layout!r}; use "
            "layout='interleaved'."
        )
    if config.expert_bias:
        raise ValueError(f"{who}: experts with biases cannot be split over 'tp'; use 'ep' alone.")


def fully_shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """FSDP2 around a model with expert-parallel layers: experts over their copies, all else over all ranks.

    Args:
        model: its `nn.MoE`s were made with `parallel=mesh` (or a `Parallel` of it).
        mesh: the mesh of two dimensions, copies and `ep`, in this order.
        options: for `torch.distributed.fsdp.fully_shard`: `mp_policy`, `reshard_after_forward`, ...

    An expert weight that is split over `ep` is split again over the copies, along its second dimension.
    """
    from torch.distributed.fsdp import fully_shard as shard

    names = mesh.mesh_dim_names or ()
    if len(names) != 2 or names[1] != "ep":
        raise ValueError(
            f"parallel.fully_shard: mesh must have two dimensions, copies and 'ep', got {names or mesh.ndim}; make it "
            'with init_device_mesh(device, (data, experts), mesh_dim_names=("dp", "ep")).'
        )
    for module in model.modules():
        if isinstance(getattr(module, "parallel", None), ExpertParallel):
            shard(module.experts, mesh=mesh[names[0]], shard_placement_fn=lambda p: Shard(1), **options)  # pyright: ignore
    shard(model, mesh=mesh._flatten(), **options)
    return model
