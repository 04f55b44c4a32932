"""A Hugging Face model run twice, by its own loop and by moesaic: is every layer as close to the truth?

With frozen routing (the tokens, experts and weights that the first run chose) each layer of experts is judged alone,
against its own loop in fp64. With free routing the whole model runs, and what counts is how many tokens choose other
experts: rounding moves a token only where two experts were nearly tied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..testing import error_report
from .load import expert_load


@dataclass(frozen=True)
class LayerComparison:
    """One layer of experts; `eager` and `ours` are relative norm errors against fp64 on the same tokens and routing.

    Attributes:
        difference: relative norm of ours minus eager.
        flips: tokens whose set of experts differs between the two runs of the whole model.
        load: `(E,)` tokens over the even share, as `expert_load`.
    """

    name: str
    eager: float
    ours: float
    difference: float
    flips: int
    tokens: int
    load: Tensor


@dataclass(frozen=True)
class Comparison:
    """Every layer, and the whole model: `logits` relative norm difference, `agreement` of the likeliest token."""

    layers: tuple[LayerComparison, ...]
    logits: float
    agreement: float


@dataclass(frozen=True)
class _Seen:
    x: Tensor
    ids: Tensor
    weights: Tensor
    y: Tensor


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts that moesaic can run, by name, in order."""
    from ..integrations.transformers import report

    lines = report(model).lines
    return {line.name: model.get_submodule(line.name) for line in lines if "registry" not in line.why}


@torch.no_grad()
def compare(model: Any, input_ids: Tensor, progress: Callable[[str], None] = lambda what: None) -> Comparison:
    """Run `input_ids (B, L)` with eager and with moesaic, and judge every layer.

    Leaves the model with `experts_implementation="moesaic"`.
    """
    progress("eager")
    theirs, logits = _run(model, input_ids, "eager")
    truths = {}
    for name, module in experts_of(model).items():
        progress(f"{name} in fp64")
        seen = theirs[name]
        truths[name] = copy.deepcopy(module).double()(seen.x.double(), seen.ids, seen.weights.double())
    progress("moesaic")
    ours, our_logits = _run(model, input_ids, "moesaic")
    layers = []
    for name, module in experts_of(model).items():
        seen = theirs[name]
        frozen = module(seen.x, seen.ids, seen.weights)
        chosen, other = (s.ids.sort(-1).values for s in (seen, ours[name]))
        layers.append(LayerComparison(
            name, error_report(seen.y, truths[name]).norm, error_report(frozen, truths[name]).norm,
            _relative(frozen, seen.y), int((chosen != other).any(-1).sum()), seen.x.shape[0],
            expert_load(ours[name].ids, int(module.num_experts)),  # type: ignore[arg-type]
        ))  # fmt: skip
    agreement = float((logits.argmax(-1) == our_logits.argmax(-1)).double().mean())
    return Comparison(tuple(layers), _relative(our_logits, logits), agreement)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _run(model: Any, input_ids: Tensor, implementation: str) -> tuple[dict[str, _Seen], Tensor]:
    """The model's logits, and what went in and out of each layer of experts."""
    model.set_experts_implementation(implementation)
    seen: dict[str, _Seen] = {}

    def watch(name: str):
        def hook(module, args, kwargs, output):
            x, ids, weights = (*args, *kwargs.values())
            seen[name] = _Seen(x.detach().clone(), ids.clone(), weights.detach().clone(), output.detach().clone())

        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in experts_of(model).items()]
    try:
        logits = model(input_ids=input_ids).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits
