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
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.autograd import forward_ad

from . import hardware
from .errors import Unsupported
from .problem import Problem

OPS: dict[str, Op] = {}
# `.forced` is the implementation that `use` forces in this thread; passed into each operator so that its backward
# agrees. Plain, since a tracer reads it.
_thread = threading.local()

_library = torch.library.Library("moesaic", "DEF")
_calls: dict[str, Callable] = {}
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), str, bool, int, float, list, tuple}


def define(schema: str, call: Callable, fake: Callable) -> None:
    """Register the private operator `moesaic::<schema>`: one kernel for every device, and its shapes for tracing.

    The call runs outside autocast, whose lists would otherwise reach the products inside it; what autocast asks of an
    operator's inputs, `autocast` has done before. The low-level `Library` is used because a call through
    `torch.library.custom_op` costs about twice as much.
    """
    name = schema.split("(", 1)[0]
    call = _calls[name] = _outside_autocast(call)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, call, "CPU")
    _library.impl(name, call, "CUDA")
    torch.library.register_fake(f"moesaic::{name}", fake, lib=_library)


def _outside_autocast(call: Callable) -> Callable:
    @functools.wraps(call)
    def plain(*arguments):
        device = next(a for a in arguments if isinstance(a, torch.Tensor)).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return call(*arguments)
        with torch.autocast(device, enabled=False):
            return call(*arguments)

    return plain


def watch(who: str, *tensors: torch.Tensor | None) -> None:
    """Refuse by name the transforms that an operator has no rule for: forward-mode tangents and `torch.func`'s.

    Raises:
        Unsupported: a tensor carries a tangent, or the call stands inside `torch.func.grad`, `vmap` or their like.
    """
    if torch.compiler.is_compiling():
        return
    if _transformed():
        raise Unsupported(
            f"{who}: must not be called inside a torch.func transform (grad, vmap, jvp, ...), got one; use "
            "torch.autograd.grad or .backward()."
        )
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise Unsupported(
            f"{who}: forward-mode derivatives are not there, got an input with a tangent; use reverse mode "
            "(torch.autograd.grad)."
        )


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


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
    if _transformed():
        return False
    return _PLAIN.issuperset(map(type, arguments))


def run(name: str, *arguments):
    """`moesaic::<name>` where no gradient is kept: straight to its implementation if nobody is watching."""
    call = _calls[name] if eager(arguments) else getattr(torch.ops.moesaic, name)
    return call(*arguments)


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation (`"reference"`, `"torch"`, `"triton"`) for every operator called inside the block.

    It holds for the thread that enters the block; a new thread starts unforced. A backward runs what its forward ran.

    Raises:
        Unsupported: at the call, when that implementation cannot run it.
    """
    before = forced(None)
    _thread.forced = implementation
    try:
        yield
    finally:
        _thread.forced = before


def forced(implementation: str | None) -> str:
    """What the caller asked for: the argument, else the enclosing `use` block, else the empty string (choose)."""
    return implementation or getattr(_thread, "forced", "")


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
