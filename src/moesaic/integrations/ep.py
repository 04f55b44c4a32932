"""Hugging Face expert parallelism: importing this module registers `ep_implementation="moesaic"`.

    import moesaic.integrations.ep, moesaic.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="moesaic",
        distributed_config=DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="moesaic"))

transformers shards the experts over the `ep` mesh and calls an implementation for each module of experts; this one
moves tokens with a `moesaic.parallel` dispatcher: one copy of a token a rank, one sum back. The experts themselves may
be any implementation. transformers 5.17 has no such registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingExtra
from ..parallel import AllToAll, TokenDispatcher
from ..routing import Routing

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError as error:  # absent, or older than the registry
    raise MissingExtra("transformers >= 5.23", "hf", "moesaic.integrations.ep") from error

__all__ = ["NAME", "ExpertParallelism", "register"]

NAME = "moesaic"


class ExpertParallelism(EPImplementation):
    """Tokens to their experts and back over a `moesaic.parallel` dispatcher, for one module of experts.

    Attributes:
        make: `(num_experts, ep_mesh) -> TokenDispatcher`, by default `AllToAll`. Assign another to the class before
            the model is made, to use another transport: `lambda n, mesh: choose(mesh, num_experts=n, ...)`.

    Where the ranks of a tensor-parallel group hold the same batch, each sends its own slice of it. Differentiable in
    the tokens, the routing weights and the experts' weights.
    """

    make: Callable[[int, Any], TokenDispatcher] = AllToAll

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any):
        super().__init__(experts, ep_mesh, tp_mesh)
        here: Any = self.num_local_experts
        self.dispatcher = type(self).make(here * ep_mesh.size(), ep_mesh)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`(T, H)`, `(T, K)` global ids, `(T, K)` weights -> `(T, H)`; an id outside `[0, E)` is skipped."""
        if self.tp_mesh.size() == 1:
            return self._own(hidden_states, top_k_index, top_k_weights)
        from torch.distributed.tensor import DTensor, Replicate, Shard

        tokens, width = hidden_states.shape
        whole = (hidden_states, top_k_index, top_k_weights)
        mine = (
            DTensor.from_local(t, self.tp_mesh, [Replicate()], run_check=False)
            .redistribute(self.tp_mesh, [Shard(0)])
            .to_local()
            for t in whole
        )
        y = self._own(*mine).contiguous()
        y = DTensor.from_local(y, self.tp_mesh, [Shard(0)], shape=torch.Size((tokens, width)), stride=(width, 1))
        return y.full_tensor()

    def _own(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        E, absent = self.dispatcher.num_experts, self.dispatcher.num_local_experts
        ids = ids.masked_fill((ids < 0) | (ids >= E), -1)

        def experts(rows: Tensor, local: Routing) -> Tensor:
            assert local.topk_weights is not None
            here, w = local.topk_ids.long(), local.topk_weights.to(weights.dtype)
            here = here.masked_fill(here < 0, absent)  # how transformers says "not here"
            if rows.shape[0]:
                return self.experts_forward(rows, here, w)
            # a row that nobody sent: not every implementation takes none, and all ranks must take part in backward
            pad = (0, 0, 0, 1)
            return self.experts_forward(F.pad(rows, pad), F.pad(here, pad), F.pad(w, pad))[:0]

        return self.dispatcher(x, Routing.from_topk(weights, ids, E), experts)


def register(name: str = NAME) -> None:
    """Make `DistributedConfig(ep_implementation=name)` mean this."""
    EPImplementationInterface.register(name, ExpertParallelism)


register()
