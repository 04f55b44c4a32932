"""The layouts of expert weights in checkpoints: read into the merged parameters by `load_state_dict`, and written back.

- merged, ours and Hugging Face's: `experts.gate_up_proj (E, 2I, H)`, `experts.down_proj (E, H, I)`, stored as the
  layer's configuration says (concatenated or interleaved, transposed or not); loaded as it is.
- one tensor an expert, as on the Hub: `experts.{i}.gate_proj.weight (I, H)`, `.up_proj.weight (I, H)`,
  `.down_proj.weight (H, I)` (DeepSeek, Qwen, OLMoE), or `.w1`, `.w3`, `.w2` in that order (Mixtral); biases end in
  `.bias`.

A layer's experts and shapes are checked before anything is written to it: an expert that lacks a tensor, one too many
or a wrong shape raises `ValueError` and leaves the parameters as they were. Names that are absent or unknown are
torch's affair, an error unless `strict=False`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import resolve, split_gate_up
from .config import MoEConfig

# The names of gate, up and down, by the model that introduced them.
PER_EXPERT_NAMES: dict[str, tuple[str, str, str]] = {
    "llama": ("gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w3", "w2"),
}
_ROLE = {
    name: role for names in PER_EXPERT_NAMES.values() for role, name in zip(("gate", "up", "down"), names, strict=True)
}
_PER_EXPERT = re.compile(rf"(\d+)\.({'|'.join(_ROLE)})\.(weight|bias)")

# What other models call our modules and tensors: gpt-oss, Qwen2-MoE, HunYuan; MiniMax-M2, LFM2 (biases of the block).
_LAYER_NAMES = {
    "router.": "gate.", "shared_expert.": "shared_experts.", "shared_mlp.": "shared_experts.",
    "e_score_correction_bias": "gate.e_score_correction_bias", "expert_bias": "gate.e_score_correction_bias",
}  # fmt: skip
# DBRX, JetMoE; Switch, LongCat; Gemma 4; HunYuan; AFMoE; ERNIE
_ROUTER_NAMES = {"layer.": "", "classifier.": "", "proj.": "", "wg.": "", "gate.": "", "moe_statics.": ""}


def load_experts(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """`load_state_dict` pre-hook of `Experts`: put merged tensors in the place of per-expert ones; check."""
    merge_experts(state_dict, prefix, module.config)
    _check_shapes(module, state_dict, prefix)


def load_router(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """`load_state_dict` pre-hook of `Router`: rename; check."""
    _rename_router(state_dict, prefix)
    _check_shapes(module, state_dict, prefix)


def load_layer(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """`load_state_dict` pre-hook of `MoE`: rename, merge and check the whole layer before any of it is written."""
    _rename(state_dict, prefix, _LAYER_NAMES)
    _rename_router(state_dict, f"{prefix}gate.")
    merge_experts(state_dict, f"{prefix}experts.", module.config)
    _check_shapes(module, state_dict, prefix)


def _rename(state_dict: dict[str, Tensor], prefix: str, names: Mapping[str, str]) -> None:
    for theirs, ours in names.items():
        for key in [k for k in state_dict if k.startswith(prefix + theirs)]:
            new = prefix + ours + key.removeprefix(prefix + theirs)
            if new in state_dict:
                raise ValueError(f"{_who(prefix)}: one weight must have one name, got {key} beside {new}; remove one.")
            state_dict[new] = state_dict.pop(key)


def _rename_router(state_dict: dict[str, Tensor], prefix: str) -> None:
    _rename(state_dict, prefix, _ROUTER_NAMES)
    bias = state_dict.get(prefix + "e_score_correction_bias")
    if bias is not None and bias.dim() == 2 and bias.shape[0] == 1:  # ERNIE's, of one group of experts
        state_dict[prefix + "e_score_correction_bias"] = bias[0]


@torch.no_grad()
def merge_experts(state_dict: dict[str, Tensor], prefix: str, config: MoEConfig) -> None:
    """Replace the per-expert tensors under `prefix` by merged ones stored as `config` says; no-op if there are none.

    Raises:
        ValueError: an expert or one of its tensors is missing, surplus or of another shape, or both layouts are
            present. `state_dict` is then unchanged.
    """
    found = {key: m.groups() for key in state_dict
             if key.startswith(prefix) and (m := _PER_EXPERT.fullmatch(key.removeprefix(prefix)))}  # fmt: skip
    if not found:
        return
    sources: dict[tuple[int, str, str], Tensor] = {}
    for key, (index, name, kind) in found.items():
        slot = (int(index), _ROLE[name], kind)
        if slot in sources:
            raise ValueError(f"{_who(prefix)}: expert {index} must have one {slot[1]} {kind}, got two; remove {key}.")
        sources[slot] = state_dict[key]
    merged = {name: torch.empty(shape, dtype=like.dtype, device=like.device)
              for name, shape, like in _merged(prefix, config, sources)}  # fmt: skip
    for name in merged:
        if prefix + name in state_dict:
            raise ValueError(
                f"{_who(prefix)}: weights must come in one layout, got {prefix}{name} beside {next(iter(found))}."
            )
    for slot, view in _views(merged, config):
        view.copy_(sources[slot])
    for key in found:
        del state_dict[key]
    state_dict.update({prefix + name: tensor for name, tensor in merged.items()})


@torch.no_grad()
def split_experts(
    state_dict: Mapping[str, Tensor], config: MoEConfig, prefix: str = "experts.", names: str = "llama"
) -> dict[str, Tensor]:
    """The state dict with the merged expert tensors under `prefix` as one tensor an expert, as checkpoints on the Hub.

    Args:
        state_dict: of a layer (`prefix="experts."`), of an `Experts` (`prefix=""`) or of a model around it.
        config: the layer's, which says how the merged tensors are stored.
        names: a key of `PER_EXPERT_NAMES`.

    Returns:
        A new dict; tensors are contiguous copies for the experts and the same objects for everything else.
    """
    if names not in PER_EXPERT_NAMES:
        raise ValueError(f"split_experts: names must be one of {', '.join(PER_EXPERT_NAMES)}, got {names!r}.")
    called: dict[str, str] = dict(zip(("gate", "up", "down"), PER_EXPERT_NAMES[names], strict=True))
    wanted = dict(_shapes(config))
    for name, shape in wanted.items():
        have = state_dict.get(prefix + name)
        if have is None or tuple(have.shape) != shape:
            got = "nothing" if have is None else tuple(have.shape)
            raise ValueError(
                f"split_experts: {prefix}{name} must have shape {shape}, got {got}; check prefix and config."
            )
    merged = {name: state_dict[prefix + name] for name in wanted}
    out = {key: t for key, t in state_dict.items() if key not in {prefix + name for name in wanted}}
    for (index, role, kind), view in _views(merged, config):
        out[f"{prefix}{index}.{called[role]}.{kind}"] = view.clone(memory_format=torch.contiguous_format)
    return out


# ---------------------------------------------------------------- the layout, for reading and writing alike
def _shapes(config: MoEConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each merged tensor."""
    act = resolve(config.activation)
    E, H, I = config.num_experts, config.hidden_size, config.intermediate_size
    for name, rows, columns in (("gate_up_proj" if act.gated else "up_proj", act.width(I), H), ("down_proj", H, I)):
        yield name, (E, columns, rows) if config.transposed else (E, rows, columns)
        if config.expert_bias:
            yield f"{name}_bias", (E, rows)


def _views(merged: Mapping[str, Tensor], config: MoEConfig) -> Iterator[tuple[tuple[int, str, str], Tensor]]:
    """`(expert, role, kind)` and its view of the merged tensors: weights as (out, in), whatever the storage."""
    gated = resolve(config.activation).gated
    for name, tensor in merged.items():
        kind = "bias" if name.endswith("_bias") else "weight"
        # outputs last, where gate and up are told apart
        outputs_last = tensor if kind == "bias" or config.transposed else tensor.mT
        if name.startswith("down_proj"):
            parts = {"down": outputs_last}
        elif gated:
            parts = dict(zip(("gate", "up"), split_gate_up(outputs_last, config.layout == "interleaved"), strict=True))
        else:
            parts = {"up": outputs_last}
        for role, part in parts.items():
            for e in range(config.num_experts):
                yield (e, role, kind), part[e] if kind == "bias" else part[e].mT


def _merged(prefix: str, config: MoEConfig, sources: Mapping[tuple[int, str, str], Tensor]):
    """Name, shape and a source tensor of each merged tensor, after checking that every source is there and fits."""
    who = _who(prefix)
    shapes = dict(_shapes(config))
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    need = {slot: tuple(view.shape) for slot, view in _views(meta, config)}
    if missing := [slot for slot in need if slot not in sources]:
        experts = sorted({e for e, _, _ in missing})
        _, role, kind = missing[0]
        raise ValueError(
            f"{who}: each of the {config.num_experts} experts must have all its tensors; missing for experts "
            f"{experts}, first the {role} {kind} of expert {experts[0]}."
        )
    if surplus := [slot for slot in sources if slot not in need]:
        e, role, kind = surplus[0]
        raise ValueError(
            f"{who}: the layer has {config.num_experts} experts, activation {resolve(config.activation).name!r} and "
            f"expert_bias={config.expert_bias}; got the {role} {kind} of expert {e}, which has no place in it."
        )
    for slot, shape in need.items():
        if tuple(sources[slot].shape) != shape:
            e, role, kind = slot
            raise ValueError(
                f"{who}: {role} {kind} of expert {e} must have shape {shape}, got {tuple(sources[slot].shape)}."
            )
    # every merged tensor starts with the part of expert 0 that is its own
    first = {name: next(slot for slot, _ in _views({name: t}, config)) for name, t in meta.items()}
    for name, shape in shapes.items():
        yield name, shape, sources[first[name]]


def _check_shapes(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Raise one `ValueError` for all that does not fit, before torch writes what does."""
    own = (*module.named_parameters(), *module.named_buffers())
    pairs = [(name, t.shape, state_dict[prefix + name].shape) for name, t in own if prefix + name in state_dict]
    if faults := [
        f"{name} must have shape {tuple(want)}, got {tuple(got)}" for name, want, got in pairs if want != got
    ]:
        raise ValueError(f"{_who(prefix)}: {'; '.join(faults)}; check the configuration (sizes, layout, transposed).")


def _who(prefix: str) -> str:
    return f"load_state_dict({prefix.removesuffix('.')})" if prefix else "load_state_dict"
