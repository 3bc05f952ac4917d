"""A rank's parts of packed linears, and the flat parameters that hold them.

A fused linear is several stored ones, a layer's experts are many, and each may have its own bits; so their tensors lie
behind each other in three flat parameters: `trellis` int16, `suh` and `svh` float16. Sizes are known from the headers,
which is all that is needed to allocate them; weights stay as the file packs them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from gemma4q_kernels.exl3 import CODEBOOKS, Exl3Weight
from gemma4q_kernels.exl3.slicing import cut
from gemma4q_kernels.exl3_layout import TILE, Span
from vllm.model_executor.utils import set_weight_attrs

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.exl3.facts import INPUT_SIGNS, OUTPUT_SIGNS, TRELLIS, Packed

_DTYPES = {TRELLIS: torch.int16, INPUT_SIGNS: torch.float16, OUTPUT_SIGNS: torch.float16}


class Part(NamedTuple):
    """One rank's part of one stored linear."""

    packed: Packed
    inputs: Span
    outputs: Span

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Of its tensor."""
        rows, columns = self.inputs.covered, self.outputs.covered
        shapes = {
            TRELLIS: (rows // TILE, columns // TILE, self.packed.width),
            INPUT_SIGNS: (rows,),
            OUTPUT_SIGNS: (columns,),
        }
        return shapes[leaf]


def share(features: int, local: int, rank: int, ranks: int) -> Span:
    """A rank's features, where each holds `local` of them: all, an equal part, or a part that neighbours hold too."""
    return Span(rank * (features // local) // ranks * local, local)


def expert_share(name: str, features: int, local: int, rank: int, ranks: int) -> Span:
    """A rank's features of what is within an expert.

    Raises:
        InputError: ranks do not divide them; vLLM rounds `local` down then.
    """
    if local * ranks != features:
        most = max(number for number in range(1, ranks) if features % number == 0)
        raise InputError(
            f"{name}: got experts of {features} features over {ranks} ranks, expected a divisor, at most {most}, "
            "or --enable-expert-parallel"
        )
    return share(features, local, rank, ranks)


@dataclass(frozen=True)
class Layout:
    """Where parts lie in the flat parameters, in their order."""

    parts: tuple[Part, ...]

    def register(self, layer: torch.nn.Module, prefix: str, loader: Callable[..., Any]) -> None:
        """Give a layer its parameters, uninitialized.

        Args:
            prefix: of their names.
            loader: called with a tensor's leaf, then as vLLM calls `weight_loader`.
        """
        for leaf, dtype in _DTYPES.items():
            parameter = torch.nn.Parameter(torch.empty(self.starts[leaf][-1], dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": _Loader(leaf, loader)})
            layer.register_parameter(prefix + leaf, parameter)

    def load(self, leaf: str, parameter: torch.Tensor, tensor: torch.Tensor, index: int) -> None:
        """Copy a part of the tensor of a whole linear to its place."""
        part = self.parts[index]
        self._view(leaf, parameter, index).copy_(cut(leaf, tensor, part.inputs, part.outputs))

    def weights(self, trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor) -> list[Exl3Weight]:
        """All parts as views of the parameters."""
        return [
            Exl3Weight(
                self._view(TRELLIS, trellis, index),
                self._view(INPUT_SIGNS, suh, index),
                self._view(OUTPUT_SIGNS, svh, index),
                part.packed.codebook,
            )
            for index, part in enumerate(self.parts)
        ]

    def encode(self) -> list[int]:
        """As numbers, which an operation of torch can take."""
        return [
            number
            for part in self.parts
            for number in (*part.packed[:3], CODEBOOKS.index(part.packed.codebook), *part.inputs, *part.outputs)
        ]

    @cached_property
    def starts(self) -> Mapping[str, Sequence[int]]:
        """Where each part begins, and the last one ends, in each parameter."""
        return {
            leaf: list(accumulate((_numel(part.shape(leaf)) for part in self.parts), initial=0)) for leaf in _DTYPES
        }

    def _view(self, leaf: str, parameter: torch.Tensor, index: int) -> torch.Tensor:
        shape = self.parts[index].shape(leaf)
        return parameter.data.narrow(0, self.starts[leaf][index], _numel(shape)).view(shape)


@cache
def decode(numbers: tuple[int, ...]) -> Layout:
    """What `Layout.encode` made numbers of."""
    parts = []
    for place in range(0, len(numbers), 8):
        inputs, outputs, width, codebook, *spans = numbers[place : place + 8]
        packed = Packed(inputs, outputs, width, CODEBOOKS[codebook])
        parts.append(Part(packed, Span(*spans[:2]), Span(*spans[2:])))
    return Layout(tuple(parts))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


class _Loader(NamedTuple):
    """A parameter's `weight_loader`, which knows which tensor it is for."""

    leaf: str
    load: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load(self.leaf, *args, **kwargs)
