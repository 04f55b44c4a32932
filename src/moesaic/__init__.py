"""moesaic: Mixture-of-Experts operators for PyTorch that train and serve, on GPU and CPU."""

from . import nn as nn
from . import testing as testing
from .activations import ACTIVATIONS, Activation
from .errors import MissingExtra, Unsupported
from .op import explain, use
from .ops.experts import fused_experts
from .ops.grouped_matmul import grouped_matmul
from .ops.permute import permute, unpermute
from .ops.route import RouterConfig, load_balancing_loss, route, z_loss
from .problem import Problem
from .routing import Routing

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "MissingExtra",
    "Problem",
    "RouterConfig",
    "Routing",
    "Unsupported",
    "explain",
    "fused_experts",
    "grouped_matmul",
    "load_balancing_loss",
    "nn",
    "permute",
    "route",
    "testing",
    "unpermute",
    "use",
    "z_loss",
]
