"""moesaic.nn: the layer as torch modules, `MoE(MoEConfig.preset("qwen3-moe"))`, with Hugging Face's parameter names."""

from .balance import BiasBalancer
from .config import PRESETS, MoEConfig
from .losses import attach_losses
from .modules import Experts, MoE, Router, SharedExperts
from .passing import RouterOutput, routing_of
from .state_dict import PER_EXPERT_NAMES, split_experts

__all__ = [
    "PER_EXPERT_NAMES",
    "PRESETS",
    "BiasBalancer",
    "Experts",
    "MoE",
    "MoEConfig",
    "Router",
    "RouterOutput",
    "SharedExperts",
    "attach_losses",
    "routing_of",
    "split_experts",
]
