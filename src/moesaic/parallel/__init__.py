"""moesaic.parallel: experts on many ranks, over `torch.distributed`. Every transport is a `TokenDispatcher`."""

from .all_gather import AllGather
from .all_to_all import AllToAll
from .choice import choose, explain
from .collectives import PeerFailed
from .dispatcher import Local, TokenDispatcher
from .hierarchical import Hierarchical
from .layers import Parallel, fully_shard
from .overlap import ChunkedOverlap
from .placement import Placement, move, place, update_expert
from .push import Push

__all__ = [
    "AllGather",
    "AllToAll",
    "ChunkedOverlap",
    "Hierarchical",
    "Local",
    "Parallel",
    "PeerFailed",
    "Placement",
    "Push",
    "TokenDispatcher",
    "choose",
    "explain",
    "fully_shard",
    "move",
    "place",
    "update_expert",
]
