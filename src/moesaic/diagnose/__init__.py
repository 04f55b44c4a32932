"""Looking into a model: how evenly its experts are used, and how far its layers are from the truth."""

from .compare import Comparison, LayerComparison, compare
from .load import LoadStatistics, expert_load, heatmap, load_statistics

__all__ = [
    "Comparison",
    "LayerComparison",
    "LoadStatistics",
    "compare",
    "expert_load",
    "heatmap",
    "load_statistics",
]
