"""moesaic: Mixture-of-Experts operators for PyTorch that train and serve, on GPU and CPU."""

from . import flops as flops
from . import nn as nn
from . import testing as testing
from .activations import ACTIVATIONS, Activation
from .errors import MissingExtra, Unsupported
from .op import explain, use
from .ops.fused_experts import fused_experts
from .ops.grouped_matmul import grouped_matmul
from .ops.permute import permute, unpermute
from .ops.route import (
    RouterConfig,
    cross_entropy_balance_loss,
    device_balance_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    route,
    sequence_balance_loss,
    uniform_cross_entropy_loss,
    z_loss,
)
from .routing import Routing
from .tuning import tune, warmup

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "MissingExtra",
    "RouterConfig",
    "Routing",
    "Unsupported",
    "cross_entropy_balance_loss",
    "device_balance_loss",
    "explain",
    "fused_experts",
    "grouped_matmul",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "nn",
    "permute",
    "route",
    "sequence_balance_loss",
    "testing",
    "tune",
    "uniform_cross_entropy_loss",
    "unpermute",
    "use",
    "warmup",
    "z_loss",
]
