"""What passes between the layer's modules, in forms that hooks of torch, FSDP2 and ZeRO treat rightly.

Hooks of a module look for the tensors that it returns in tuples, lists and dicts; a dataclass is one thing to them, or
they walk into it and cast what they find. So the router returns a named tuple, whose tensors its hooks see, and the
experts take a sealed routing, whose weights nobody rounds to the experts' dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from ..routing import Routing


class RouterOutput(NamedTuple):
    """A `Routing`'s fields, transformers' three first: logits, weights, ids. `routing_of` gives the Routing."""

    logits: Tensor | None
    topk_weights: Tensor | None
    topk_ids: Tensor
    tokens_per_expert: Tensor
    expert_offsets: Tensor
    row_order: Tensor
    row_index: Tensor
    probability_sums: Tensor | None
    logsumexp_squares: Tensor | None
    choices: Tensor | None
    load: Tensor | None
    shared_weights: Tensor | None
    identity_weight: Tensor | None
    constant_weights: Tensor | None
    undropped_ids: Tensor | None
    config: Any
    capacity: int | None
    padded: int | None


class Sealed:
    """A routing that hooks neither walk into nor cast."""

    __slots__ = ("routing",)

    def __init__(self, routing: Routing):
        self.routing = routing


def output_of(routing: Routing) -> RouterOutput:
    return RouterOutput(*[getattr(routing, name) for name in RouterOutput._fields])


def routing_of(output: Any) -> Routing:
    """The Routing of what a router returned or the experts were given; tables are not made again.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(output, Sealed):
        return output.routing
    if isinstance(output, tuple) and len(output) == len(RouterOutput._fields):  # a reentrant checkpoint forgets names
        return Routing(**dict(zip(RouterOutput._fields, output, strict=True)))
    if isinstance(output, Routing):
        return output
    raise ValueError(f"MoE: a gate must return a Routing or a RouterOutput, got {type(output).__name__}.")


def detached(routing: Routing) -> Routing:
    """Without logits and without the graph, which would live until the next forward."""
    names = (*_WEIGHTS, "probability_sums", "logsumexp_squares", "load")
    kept = {name: t.detach() for name in names if (t := getattr(routing, name)) is not None}
    return replace(routing, logits=None, **kept)


_WEIGHTS = ("topk_weights", "shared_weights", "identity_weight", "constant_weights")
