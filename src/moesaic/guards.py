"""What surrounds an operator's call: transforms that it refuses, tracers that must see it, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import Unsupported

_PLAIN = {Tensor, torch.nn.Parameter, type(None), str, bool, int, float, list, tuple}


def watch(who: str, *tensors: Tensor | None) -> None:
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


def _autocasting() -> bool:
    """False when autocast is off for every device, which is quicker to ask than for one."""
    return torch.compiler.is_compiling() or _any_autocast()


_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on for x's device (fp64 stays), else as they are."""
    tensors = (x, *others)
    if not _autocasting():
        return tensors
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def eager(arguments: tuple[Any, ...]) -> bool:
    """True when nobody is watching: no tracing, mode, transform or tensor subclass that must see the operator itself.

    A call that needs no gradient may then go straight to its implementation, without the dispatcher's time.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if _transformed() or forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return False
    return _PLAIN.issuperset(map(type, arguments))


@contextlib.contextmanager
def _no_autocast(device: str) -> Iterator[None]:
    with torch.autocast(device, enabled=False):
        yield


def outside_autocast(device: torch.device) -> Any:
    """An operator runs outside autocast, whose lists would otherwise reach the products inside it; what autocast asks
    of its operands, `autocast` has done before."""
    if not _autocasting() or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _NOTHING
    return _no_autocast(device.type)


_NOTHING = contextlib.nullcontext()


def refusing(message: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same values without their graph, through which a backward raises the message."""
    made = torch._C._functions.DelayedError(message.encode(), len(tensors))(  # pyright: ignore
        *(t.detach().requires_grad_() for t in tensors)
    )
    return made if isinstance(made, tuple) else (made,)
