"""A rank's experts in EXL3, and what they make of routed tokens. Nothing here needs vLLM.

    y = sum over k of topk_weights * W2[e] (act(gate) * up),   [gate; up] = W13[e] x,   e = topk_ids

Multiplications in the dtype of x, the sum over experts in float32.

While a CUDA graph is captured all experts see all tokens (`grouped_mm/routing.py`). Nor can it compile kernels or keep
tables: with each number of rows, every format among the experts is run once before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from gemma4q_kernels import exl3
from gemma4q_kernels.exl3 import Exl3Weight
from gemma4q_kernels.exl3_layout import Span
from gemma4q_kernels.grouped_mm.activation import activate
from gemma4q_kernels.grouped_mm.routing import Share, is_capturing, shares


class Expert(NamedTuple):
    """One expert: bits and codebooks of the three are their own."""

    gate: Exl3Weight
    up: Exl3Weight
    down: Exl3Weight


@dataclass(frozen=True)
class Experts:
    """The experts of one rank.

    Attributes:
        experts: by local id.
        hidden, inner: the features of their inputs and of what is between; `inner` may be a rank's part.
    """

    experts: Sequence[Expert]
    hidden: Span
    inner: Span
    _prepared: set[int] = field(default_factory=set)

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: str,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        """[T, H] -> [T, H]; arguments as `gemma4q_kernels.grouped_mm` has them. Experts of other ranks add zero."""
        if x.is_cuda and not is_capturing(x) and len(x) not in self._prepared:
            self._prepared.add(len(x))
            for expert in self.formats():
                self._expert(expert, x, activation)
        return self.total(x, shares(topk_weights, topk_ids, len(self.experts), expert_map), activation)

    def formats(self) -> Sequence[Expert]:
        """An expert of each combination of bits and codebooks."""
        return list({tuple((one.bits, one.codebook) for one in expert): expert for expert in self.experts}.values())

    def total(self, x: torch.Tensor, parts: Iterable[Share], activation: str) -> torch.Tensor:
        """The sum of what experts compute: [T, H] -> [T, H]."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for part in parts:
            part.add(out, self._expert(self.experts[part.expert], part.of(x), activation).float())
        return out.to(x.dtype)

    def _expert(self, expert: Expert, x: torch.Tensor, activation: str) -> torch.Tensor:
        both = exl3.linear(self.hidden.embed(x), [expert.gate, expert.up])
        gate, up = self.inner.extract(both), self.inner.extract(both, self.inner.covered)
        inner = activate(gate, activation) * up
        return self.hidden.extract(exl3.linear(self.inner.embed(inner), [expert.down]))
