"""Op: an operator's registration with torch, its implementations in written order, and the only choice between them.

An operator is described once, by name: Operands and Outputs (NamedTuples of tensors), Options (a NamedTuple of plain
values), Problem (what choosing depends on). From these come its schema, its shapes for tracing and its autograd.

An implementation is a module `_<name>.py` in the operator's folder: `NEEDS` ("triton", "compiler" or nothing),
`why_not(problem) -> str | None`, pure and device-free, `forward(operands, problem) -> (outputs, saved by name)`, and
`backward(grads, operands, saved, problem, needs) -> gradients by name`. Choice takes the first that gives no reason
against; a forced one that cannot run raises `Unsupported` with its reason. Nothing is tried and caught.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re
import threading
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
from torch import Tensor

from . import hardware
from .errors import Unsupported
from .guards import eager, outside_autocast, refusing, watch
from .launcher import together

OPS: dict[str, Op] = {}
# `.forced` is what `use` forces in this thread; operators carry it, so that a backward agrees. A tracer can read it.
_thread = threading.local()
_library = torch.library.Library("moesaic", "DEF")

Table = Annotated[Tensor, "table"]  # an operand or output that no gradient flows through
Size = Annotated[int, "size"]  # an option that may vary from call to call, as a symbol too
_SCHEMA: dict[Any, str] = {int: "int", float: "float", bool: "bool", str: "str", Size: "SymInt"}
_SCHEMA |= {Tensor: "Tensor", Table: "Tensor", Tensor | None: "Tensor?", Annotated[Tensor, "table"] | None: "Tensor?"}  # pyright: ignore


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

    problem: Any
    reasons: tuple[tuple[str, str | None], ...]
    details: tuple[str, ...] = ()

    @property
    def chosen(self) -> str | None:
        return next((name for name, reason in self.reasons if reason is None), None)

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for name, reason in self.reasons:
            state = "chosen" if name == self.chosen else ("can run" if reason is None else f"no: {reason}")
            lines.append(f"  {name:<10} {state}")
            lines += [f"  {'':<10}   {line}" for line in self.details if name == self.chosen]
        return "\n".join(lines)


@dataclass(frozen=True)
class Place:
    """Where a call runs: what every operator's Problem begins with."""

    device: str = "cpu"
    gpu: hardware.Gpu = hardware.INTERPRETED
    dtype: torch.dtype = torch.float32
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)  # plans, kept with it

    @property
    def arch(self) -> str:
        return self.gpu.arch if self.device == "cuda" else self.device

    def __str__(self) -> str:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__qualname__.removesuffix("Problem")).lower()
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.compare and value != f.default:
                parts.append(f"{f.name}={value.name or value.arch if f.name == 'gpu' else value}".replace("torch.", ""))
        return f"{name}({', '.join(parts)})"


def octave(n: int) -> int:
    """The power of two that is not below n, 0 for none: what choosing an implementation sees of a number of tokens."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


class Op:
    """An operator. `implementations` is the order of preference; the last should run everywhere.

    Args:
        operands, options, outputs, saved: its description, NamedTuples by whose fields all is wired. A field of `saved`
            that is not an output's name is a tensor that a forward keeps for the backward alone.
        problem: a subclass of Place, what choosing depends on. Its fields are those of `describe`, the options,
            `training` and `kernel`, as far as it has them.
        describe: names of the problem's fields, and a function of operands and options that gives their values: plain,
            and free of how many tokens there are, but for buckets of them.
        fake: a function of operands and options that gives empty outputs; `fake_saved` the empty tensors kept.
        straight: operands whose gradient is that of the first output.
        twice: the backward in operations that have derivatives, `(grads, operands, saved, options, implementation,
            needs) -> gradients by name`; without it a second derivative is refused by name.
        calls: names of an implementation's forward and backward; without a backward, `twice` is all there is.
    """

    def __init__(
        self, name: str, package: str, implementations: tuple[str, ...], *, operands: Any, options: Any,
        outputs: Any, problem: Any, describe: tuple[tuple[str, ...], Callable[..., tuple[Any, ...]]],
        fake: Callable[..., Any], saved: Any = None, fake_saved: Callable[..., Any] | None = None,
        straight: tuple[str, ...] = (), twice: Callable[..., Any] | None = None,
        calls: tuple[str, str] = ("forward", "backward"), differentiable: bool = True,
    ):  # fmt: skip
        self.name, self.package, self.implementations, self.calls = name, package, implementations, calls
        self.operands, self.options, self.outputs, self.problem = operands, options, outputs, problem
        self.described, self.describe = describe
        self.fake, self.fake_saved, self.straight, self.twice = fake, fake_saved, straight, twice
        hints = typing.get_type_hints(operands, include_extras=True)
        made = typing.get_type_hints(outputs, include_extras=True)
        self.gradients = tuple(n for n, hint in hints.items() if differentiable and not _is_table(hint))
        self.flowing = tuple(n for n, hint in made.items() if not _is_table(hint))
        self.saved: tuple[str, ...] = saved._fields if saved else ()
        self.kept = tuple(n for n in self.saved if n not in outputs._fields)
        self._saved_type, self._known = saved, {f.name for f in fields(problem) if f.compare}
        self.plan = functools.lru_cache(maxsize=4096)(self._plan)
        OPS[name] = self
        self._register(hints)

    # ------------------------------------------------------------ choice
    def implementation(self, name: str) -> ModuleType:
        """The module of one implementation, imported now if it was not."""
        if name not in self.implementations:
            raise Unsupported(f"{self.name}: no implementation {name!r}; there are {', '.join(self.implementations)}.")
        return importlib.import_module(f"{self.package}._{name}")

    def why_not(self, name: str, problem: Any) -> str | None:
        """Why `name` cannot run `problem`, or None."""
        if needs(self.package, name) == "triton":  # asked before the module is imported, since it imports triton
            if reason := hardware.triton_why_not(problem.device, problem.arch):
                return reason
        return self.implementation(name).why_not(problem)

    def select(self, problem: Any, name: str = "") -> ModuleType:
        """The module that runs a problem: the one of that name, or the first that can."""
        have = self.implementations
        if name:
            known = name in have
            reason = self.why_not(name, problem) if known else f"there is none of that name, only {', '.join(have)}"
            if reason:
                raise Unsupported(
                    f"{self.name}: implementation {name!r} cannot run: {reason}. It was asked: {problem}."
                )
            return self.implementation(name)
        reasons: list[str] = []
        for candidate in have:
            reason = self.why_not(candidate, problem)
            if reason is None:
                return self.implementation(candidate)
            reasons.append(f"{candidate}: {reason}")
        raise Unsupported(f"{self.name}: no implementation can run. {'; '.join(reasons)}. It was asked: {problem}.")

    def explain(self, problem: Any) -> Explanation:
        reasons = tuple((n, self.why_not(n, problem)) for n in self.implementations)
        chosen = next((n for n, reason in reasons if reason is None), None)
        details = getattr(self.implementation(chosen), "details", None) if chosen else None
        return Explanation(problem, reasons, tuple(details(problem)) if details else ())

    def _plan(self, device: torch.device, described: tuple[Any, ...], options: tuple[Any, ...], training: bool,
              implementation: str) -> tuple[ModuleType, Any, bool]:  # fmt: skip
        """`(module, problem, does it launch Triton kernels?)` of a call, cached on plain values."""
        name, _, kernel = implementation.partition(":")
        values = dict(zip(self.described, described, strict=True)) | self.options._make(options)._asdict()
        values |= dict(device=device.type, gpu=hardware.gpu_of(device), training=training, kernel=kernel)
        problem = self.problem(**{n: v for n, v in values.items() if n in self._known})
        module = self.select(problem, name)
        return module, problem, needs(self.package, module.__name__.rpartition("._")[2]) == "triton"

    # ------------------------------------------------------------ calls
    def __call__(self, operands: Any, options: Any, implementation: str | None = None) -> Any:
        """The operator's outputs. Where nobody is watching and no gradient is kept, without the dispatcher's time."""
        if not (quiet := eager(operands)) and self.gradients:
            watch(self.name, *operands)
        keep = recorded = False
        if torch.is_grad_enabled():
            for name in self.gradients:
                t = getattr(operands, name)
                if t is not None and t.requires_grad:
                    recorded = True
                    keep = keep or name not in self.straight
        name = forced(implementation)
        if quiet and not recorded:
            return self.outputs(*self._run(operands, options, keep, name)[0])
        out = getattr(torch.ops.moesaic, self.name)(*operands, *options, keep, name)
        return self.outputs(*(out if isinstance(out, (tuple, list)) else (out,))[: len(self.outputs._fields)])

    def _run(self, operands: Any, options: Any, keep: bool, implementation: str) -> tuple[Any, Any]:
        """`(outputs, saved)` of the implementation that is chosen."""
        device, described = operands[0].device, self.describe(operands, options)
        module, problem, triton = self.plan(device, described, options, keep, implementation)
        call = getattr(module, self.calls[0])
        if triton:  # autocast does not reach Triton's kernels
            return together(call, operands, problem)
        with outside_autocast(device):
            return call(operands, problem)

    # ------------------------------------------------------------ registration
    def _register(self, hints: dict[str, Any]) -> None:
        n, m = len(hints), len(self.options._fields)
        option_hints = typing.get_type_hints(self.options, include_extras=True)
        operands = "".join(f"{_SCHEMA[hint]} {name}, " for name, hint in hints.items())
        options = "".join(f"{_SCHEMA[hint]} {name}, " for name, hint in option_hints.items())

        def parts(arguments: tuple[Any, ...]) -> tuple[Any, Any]:
            return self.operands(*arguments[:n]), self.options(*arguments[n : n + m])

        def nothing(like: Any) -> Tensor:
            return like[0].new_empty(0)

        def call(*arguments: Any) -> Any:
            given, chosen = parts(arguments)
            out, saved = self._run(given, chosen, *arguments[n + m :])
            kept = (nothing(given) if saved is None else saved[name] for name in self.kept)
            return _flat((*out, *kept))

        def fake(*arguments: Any) -> Any:
            given, chosen = parts(arguments)
            saved = self.fake_saved(given, chosen) if self.fake_saved and arguments[n + m] else None
            kept = (nothing(given) if saved is None else getattr(saved, name) for name in self.kept)
            return _flat((*self.fake(given, chosen), *kept))

        returns = _returns(len(self.outputs._fields) + len(self.kept))
        _define(f"{self.name}({operands}{options}bool keep, str implementation) -> {returns}", call, fake)
        if self.gradients:
            if self.calls[1]:
                self._register_backward(operands, options, parts, nothing)
            self._register_autograd(n, m)

    def _register_backward(self, operands: str, options: str, parts: Callable[..., Any], nothing: Any) -> None:
        """The second operator: `(gradients of the outputs, operands, saved, options, needs) -> gradients`."""
        f, k = len(self.flowing), len(self.saved)
        n = f + len(self.operands._fields)

        def named(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            given, chosen = parts((*arguments[f:n], *arguments[n + k :]))
            grads = dict.fromkeys(self.outputs._fields) | dict(zip(self.flowing, arguments[:f], strict=True))
            saved = self._saved_type(*arguments[n : n + k]) if k else None
            return self.outputs(**grads), given, saved, chosen, self._needs(arguments[-2])

        def call(*arguments: Any) -> Any:
            grads, given, saved, chosen, wanted = named(arguments)
            device, described = given[0].device, self.describe(given, chosen)
            module, problem, triton = self.plan(device, described, chosen, True, arguments[-1])
            backward, rest = getattr(module, self.calls[1]), (grads, given, saved, problem, wanted)
            with outside_autocast(device):
                made = together(backward, *rest) if triton else backward(*rest)
            return _flat(tuple(made[g] if getattr(wanted, g) else nothing(given) for g in self.gradients))

        def fake(*arguments: Any) -> Any:
            _, given, _, _, wanted = named(arguments)
            like = (getattr(given, g) for g in self.gradients)
            return _flat(tuple(
                nothing(given) if not getattr(wanted, g) else t.new_empty(t.shape)
                for g, t in zip(self.gradients, like, strict=True)
            ))  # fmt: skip

        grads = "".join(f"Tensor? grad_{name}, " for name in self.flowing)
        saved = "".join(f"Tensor saved_{name}, " for name in self.saved)
        returns = _returns(len(self.gradients))
        schema = f"{self.name}_backward({grads}{operands}{saved}{options}bool[] needs, str implementation) -> {returns}"
        _define(schema, call, fake)

    def _needs(self, needs: Any) -> Any:
        wanted = dict(zip(self.gradients, needs, strict=True))
        return self.operands(**dict.fromkeys(self.operands._fields, False) | wanted)

    def _register_autograd(self, n: int, m: int) -> None:
        outputs = self.outputs._fields
        at = {name: i for i, name in enumerate((*outputs, *self.kept))}
        places = [self.operands._fields.index(name) for name in self.gradients]

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            made = output if isinstance(output, (tuple, list)) else (output,)
            ctx.options, keep, ctx.implementation = inputs[n : n + m], *inputs[n + m :]
            if keep:
                ctx.save_for_backward(*inputs[:n], *(made[at[name]] for name in self.saved))
            ctx.mark_non_differentiable(*(t for name, t in zip(at, made, strict=True) if name not in self.flowing))
            ctx.set_materialize_grads(False)  # an output that nobody took costs nothing

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            needs = [ctx.needs_input_grad[place] for place in places]
            flowing = dict(zip(at, grads, strict=True))
            flowing = {name: None if flowing[name] is None else flowing[name].contiguous() for name in self.flowing}
            first = next(iter(flowing.values()))
            out: dict[str, Any] = dict.fromkeys(self.straight, first)
            tensors = ctx.saved_tensors  # once: checkpointing unpacks them
            if tensors and any(g is not None for g in flowing.values()):
                out = self._gradients(ctx, tensors, n, flowing, needs) | out
            wanted = dict(zip(self.gradients, needs, strict=True))
            named = (out.get(name) if wanted.get(name) else None for name in self.operands._fields)
            return (*named, *[None] * (m + 2))

        formula = backward if self.twice else _once(self.name, backward)
        torch.library.register_autograd(f"moesaic::{self.name}", formula, setup_context=setup, lib=_library)

    def _gradients(
        self, ctx: Any, tensors: tuple[Any, ...], n: int, flowing: dict[str, Any], needs: list[bool]
    ) -> dict[str, Any]:
        needs = [need and g not in self.straight for g, need in zip(self.gradients, needs, strict=True)]
        if self.twice and (torch.is_grad_enabled() or not self.calls[1]):  # somebody will differentiate this
            grads = self.outputs(**dict.fromkeys(self.outputs._fields) | flowing)
            saved = self._saved_type(*tensors[n:]) if self.saved else None
            options = self.options(*ctx.options)
            return self.twice(
                grads, self.operands(*tensors[:n]), saved, options, ctx.implementation, self._needs(needs)
            )
        operator = getattr(torch.ops.moesaic, f"{self.name}_backward")
        made = operator(*flowing.values(), *tensors, *ctx.options, needs, ctx.implementation)
        return dict(zip(self.gradients, made if isinstance(made, (tuple, list)) else (made,), strict=True))


def _is_table(hint: Any) -> bool:
    return Table in (hint, *typing.get_args(hint))


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _flat(tensors: tuple[Any, ...]) -> Any:
    return tensors if len(tensors) > 1 else next(iter(tensors))


def _define(schema: str, call: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the private operator `moesaic::<schema>`: one kernel for every device that torch has, and its shapes.

    The low-level `Library` is used because a call through `torch.library.custom_op` costs about twice as much.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moesaic::{name}", fake, lib=_library)


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """A formula whose results raise by name when somebody differentiates them again."""

    def once(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # nobody asked for a graph
            return out
        message = (
            f"{name}: its gradient must not be differentiated again, got a backward through it; drop create_graph=True "
            "there, or compute this part with torch's own operations."
        )
        places = [i for i, g in enumerate(out) if g is not None]
        marked = dict(zip(places, refusing(message, [out[i] for i in places]), strict=True))
        return tuple(marked.get(i) for i in range(len(out)))

    return once


@functools.cache
def needs(package: str, name: str) -> str:
    """What an implementation needs, read from its file: importing it would import what may not be there."""
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    found = re.search(r'^NEEDS = "(\w*)"', (folder / f"_{name}.py").read_text(), re.MULTILINE)
    return found[1] if found else ""


def explain(op: str, **given: Any) -> Explanation:
    """The table of `op`'s implementations for a problem, with the reason against each that cannot run.

    Args:
        op: `"route"`, `"permute"`, `"unpermute"`, `"grouped_matmul"` or `"fused_experts"`.
        given: fields of the call in question, e.g. `explain("fused_experts", device="cpu", num_tokens=512)`. A GPU that
            is not there is described by its name, `gpu="H200"`, or by `arch="sm_90"`.
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}.")
    problem = OPS[op].problem
    if "arch" in given or isinstance(given.get("gpu"), str):
        given["gpu"] = hardware.gpu_named(given.pop("gpu", ""), given.pop("arch", ""))
    known = [f.name for f in fields(problem) if f.compare]
    if stray := [name for name in given if name not in known]:
        raise ValueError(f"explain: fields of {op} are {', '.join(known)}, got {', '.join(stray)}.")
    if given.get("device") == "cuda" and "gpu" not in given:
        given["gpu"] = hardware.gpu_of(torch.device("cuda"))
    return OPS[op].explain(problem(**given))
