"""Op: an operator's implementations in written order, and the only code that chooses between them.

An implementation is a module `_<name>.py` in the operator's folder. It answers `why_not(problem) -> str | None`, pure
and device-free, and holds the operator's calls; modules are imported only when one of them may be chosen. Choice takes
the first that gives no reason against; a forced one that cannot run raises `Unsupported` with its reason. Nothing is
tried and caught.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from . import hardware
from .errors import Unsupported
from .problem import Problem

OPS: dict[str, Op] = {}
_forced = ""  # the implementation that `use` forces; passed into each operator so that its backward agrees

_library = torch.library.Library("moesaic", "DEF")
_calls: dict[str, Callable] = {}
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), str, bool, int, float, list, tuple}


def define(schema: str, call: Callable, fake: Callable) -> None:
    """Register the private operator `moesaic::<schema>`: one kernel for every device, and its shapes for tracing.

    The low-level `Library` is used because a call through `torch.library.custom_op` costs about twice as much.
    """
    name = schema.split("(", 1)[0]
    _calls[name] = call
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, call, "CPU")
    _library.impl(name, call, "CUDA")
    torch.library.register_fake(f"moesaic::{name}", fake, lib=_library)


def differentiable(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give `moesaic::<name>` its autograd formula (whose backward is a second operator)."""
    torch.library.register_autograd(f"moesaic::{name}", backward, setup_context=setup_context, lib=_library)


def autocast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple:
    """The tensors in autocast's dtype where autocast is on for x's device (fp64 stays), else as they are."""
    tensors, device = (x, *others), x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def eager(arguments: tuple) -> bool:
    """True when nobody is watching: no tracing, mode, transform or tensor subclass that must see the operator itself.

    A call that needs no gradient may then go straight to its implementation, without the dispatcher's time.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return _PLAIN.issuperset(map(type, arguments))


def run(name: str, *arguments):
    """`moesaic::<name>` where no gradient is kept: straight to its implementation if nobody is watching."""
    call = _calls[name] if eager(arguments) else getattr(torch.ops.moesaic, name)
    return call(*arguments)


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation (`"reference"`, `"torch"`, `"triton"`) for every operator called inside the block.

    Raises:
        Unsupported: at the call, when that implementation cannot run it.
    """
    global _forced
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def forced(implementation: str | None) -> str:
    """What the caller asked for: the argument, else the enclosing `use` block, else the empty string (choose)."""
    return implementation or _forced


@dataclass(frozen=True)
class Explanation:
    """Which implementation runs a problem, and why not the others. Prints as a table."""

    problem: Problem
    reasons: tuple[tuple[str, str | None], ...]

    @property
    def chosen(self) -> str | None:
        return next((name for name, reason in self.reasons if reason is None), None)

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for name, reason in self.reasons:
            state = "chosen" if name == self.chosen else ("can run" if reason is None else f"no: {reason}")
            lines.append(f"  {name:<10} {state}")
        return "\n".join(lines)


class Op:
    """An operator. `implementations` is the order of preference; the last should run everywhere."""

    def __init__(self, name: str, package: str, implementations: tuple[str, ...]):
        self.name, self.package, self.implementations = name, package, implementations
        self.select = functools.lru_cache(maxsize=4096)(self._select)
        OPS[name] = self

    def implementation(self, name: str) -> ModuleType:
        """The module of one implementation, imported now if it was not."""
        if name not in self.implementations:
            raise Unsupported(f"{self.name}: no implementation {name!r}; there are {', '.join(self.implementations)}.")
        return importlib.import_module(f"{self.package}._{name}")

    def why_not(self, name: str, problem: Problem) -> str | None:
        """Why `name` cannot run `problem`, or None."""
        if name == "triton" and (reason := hardware.triton_why_not(problem.device, problem.arch)):
            return reason  # asked before the module is imported, since importing it imports triton
        return self.implementation(name).why_not(problem)

    def _select(self, problem: Problem, name: str = "") -> ModuleType:
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

    def explain(self, problem: Problem) -> Explanation:
        return Explanation(problem, tuple((n, self.why_not(n, problem)) for n in self.implementations))


def explain(op: str, problem: Problem | None = None, **fields) -> Explanation:
    """The table of `op`'s implementations for a problem, with the reason against each that cannot run.

    Args:
        op: `"route"`, `"permute"`, `"grouped_matmul"` or `"fused_experts"`.
        problem: the call in question; or give its fields as keywords, e.g. `explain("fused_experts", device="cpu")`.
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}.")
    return OPS[op].explain(problem or Problem(op=op, **fields))
