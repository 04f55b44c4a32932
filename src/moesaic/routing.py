"""Routing: who goes where. The one value that every operator after the router reads.

Legend: T tokens, K choices per token, E experts. A *slot* is one choice, numbered `t·K + k`. A *row* is a slot's place
once slots are sorted by expert (stable, so tokens keep their order inside an expert).

Worked example, E = 3, ids = [[2, 0], [2, 1], [0, -1]]:
    tokens_per_expert = [2, 1, 2]          expert_offsets = [0, 2, 3, 5]
    row_order = [1, 4, 3, 0, 2, 5]         (rows 0, 1 are slots 1 and 4, both expert 0; the dropped slot 5 comes last)
    row_index = [3, 0, 4, 2, 1, -1]        (slot 0 is row 3; slot 5 has no row)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import check_shape
from .op import OPS


@dataclass(frozen=True)
class Routing:
    """Where each token goes, built once on the device with no host synchronisation.

    Attributes:
        topk_weights: `(T, K)` fp32, the weight of each choice; None where a caller has none to give.
        topk_ids: `(T, K)` int32, the chosen expert; -1 marks a dropped or masked slot.
        tokens_per_expert: `(E,)` int32.
        expert_offsets: `(E + 1,)` int32, exclusive: expert e owns rows `expert_offsets[e]:expert_offsets[e + 1]`.
        row_order: `(T·K,)` int32, row -> slot; a permutation, dropped slots at the end.
        row_index: `(T·K,)` int32, slot -> row; -1 for a dropped slot.
        logits: `(T, E)` the router's logits, kept for the losses when the router made them.

    What a router adds when its configuration or the losses ask for it:
        config: the `RouterConfig`.
        capacity: slots that each expert could keep; those beyond it are -1 in `topk_ids`.
        undropped_ids: `(T, K)` int32, the ids before capacity dropped some and with those of experts without matrices;
            None where `topk_ids` are the same (see `chosen_ids`).
        probability_sums: `(S, E)`, sums of the tokens' probabilities in each of S sequences; differentiable.
        logsumexp_squares: `(S,)`, sums of `logsumexp(logits)²`; differentiable.
        choices: `(S, E)` int32, how often each expert was chosen, before any drop.
        load: `(E,)`, noisy top-k's smooth count of tokens; differentiable.
        shared_weights: `(T, n)`, weights of shared experts that take part in the router's normalisation.
        identity_weight: `(T,)`, sum of the weights of the chosen identity experts.
        constant_weights: `(T, n)`, weight of each constant expert.
        padded: rows of every expert where all have the same number, padding included (see `to_capacity`), else None.
    """

    topk_weights: Tensor | None
    topk_ids: Tensor
    tokens_per_expert: Tensor
    expert_offsets: Tensor
    row_order: Tensor
    row_index: Tensor
    logits: Tensor | None = None
    config: Any = None
    capacity: int | None = None
    probability_sums: Tensor | None = None
    logsumexp_squares: Tensor | None = None
    choices: Tensor | None = None
    load: Tensor | None = None
    shared_weights: Tensor | None = None
    identity_weight: Tensor | None = None
    constant_weights: Tensor | None = None
    padded: int | None = None
    undropped_ids: Tensor | None = None

    def devices(self) -> dict[str, torch.device]:
        """Where the index tables are, by name: every operator wants them all where its operands are."""
        tables = ("expert_offsets", "row_order", "row_index")
        return {f"routing.{name}": getattr(self, name).device for name in tables}

    @property
    def chosen_ids(self) -> Tensor:
        """`(T, K)` int32: the router's own choice, before any drop; what `route(ids=...)` replays exactly."""
        return self.topk_ids if self.undropped_ids is None else self.undropped_ids

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_experts(self) -> int:
        return self.tokens_per_expert.shape[0]

    def to_capacity(self, capacity: int | None = None) -> Routing:
        """The same routing with `capacity` rows for every expert, so that `permute` gives a padded `(E·C, H)`.

        Row `e·C + c` holds the c-th slot of expert e, or zeros; slots beyond C get no row. Then `row_order` has E·C
        entries with -1 for padding, and `expert_offsets` are the multiples of C. `permute`, `grouped_matmul` and
        `unpermute` read it like any routing; `fused_experts` takes packed rows only. No host synchronisation.

        Args:
            capacity: C; by default the router's.
        """
        C = self.capacity if capacity is None else capacity
        if C is None or C < 0:
            raise ValueError(
                f"Routing.to_capacity: capacity must be given where the router had no capacity factor, got {capacity}."
            )
        if self.padded is not None:
            raise ValueError(f"Routing.to_capacity: the routing must be packed, got one padded to {self.padded} rows.")
        E, device = self.num_experts, self.row_order.device
        place = torch.arange(C, dtype=torch.int32, device=device)
        kept = self.tokens_per_expert.clamp_max(C)
        rows = self.expert_offsets[:-1, None] + place
        if self.row_order.numel():
            order = self.row_order[rows.clamp_max(self.row_order.numel() - 1)]
        else:
            order = torch.zeros_like(rows)
        order = order.masked_fill(place >= kept[:, None], -1)
        expert = self.topk_ids.reshape(-1)
        at = self.row_index - self.expert_offsets[expert.clamp_min(0)]
        dead = (expert < 0) | (at >= C)
        index = (expert * C + at).masked_fill(dead, -1)
        return replace(
            self, topk_ids=expert.masked_fill(dead, -1).view(self.topk_ids.shape), tokens_per_expert=kept,
            expert_offsets=torch.arange(E + 1, dtype=torch.int32, device=device) * C, row_order=order.reshape(-1),
            row_index=index, capacity=C, padded=C,
        )  # fmt: skip

    @classmethod
    def from_topk(
        cls, topk_weights: Tensor | None, topk_ids: Tensor, num_experts: int, *, implementation: str | None = None
    ) -> Routing:
        """Build the routing of a caller's own router.

        Args:
            topk_weights: `(T, K)` of any float dtype, kept as fp32 with its gradient (fp64 stays fp64); or None.
            topk_ids: `(T, K)` integers in `[-1, num_experts)`; -1 drops the slot.
            num_experts: E.

        Raises:
            ValueError: shapes disagree, ids are not integers, or (on the CPU, where looking costs nothing) an id is
                out of range. On a GPU an id out of range is treated as -1, since looking would stall the device.
        """
        who = "Routing.from_topk"
        if topk_ids.dim() != 2:
            raise ValueError(f"{who}: topk_ids must have shape (T, K), got {tuple(topk_ids.shape)}; reshape it.")
        if topk_ids.is_floating_point() or topk_ids.is_complex() or topk_ids.dtype == torch.bool:
            raise ValueError(f"{who}: topk_ids must be integers, got {topk_ids.dtype}; convert it with .int().")
        if topk_ids.numel() >= 2**31:
            raise ValueError(
                f"{who}: topk_ids must hold fewer than 2^31 slots, got {tuple(topk_ids.shape)}; split the tokens."
            )
        if num_experts < 1:
            raise ValueError(f"{who}: num_experts must be at least 1, got {num_experts}.")
        if topk_weights is not None:
            check_shape(who, "topk_weights", topk_weights, topk_ids.shape, "it holds one weight for each id")
            if topk_weights.device != topk_ids.device:
                raise ValueError(
                    f"{who}: topk_weights and topk_ids must share a device, got {topk_weights.device} and "
                    f"{topk_ids.device}; move one."
                )
            if topk_weights.dtype not in (torch.float32, torch.float64):
                topk_weights = topk_weights.float()
        topk_ids = signed_ids(topk_ids)
        index = OPS["expert_index"]  # which is not imported by name: its folder imports this file's
        return cls(topk_weights, *index(index.operands(topk_ids), index.options(num_experts), implementation))


def signed_ids(ids: Any) -> Any:
    """Ids of any integer dtype in one that holds them and the number of experts too; None stays None.

    Unsigned ones have few operations, and one of 8 or 16 bits compares wrongly with more experts than it can hold.
    """
    if ids is None or ids.dtype in (torch.int32, torch.int64):
        return ids
    if ids.dtype == torch.uint64:  # what 63 bits do not hold is no expert, and must not become -1
        ids = ids.view(torch.int64)
        return ids.masked_fill(ids < 0, 2**62)
    return ids.to(torch.int64 if ids.dtype == torch.uint32 else torch.int32)
