"""Sort the (token, slot) pairs of a routed batch by local expert."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Groups:
    """Pairs of one batch in the order of their experts; pairs of experts held elsewhere are left out.

    tokens: int64 [P] row of the batch; weights: float32 [P]; experts: local ids that have pairs, ascending;
    counts: pairs of each of them, summing to P.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    experts: tuple[int, ...]
    counts: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each active expert with the range of its pairs."""
        start = 0
        for expert, count in zip(self.experts, self.counts, strict=True):
            yield expert, slice(start, start + count)
            start += count


def group_by_expert(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> Groups:
    """Group [T, k] routing decisions by local expert.

    Args:
        topk_ids: int [T, k], global ids; local ones where there is no map. -1 marks an unused slot.
        num_experts: local experts.
        expert_map: int [global experts] -> local id, -1 for experts of another rank.

    Raises:
        ValueError: an id outside the experts.
    """
    ids = topk_ids.reshape(-1).long()
    limit = num_experts if expert_map is None else len(expert_map)
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < limit:
        raise ValueError(f"topk_ids: got {int(ids.min())}..{int(ids.max())}, expected -1..{limit - 1}")
    if expert_map is not None and len(expert_map):
        ids = torch.where(ids >= 0, expert_map.long()[ids.clamp_min(0)], -1)
    order = torch.argsort(ids, stable=True)
    order = order[int((ids < 0).sum()) :]
    experts, counts = torch.unique_consecutive(ids[order], return_counts=True)
    tokens = torch.div(order, max(topk_ids.shape[1], 1), rounding_mode="floor")
    weights = topk_weights.reshape(-1)[order].float()
    return Groups(tokens, weights, tuple(experts.tolist()), tuple(counts.tolist()))
