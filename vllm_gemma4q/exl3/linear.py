"""Linears in EXL3, packed in memory: `gemma4q_kernels.exl3` multiplies with them as they are.

Each shard of a fused linear has its own input signs and its own bits. Values that are the keys are stored and computed
once. Parameters: `trellis`, `suh`, `svh` (`shards.py`).

Not done: LoRA.
"""

from collections.abc import Sequence
from typing import Any

import torch
from gemma4q_kernels import exl3
from gemma4q_kernels.exl3_layout import Span
from vllm.model_executor.layers.linear import LinearMethodBase

from vllm_gemma4q.exl3.facts import Packed
from vllm_gemma4q.exl3.shards import Layout, Part, decode, share

_SHARD_IDS = {None: 0, "q": 0, "k": 1, "v": 2}


class Exl3LinearMethod(LinearMethodBase):
    """The method of one linear.

    Args:
        shards: what it consists of, in order; None for one that equals the one before it.
    """

    def __init__(self, shards: Sequence[Packed | None]) -> None:
        self.shards = shards

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rank, ranks = int(layer.tp_rank), int(layer.tp_size)  # type: ignore[arg-type]
        inputs = share(input_size, input_size_per_partition, rank, ranks)
        parts: list[Part] = []
        order: list[int] = []
        for packed, local in zip(self.shards, output_partition_sizes, strict=True):
            if packed is not None:
                parts.append(Part(packed, inputs, self.outputs(packed, local, rank, ranks)))
            order.append(len(parts) - 1)
        self.layout = Layout(tuple(parts))
        self.order = order
        self.numbers = self.layout.encode()
        self.layout.register(layer, "", self._load)

    def outputs(self, packed: Packed, local: int, rank: int, ranks: int) -> Span:
        """This rank's outputs of a shard, of which each rank holds `local`."""
        return share(packed.out_features, local, rank, ranks)

    def _load(
        self, leaf: str, parameter: torch.Tensor, tensor: torch.Tensor, shard_id: str | int | None = None
    ) -> None:
        shard = shard_id if isinstance(shard_id, int) else _SHARD_IDS[shard_id]
        if self.shards[shard] is not None:
            self.layout.load(leaf, parameter, tensor, self.order[shard])

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[.., in of this rank] -> [.., out of this rank]."""
        out: torch.Tensor = exl3_linear(x, layer.trellis, layer.suh, layer.svh, self.numbers, self.order)
        return out if bias is None else out + bias


@torch.library.custom_op("gemma4q::exl3_linear", mutates_args=())
def exl3_linear(
    x: torch.Tensor, trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, layout: list[int], order: list[int]
) -> torch.Tensor:
    """A rank's fused linear as one opaque operation: how it is decoded is no business of torch.compile.

    Args:
        x: [.., in of this rank].
        trellis, suh, svh: flat, as `layout` has it.
        layout: `Layout.encode`.
        order: the parts whose outputs lie behind each other; one may come more than once.
    """
    parts = decode(tuple(layout)).parts
    out = exl3.linear(parts[0].inputs.embed(x), decode(tuple(layout)).weights(trellis, suh, svh))
    if order == list(range(len(parts))) and all(part.outputs.covered == part.outputs.size for part in parts):
        return out
    starts = [sum(part.outputs.covered for part in parts[:index]) for index in range(len(parts))]
    return torch.cat([parts[index].outputs.extract(out, starts[index]) for index in order], dim=-1)


@exl3_linear.register_fake
def _exl3_linear_shape(
    x: torch.Tensor, trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, layout: list[int], order: list[int]
) -> torch.Tensor:
    parts = decode(tuple(layout)).parts
    return x.new_empty((*x.shape[:-1], sum(parts[index].outputs.size for index in order)))
