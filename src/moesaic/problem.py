"""The registration of `route` and the gate's product, which are not yet described as `op.Op` wants it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import hardware
from .errors import Unsupported
from .guards import eager
from .launcher import together
from .op import OPS, Explanation, _library

_calls: dict[str, Callable] = {}


def define(schema: str, call: Callable, fake: Callable) -> None:
    """Register the private operator `moesaic::<schema>`: one kernel for every device, and its shapes for tracing.

    The call runs outside autocast, whose lists would otherwise reach the products inside it; what autocast asks of an
    operator's inputs, `autocast` has done before. The low-level `Library` is used because a call through
    `torch.library.custom_op` costs about twice as much.
    """
    name = schema.split("(", 1)[0]
    call = _calls[name] = _plainly(call)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, call, "CPU")
    _library.impl(name, call, "CUDA")
    torch.library.register_fake(f"moesaic::{name}", fake, lib=_library)


def _plainly(call: Callable) -> Callable:
    @functools.wraps(call)
    def plain(*arguments):
        device = next(a for a in arguments if isinstance(a, torch.Tensor)).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return together(call, *arguments)
        with torch.autocast(device, enabled=False):
            return together(call, *arguments)

    return plain


def differentiable(name: str, backward: Callable, setup_context: Callable, twice: bool = False) -> None:
    """Give `moesaic::<name>` its autograd formula (whose backward is a second operator).

    Unless the formula can itself be differentiated `twice`, what it returns raises by name when somebody tries.
    """

    def once(ctx, *grads):
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # nobody asked for a graph
            return out
        message = (
            f"{name}: its gradient must not be differentiated again, got a backward through it; drop create_graph=True "
            "there, or compute this part with torch's own operations."
        )
        places = [i for i, g in enumerate(out) if g is not None]
        refused = torch._C._functions.DelayedError(message.encode(), len(places))(  # pyright: ignore
            *(out[i].detach().requires_grad_() for i in places)
        )
        marked = dict(zip(places, refused if isinstance(refused, tuple) else (refused,), strict=True))
        return tuple(marked.get(i) for i in range(len(out)))

    formula = backward if twice else once
    torch.library.register_autograd(f"moesaic::{name}", formula, setup_context=setup_context, lib=_library)


def run(name: str, *arguments):
    """`moesaic::<name>` where no gradient is kept: straight to its implementation if nobody is watching."""
    call = _calls[name] if eager(arguments) else getattr(torch.ops.moesaic, name)
    return call(*arguments)


class OldOp:
    """An operator. `implementations` is the order of preference; the last should run everywhere."""

    def __init__(self, name: str, package: str, implementations: tuple[str, ...], problem: Any):
        self.name, self.package, self.implementations, self.problem = name, package, implementations, problem
        self.select = functools.lru_cache(maxsize=4096)(self._select)
        OPS[name] = self  # type: ignore

    def implementation(self, name: str) -> ModuleType:
        """The module of one implementation, imported now if it was not."""
        if name not in self.implementations:
            raise Unsupported(f"{self.name}: no implementation {name!r}; there are {', '.join(self.implementations)}.")
        return importlib.import_module(f"{self.package}._{name}")

    def why_not(self, name: str, problem: Any) -> str | None:
        """Why `name` cannot run `problem`, or None."""
        if name == "triton" and (reason := hardware.triton_why_not(problem.device, problem.arch)):
            return reason  # asked before the module is imported, since importing it imports triton
        return self.implementation(name).why_not(problem)

    def _select(self, problem: Any, name: str = "") -> ModuleType:
        if name:
            if name not in self.implementations or (reason := self.why_not(name, problem)):
                have = self.implementations
                reason = reason if name in have else f"there is none of that name, only {', '.join(have)}"
                raise Unsupported(f"{problem}: implementation {name!r} cannot run: {reason}.")
            return self.implementation(name)
        reasons = []
        for candidate in self.implementations:
            reason = self.why_not(candidate, problem)
            if reason is None:
                return self.implementation(candidate)
            reasons.append(f"{candidate}: {reason}")
        raise Unsupported(f"{problem}: no implementation can run. " + "; ".join(reasons) + ".")

    def explain(self, problem: Any) -> Explanation:
        return Explanation(problem, tuple((n, self.why_not(n, problem)) for n in self.implementations))
