"""BiasBalancer: even experts without a loss, by nudging the bias that takes part in the choice alone.

Once per optimizer step the bias of every expert that was chosen less than the mean goes up a little, that of every
other down (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437). No gradient is disturbed, and weights stay those of the
unbiased scores.

**What is counted.** Forward hooks count the choices of modules in training mode, before any capacity drop, over all
micro-batches of a step. Activation checkpointing runs a forward a second time, inside the backward pass; such a run is
recognised by just that and left out, so each micro-batch counts once: with and without reentry, for a whole model or
parts of it. Two cases remain. A forward in training mode without gradient that no backward follows is counted (use
eval mode for it). In a module compiled by itself and checkpointed from outside both runs are counted, alike for all
its experts, which neither rule notices; checkpoint inside what is compiled to have true numbers in `loads`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import check_choice
from ..routing import Routing
from .modules import Router
from .passing import RouterOutput, routing_of

RULES = ("sign", "proportional")
WIDE = (torch.float32, torch.float64)
Reader = Callable[[Any, Tensor], "Routing | Tensor | None"]


class _Watched:
    """One bias and the count of its experts' choices since the last step."""

    def __init__(self, bias: Callable[[], Tensor], counts: Tensor | None = None):
        self.bias, self.counts = bias, counts
        self.exact: Tensor | None = None  # a half-precision bias in fp32, as far as it has been moved
        self.source: tuple[int, int] | None = None  # the reader in use and the module that it reads

    def restart(self, source: tuple[int, int]) -> None:
        """Heed this source from now on; what another gave is void, but not counts that were loaded."""
        if self.source is not None and self.counts is not None:
            self.counts.zero_()
        self.source = source

    def move(self, delta: Tensor) -> None:
        """Add to the bias; one in half precision is a sum in fp32, rounded, since it would swallow small steps."""
        bias = self.bias()
        delta = _like(delta.float().view(bias.shape), bias)
        if bias.dtype in WIDE:
            bias.add_(delta)
            return
        now = bias.detach().float()
        if self.exact is not None:  # unless somebody else gave the bias another value
            now = torch.where(self.exact.to(bias.dtype) == bias, self.exact, now)
        self.set(now + delta)

    def set(self, value: Tensor) -> None:
        bias = self.bias()
        bias.copy_(value)
        self.exact = None if bias.dtype in WIDE else value

    def add(self, chosen: Routing | Tensor) -> None:
        n = _count(chosen, self.bias().numel())
        if self.counts is None or self.counts.device != n.device:
            self.counts = torch.zeros_like(n) if self.counts is None else self.counts.to(n.device)
        self.counts.add_(n)


class BiasBalancer:
    """Auxiliary-loss-free balancing: `bias_e += rate · sign(mean(n) - n_e)` at each step, n_e choices of expert e.

        balancer = BiasBalancer(model)              # watches every Router that has a selection bias
        for micro_batches in data:
            for x in micro_batches:
                loss(model(x)).backward()
            optimizer.step()
            balancer.step()

    Args:
        model: its `moesaic.nn.Router`s with `e_score_correction_bias` are watched, so those of every `nn.MoE` with
            `selection_bias`. None watches nothing: call `observe`, or `watch` for routers of other kinds.
        rate: step of the bias, in units of the scores it is added to. An attribute: set it to 0 for the last part of
            training, as DeepSeek-V3 did, or anneal it.
        rule: `"sign"`, or `"proportional"`: `bias_e += rate · (mean(n) - n_e) / mean(n)`.
        centre: shift each step to a mean of 0, so that the biases keep their mean, as torchtitan does; DeepSeek-V3 and
            Megatron-LM do not. Choices are the same, but for groups masked with 0 instead of -inf.
        group: process group over which counts are summed, so that every rank takes the same step; None for none. One
            all-reduce for all biases of a device; every rank must watch the same biases in the same order.

    Attributes:
        loads: by name, the counts `(E,)` int64 of the last step, summed over the group.

    No host synchronisation; biases are changed in place. One in bf16 or fp16 (`model.to(bfloat16)`) would swallow a
    step of 0.001: its exact value is kept here in fp32, and is in `state_dict`, which also holds the biases that a
    checkpoint of adapters leaves out (PEFT's). A bias may be a DTensor (a Parameter under FSDP2). A forward in
    inference mode is not counted. Works with activation checkpointing (the module says how) and
    `torch.compile(fullgraph=True)`.
    """

    def __init__(
        self, model: nn.Module | None = None, *, rate: float = 1e-3, rule: str = "sign", centre: bool = True,
        group: Any = None,
    ):  # fmt: skip
        check_choice("BiasBalancer", "rule", rule, RULES)
        if not rate >= 0:
            raise ValueError(f"BiasBalancer: rate must be at least 0, got {rate}.")
        self.rate, self.rule, self.centre, self.group = rate, rule, centre, group
        self.loads: dict[str, Tensor] = {}
        self._watched: dict[str, _Watched] = {}
        self._observed: list[tuple[str, Tensor]] = []
        self._restored: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        if model is not None:
            for name, module in model.named_modules():
                if isinstance(module, Router) and module.e_score_correction_bias is not None:
                    self.watch(name, module)
            if not self._watched:
                raise ValueError(
                    f"BiasBalancer: model must have a Router with a selection bias, got {type(model).__name__} without "
                    "one; set MoEConfig.selection_bias, or use watch for routers of another kind."
                )

    # ------------------------------------------------------------ counting
    def watch(
        self, name: str, owner: nn.Module, attribute: str = "e_score_correction_bias",
        modules: Iterable[nn.Module] | None = None, readers: tuple[Reader, ...] | None = None,
    ) -> None:  # fmt: skip
        """Count by forward hooks what a router chooses with the bias `owner.attribute`.

        Args:
            name: names the bias in `loads` and in the state; must be new.
            owner: module with the bias, a buffer or a parameter of E elements.
            modules: those that may be the router; by default the owner.
            readers: functions `(output, bias) -> Routing, ids (T, K) or None`, the most trusted first; by default the
                output itself is the `Routing`. Of the modules only the one that the most trusted reader understood
                (the first such) is counted.
        """
        if name in self._watched:
            raise ValueError(f"BiasBalancer.watch: name must be new, got {name!r} again.")
        self._track(name, functools.partial(getattr, owner, attribute))
        for place, module in enumerate((owner,) if modules is None else modules):
            hook = functools.partial(self._after, name, place, readers or (_routing,))
            self._hooks.append(module.register_forward_hook(hook, prepend=True))

    def observe(self, bias: Tensor, chosen: Routing | Tensor) -> None:
        """Count the choices of one forward for `bias (E,)`, for routers that are called as functions.

        Args:
            bias: the tensor that `step` changes; the same object at every call.
            chosen: the `Routing`, whose `choices` are read, or `topk_ids` where it kept none (dropped slots are then
                missing); or ids `(T, K)`, of which those outside `[0, E)` count for nobody.

        A call inside a backward pass is a recomputation and does nothing.
        """
        name = next((name for name, known in self._observed if known is bias), None)
        if name is None:
            name = f"observed.{len(self._observed)}"
            self._observed.append((name, bias))
            self._track(name, functools.partial(_same, bias))
        if not recomputing() and not inferring():
            self._watched[name].add(chosen)

    def _track(self, name: str, bias: Callable[[], Tensor]) -> None:
        self._watched[name] = _Watched(bias, self._restored.pop(name, None))

    def _after(
        self, name: str, place: int, readers: tuple[Reader, ...], module: nn.Module, args: Any, output: Any
    ) -> None:
        if not module.training or recomputing() or inferring():
            return
        watched = self._watched[name]
        for rank, read in enumerate(readers):
            if watched.source is not None and watched.source[0] < rank:
                return  # a more trusted reader understands some module
            chosen = read(output, watched.bias())
            if chosen is None:
                continue
            if watched.source is None or rank < watched.source[0]:
                watched.restart((rank, place))
            if watched.source == (rank, place):
                watched.add(chosen)
            return

    @property
    def unseen(self) -> list[str]:
        """Names of the biases for which no choice was ever counted."""
        return [name for name, watched in self._watched.items() if watched.counts is None]

    # ------------------------------------------------------------ the step
    @torch.no_grad()
    def step(self) -> None:
        """Change every bias by the choices since the last step, and start to count anew.

        Call it once per optimizer step, before or after it. A bias without choices stays as it is.
        """
        counts = {name: self._counts(watched) for name, watched in self._watched.items()}
        self.loads = self._summed(counts)
        for name, n in self.loads.items():
            watched = self._watched[name]
            total = n.sum()
            error = total - n.numel() * n  # E · (mean - n), exact
            delta = self.rate * (error.sign().float() if self.rule == "sign" else error.float() / total.clamp_min(1))
            if self.centre:
                delta = delta - delta.mean()
            watched.move(delta)
            if watched.counts is not None:
                watched.counts.zero_()

    @staticmethod
    def _counts(watched: _Watched) -> Tensor:
        bias = watched.bias()
        if watched.counts is None:
            return torch.zeros(bias.numel(), dtype=torch.int64, device=bias.device)
        return watched.counts.to(bias.device, copy=True)

    def _summed(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.group is None:
            return counts
        out: dict[str, Tensor] = {}
        for device in dict.fromkeys(n.device for n in counts.values()):
            here = {name: n for name, n in counts.items() if n.device == device}
            together = torch.cat(list(here.values()))
            dist.all_reduce(together, group=self.group)
            out.update(zip(here, together.split([n.numel() for n in here.values()]), strict=True))
        return out

    # ------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Rate and rule, the counts of a step under way, and every bias as it is to be, in fp32."""
        counts = {n: w.counts.clone() for n, w in self._watched.items() if w.counts is not None}
        biases = {n: _whole(w.bias() if w.exact is None else w.exact).float() for n, w in self._watched.items()}
        return {"rate": self.rate, "rule": self.rule, "centre": self.centre, "counts": counts, "biases": biases}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, biases too; counts of a bias not yet observed wait for it."""
        check_choice("BiasBalancer.load_state_dict", "rule", state["rule"], RULES)
        self.rate, self.rule, self.centre = state["rate"], state["rule"], state["centre"]
        self._restored = {name: counts.clone() for name, counts in state["counts"].items()}
        for name, watched in self._watched.items():
            watched.counts = self._restored.pop(name, None)
            if (saved := state.get("biases", {}).get(name)) is not None:
                bias = watched.bias()
                watched.set(_like(saved.to(bias.device).view(bias.shape), bias))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _like(whole: Tensor, bias: Any) -> Tensor:
    """A tensor that all ranks have, spread as the bias is."""
    if not hasattr(bias, "device_mesh"):
        return whole
    spread = importlib.import_module("torch.distributed.tensor").distribute_tensor
    return spread(whole, bias.device_mesh, bias.placements, src_data_rank=None)


def _whole(bias: Any) -> Tensor:
    return (bias.full_tensor() if hasattr(bias, "full_tensor") else bias).detach().clone()


def recomputing() -> bool:
    """Whether this runs inside a backward pass, as the second forward of activation checkpointing does."""
    # while a compiled graph is traced no backward runs, and its own recomputation repeats no effects
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def inferring() -> bool:
    """Inference mode: its tensors could not be counted with others later."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _routing(output: Any, bias: Tensor) -> Routing | None:
    return routing_of(output) if isinstance(output, (Routing, RouterOutput)) else None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _count(chosen: Routing | Tensor, num_experts: int) -> Tensor:
    """`(E,)` int64, how often each expert was chosen."""
    if isinstance(chosen, Routing):
        if chosen.choices is not None:
            return chosen.choices.sum(0)
        ids = chosen.topk_ids
    else:
        ids = chosen
    ids = ids.detach().reshape(-1).long()
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]
