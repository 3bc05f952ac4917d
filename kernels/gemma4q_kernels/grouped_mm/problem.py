"""One call of INT8 experts: what decides which backend can run it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """`tokens` rows of `hidden` values of `dtype` on `device`, through experts of 2 * `intermediate` rows."""

    device: torch.device
    tokens: int
    intermediate: int
    hidden: int
    dtype: torch.dtype
