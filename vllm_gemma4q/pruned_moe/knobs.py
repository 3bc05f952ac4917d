"""What a prune may change beside dropping experts: off by default, each for a reason and at a price.

Experts and routers are in Hugging Face's terms; arithmetic is in float32 or wider, rounded once to the stored dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from vllm_gemma4q.errors import InputError

NEAREST = 3  # survivors that a dropped row is added to: the published number


@dataclass(frozen=True)
class Options:
    """Knobs of a prune.

    Attributes:
        shared_boost: multiplies `post_feedforward_layernorm_1.weight`, and so the share that the parallel dense MLP
            has in each layer's sum. Published prunes scale `mlp.down_proj` by 1.2 to that end, which does nothing:
            this norm follows it and divides by the root mean square. Gemma 4's norms multiply by their weight as it
            is stored, so the boost is the factor of the MLP's output. 1 leaves it as it is.
        soft_transfer: adds this share (published: 0.3) of each dropped expert's row of `router.proj.weight` to the
            rows of its 3 nearest survivors by cosine, so that tokens it was for raise their logits. 0 adds nothing.
        top_k: experts a token from now on, `top_k_experts` of the configuration; None leaves it as it is. Fewer are
            faster, and every token's experts are weighted anew.
    """

    shared_boost: float = 1.0
    soft_transfer: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shared_boost) and self.shared_boost > 0):
            raise InputError(f"shared boost: got {self.shared_boost}, expected a finite number above 0")
        if not 0 <= self.soft_transfer <= 1:
            raise InputError(f"soft transfer: got {self.soft_transfer}, expected a share, 0 to 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top-k: got {self.top_k}, expected at least 1")


def boosted(norm: torch.Tensor, factor: float) -> torch.Tensor:
    """A norm's weight [H], times `factor` in float32, in its own dtype."""
    return (norm.float() * factor).to(norm.dtype)


def transferred(router: torch.Tensor, kept: Sequence[int], share: float) -> torch.Tensor:
    """Rows `kept` of a router [E, H], with `share` of each other row added to its nearest; [len(kept), H], same dtype.

    Nearest by cosine between rows as they are stored. Each of the `NEAREST` (or fewer, where fewer are kept) receives
    the whole share. Added in float64.
    """
    dropped = [expert for expert in range(len(router)) if expert not in set(kept)]
    rows = router.double()
    survivors, leavers = rows[list(kept)], rows[dropped]
    cosines = functional.normalize(leavers) @ functional.normalize(survivors).T
    nearest = cosines.topk(min(NEAREST, len(kept)), dim=1).indices
    added = (share * leavers).repeat_interleave(nearest.shape[1], dim=0)
    return survivors.index_add_(0, nearest.flatten(), added).to(router.dtype)
