"""Auxiliary-loss-free balancing for transformers' models: `Trainer(..., callbacks=[BiasBalancingCallback()])`.

Models of DeepSeek-V3's kind carry a bias that takes part in the choice of experts alone (`e_score_correction_bias`),
and their training code leaves it as it is. Here `moesaic.nn.BiasBalancer` moves it. Any router will do whose bias is a
buffer or parameter of that name: DeepSeek-V3 and V4, GLM-4-MoE, Kimi, dots.1, Nemotron-H, MiniMax-M2 (whose bias
belongs to the block), ERNIE 4.5 (to a module of its own), and models with an `expert_bias`, as AFMoE and LFM2-MoE.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import MissingExtra
from ..nn.balance import BiasBalancer
from ..ops.route import RouterConfig, route

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtra("transformers >= 5.17", "hf", "moesaic.integrations.balance") from error

__all__ = ["BIAS_NAMES", "BiasBalancingCallback", "bias_balancer"]

BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


def bias_balancer(
    model: nn.Module, *, rate: float = 1e-3, rule: str = "sign", centre: bool = True, group: Any = None,
    names: tuple[str, ...] = BIAS_NAMES,
) -> BiasBalancer:  # fmt: skip
    """A `BiasBalancer` of every selection bias in a transformers model, for training loops of one's own.

    Around each bias the module that holds it, that module's children and its parent are watched. The choices are the
    integer tensor among a module's outputs; where none of them returns one, they are made again from the logits with
    the bias, as the model's configuration says (top-k, score, groups).

    Args:
        model: from transformers, in any wrapper that keeps its modules.
        rate, rule, centre, group: see `BiasBalancer`.
        names: what the bias may be called.

    Raises:
        ValueError: the model has no such bias.
    """
    balancer = BiasBalancer(rate=rate, rule=rule, centre=centre, group=group)
    parents = {id(child): module for module in model.modules() for child in module.children()}
    config = _config(model)
    found = False
    for path, owner, attribute in _biases(model, names):
        around = [owner, *owner.children()]
        if id(owner) in parents:
            around.append(parents[id(owner)])
        name = f"{path}.{attribute}" if path else attribute
        balancer.watch(name, owner, attribute, around, (_ids, functools.partial(_from_logits, config)))
        found = True
    if not found:
        raise ValueError(
            f"bias_balancer: model must have a selection bias named {' or '.join(names)}, got "
            f"{type(model).__name__} without one; balance it with a loss, as load_balancing_loss."
        )
    return balancer


class BiasBalancingCallback(TrainerCallback):
    """Moves the selection biases of the trained model at the end of every optimizer step (see `BiasBalancer`).

    Counts cover all micro-batches of a gradient accumulation and, where `torch.distributed` is initialised, all ranks;
    evaluation does not count, nor does the recomputation of gradient checkpointing. Biases are saved with the model.

    Args:
        rate, rule, centre: see `BiasBalancer`. The paper's rate is 0.001; of a model already balanced that is to learn
            new data, a smaller one keeps more of its routing.
        group: process group to sum over; by default all ranks.
        names: what the bias may be called.

    Attributes:
        balancer: the `BiasBalancer` while training, with the `loads` of the last step; else None.
    """

    balancer: BiasBalancer | None

    def __init__(
        self, rate: float = 1e-3, *, rule: str = "sign", centre: bool = True, group: Any = None,
        names: tuple[str, ...] = BIAS_NAMES,
    ):  # fmt: skip
        self.settings: dict[str, Any] = dict(rate=rate, rule=rule, centre=centre)
        self.group, self.names, self.balancer = group, names, None
        BiasBalancer(**self.settings)  # checks them now rather than when training starts
        self._warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        group = self.group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.balancer = bias_balancer(kwargs["model"], group=group, names=self.names, **self.settings)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.balancer is not None
        if not self._warned and (unseen := self.balancer.unseen):
            self._warned = True
            warnings.warn(
                f"BiasBalancingCallback: no choices were seen in this step for {', '.join(unseen)}; their biases stay. "
                "Either these layers did not run, or no module around them returns the chosen experts.",
                stacklevel=2,
            )
        self.balancer.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.balancer is not None:
            self.balancer.remove()
            self.balancer = None


# ---------------------------------------------------------------- finding biases and choices
def _biases(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, str]]:
    """`(path, module, attribute)` of every selection bias."""
    for path, module in model.named_modules():
        for attribute in names:
            tensor = module._buffers.get(attribute, module._parameters.get(attribute))
            if tensor is not None and tensor.is_floating_point():
                yield path, module, attribute


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _tensors(output: Any) -> list[Tensor]:
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else (output,)
    return [item for item in items if isinstance(item, Tensor)]


def _ids(output: Any, bias: Tensor) -> Tensor | None:
    """The chosen experts among a router's outputs: integers, whatever their place."""
    for tensor in _tensors(output):
        if tensor.dim() >= 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            return tensor
    return None


def _from_logits(config: Any, output: Any, bias: Tensor) -> Tensor | None:
    """The choice made again, for a router that returns its logits `(T, E)` alone."""
    E, top_k = bias.numel(), _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
    logits = next((t for t in _tensors(output) if t.dim() == 2 and t.shape[1] == E and t.is_floating_point()), None)
    if logits is None or top_k is None:
        return None
    score = _first(config, "scoring_func", "score_function", "moe_router_activation_func")
    groups, kept = _first(config, "n_group", "num_expert_group"), _first(config, "topk_group")
    fields = RouterConfig(
        top_k=top_k, score=score if score in ("softmax", "sqrt_softplus") else "sigmoid", order="pre",
        num_groups=groups or 1, topk_groups=kept or 1, group_mask_value=0.0 if groups else float("-inf"),
    )  # fmt: skip
    return route(logits.detach(), fields, bias=bias.detach().reshape(-1)).topk_ids


def _first(config: Any, *names: str) -> Any:
    """The first of these attributes that the configuration has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
