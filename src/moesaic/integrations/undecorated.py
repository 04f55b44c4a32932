"""Classes of experts that transformers does not dispatch, reached through transformers' own patch mapping.

Their models accept `experts_implementation="moesaic"` and would run as before. `register` puts a subclass of each into
the mapping, which `from_pretrained` and `from_config` build instead; parameters, names and checkpoints stay. Where the
model asks for "moesaic" the subclass runs our operators, or, where we have none for its weights, says so once; for any
other implementation it does what its parent does. A model that was built by calling its class is not patched.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.fused_experts import fused_experts
from ..ops.grouped_matmul import grouped_matmul
from ..ops.permute import permute, unpermute
from ..routing import Routing
from .recognise import scalar_gate

__all__ = ["UNDECORATED", "Undecorated", "entry_of", "register"]

NAME = "moesaic"


@dataclass(frozen=True)
class Undecorated:
    """A class of `transformers.models.<model>`: `run(module, *arguments)` stands for its forward, None where nothing
    does; `why` says in words how it runs, or why it does not; `flags` are set on the module for the report."""

    model: str
    name: str
    run: Callable[..., Any] | None
    why: str
    flags: tuple[tuple[str, bool], ...] = ()


# ---------------------------------------------------------------- what runs them
def _layer(x: Tensor, w_up: Tensor, w_down: Tensor, routing: Routing, act: Any, **options: Any) -> Tensor:
    """A layer of experts with `[gate | up]` halves, fused where `act(gate)·up` is an entry of ACTIVATIONS."""
    if entry := scalar_gate(act):
        return fused_experts(x.to(w_down.dtype), w_up, w_down, routing, activation=entry, **options)
    gate, up = grouped_matmul(permute(x.to(w_down.dtype), routing), w_up, routing).chunk(2, dim=-1)
    return unpermute(grouped_matmul(act(gate) * up, w_down, routing), routing)


def _standard(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    from .transformers import experts_forward

    return experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def _dbrx(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Gate and up are two parameters `(E·I, H)`, so their products are two; down is stored input-major."""
    E, I, H = experts.num_experts, experts.ffn_hidden_size, experts.hidden_size
    mlp = experts.mlp
    gate, up, down = (w.view(E, I, H) for w in (mlp.w1, mlp.v1, mlp.w2))
    routing = Routing.from_topk(top_k_weights, top_k_index, E)
    rows = permute(hidden_states.reshape(-1, H).to(gate.dtype), routing)
    rows = mlp.activation_fn(grouped_matmul(rows, gate, routing)) * grouped_matmul(rows, up, routing)
    y = unpermute(grouped_matmul(rows, down, routing, transposed=True), routing)
    return y.to(hidden_states.dtype).view(hidden_states.shape[0], -1, H)


def _jetmoe(moe: Any, layer_input: Tensor) -> Tensor:
    """The router is called as it is, for its hooks; the choice is made again from its logits."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    logits = moe.router(x)[-1]
    values, ids = logits.topk(moe.router.top_k, dim=1)
    weights = torch.softmax(values, dim=1).type_as(x)
    routing = Routing.from_topk(weights, ids, moe.input_linear.num_experts)
    y = _layer(x, moe.input_linear.weight, moe.output_linear.weight, routing, moe.activation)
    return y.to(x.dtype).view(layer_input.shape) + moe.bias


def _longcat(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Ids from `num_routed_experts` on are identity experts; `gate_up_proj` has unused matrices for them."""
    E = experts.num_routed_experts
    identity = top_k_index >= E
    weight = torch.where(identity, top_k_weights, 0).sum(1, keepdim=True)
    y = hidden_states * weight
    if experts.gate_up_proj is not None:
        routing = Routing.from_topk(top_k_weights, top_k_index.masked_fill(identity, -1), E)
        y = y + _layer(hidden_states, experts.gate_up_proj[:E], experts.down_proj, routing, experts.act_fn)
    return y.to(hidden_states.dtype)


def _llama4(moe: Any, hidden_states: Tensor) -> Any:
    """transformers runs every expert on every token; here each token runs through its own, weighted on the input."""
    x = hidden_states.reshape(-1, moe.hidden_dim)
    scores, logits = moe.router(x)
    ids = logits.topk(moe.top_k, dim=1).indices
    routing = Routing.from_topk(scores.gather(1, ids), ids, moe.num_experts)
    experts = moe.experts
    if not (entry := scalar_gate(experts.act_fn)):
        return NotImplemented
    y = fused_experts(
        x.to(experts.down_proj.dtype), experts.gate_up_proj, experts.down_proj, routing, activation=entry,
        weights_on="input", transposed=True,
    )  # fmt: skip
    return moe.shared_expert(x) + y.to(x.dtype), logits


_SWITCH = "each of its experts is a module of its own, whose weights would have to be stacked at every call"
_STORED = (("has_gate", True), ("has_bias", False), ("is_transposed", False), ("is_concatenated", True))
UNDECORATED = (
    Undecorated("dbrx", "DbrxExperts", _dbrx, "gate and up are two matrices, so they are two grouped products"),
    Undecorated("jetmoe", "JetMoeMoE", _jetmoe, "the feed-forward experts; those of its attention run as before"),
    Undecorated("llama4", "Llama4TextMoe", _llama4, "routing weights on the input"),
    Undecorated("longcat_flash", "LongcatFlashExperts", _longcat, "identity experts are added apart"),
    Undecorated("step3p7", "Step3p7Experts", _standard, "as transformers' dispatched classes", _STORED),
    Undecorated("doge", "DogeCDMoE", None, "its experts are rows of an embedding, not matrices"),
    Undecorated("nllb_moe", "NllbMoeExperts", None, _SWITCH),
    Undecorated("switch_transformers", "SwitchTransformersExperts", None, _SWITCH),
)


# ---------------------------------------------------------------- the patches
_patched: dict[type, Undecorated] = {}
_warned: set[str] = set()


def entry_of(module: nn.Module) -> Undecorated | None:
    """The entry that a module was built for, or None where its class is not one of the subclasses made here."""
    return _patched.get(type(module))


def register() -> None:
    """Put a subclass of every class in the table into transformers' patch mapping.

    Classes that this release of transformers lacks are left out. A caller's own entry for a class, under its plain
    name, takes precedence over ours. Harmless to repeat.
    """
    from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

    taken = get_patch_mapping()
    for entry in UNDECORATED:
        path = f"transformers.models.{entry.model}"
        if _pattern(entry.name) in taken or importlib.util.find_spec(path) is None:
            continue
        modeling = importlib.import_module(f"{path}.modeling_{entry.model}")
        original = getattr(modeling, entry.name, None)
        if original is None or hasattr(original.forward, "__wrapped__"):
            continue  # another release: absent, or dispatched by transformers itself
        register_patch_mapping({_pattern(entry.name): _subclass(original, entry)})
        for base in vars(modeling).values():  # else a later set_experts_implementation() is ignored
            if (
                isinstance(base, type)
                and base.__name__.endswith("PreTrainedModel")
                and base.__module__ == original.__module__
            ):
                base._can_set_experts_implementation_cached_value = True
    if _pattern("DbrxFFN") not in taken:
        _adopt_dbrx(register_patch_mapping)


def _pattern(name: str) -> str:
    """A key of the mapping that matches one class: a plain name is searched for inside others (DbrxFFNConfig)."""
    return f"^{name}$"


def _subclass(original: type, entry: Undecorated) -> type:
    class Patched(original):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            original.__init__(self, config, *args, **kwargs)
            self.config = config
            for name, value in entry.flags:
                setattr(self, name, value)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if getattr(self.config, "_experts_implementation", None) == NAME:
                out = NotImplemented if entry.run is None else entry.run(self, *args, **kwargs)
                if out is not NotImplemented:
                    return out
                _warn(entry)
            return original.forward(self, *args, **kwargs)

    return _keep(Patched, original, entry)


def _keep(made: type, original: type, entry: Undecorated | None) -> type:
    """Name a subclass after its parent, and keep it where pickle finds it."""
    made.__name__ = made.__qualname__ = original.__name__
    made.__module__ = __name__
    globals()[original.__name__] = made
    if entry:
        _patched[made] = entry
    return made


def _adopt_dbrx(register_patch_mapping: Callable) -> None:
    """DbrxExperts is given a part of the configuration, which a later `set_experts_implementation` does not reach."""
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN as original

    class Patched(original):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            original.__init__(self, config, *args, **kwargs)
            self.experts.config = config

    register_patch_mapping({_pattern("DbrxFFN"): _keep(Patched, original, None)})


def _warn(entry: Undecorated) -> None:
    if entry.name not in _warned and not torch.compiler.is_compiling():
        _warned.add(entry.name)
        why = entry.why if entry.run is None else "its activation is not in ACTIVATIONS"
        warnings.warn(
            f"moesaic: {entry.name} runs transformers' own code although experts_implementation='moesaic' "
            f"was asked for: {why}.",
            stacklevel=4,
        )
