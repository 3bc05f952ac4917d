"""The steps of an EXL3 conversion: what is copied, what is computed, and in which shard each comes to lie."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from gemma4q_kernels.exl3 import quantize_linear

from vllm_gemma4q.architecture import layer_index
from vllm_gemma4q.checkpoint import DTYPE_BYTES, TensorInfo
from vllm_gemma4q.checkpoint.steps import Computed, OutputTensor, Progress, Step
from vllm_gemma4q.exl3 import output
from vllm_gemma4q.exl3.facts import LM_HEAD
from vllm_gemma4q.exl3.hessians import Hessians
from vllm_gemma4q.linears import Linear


@dataclass(frozen=True)
class Writing:
    """What decides the bytes of every linear.

    Attributes:
        root: of the language model's names.
        bits: by module.
        hessians: None rounds every weight for itself.
        encoder: of `gemma4q_kernels.exl3.ENCODERS`.
        device: where to compute.
    """

    root: str
    bits: Mapping[str, int]
    codebook: str
    hessians: Hessians | None
    encoder: str
    device: str

    def steps(self, tensors: Iterable[TensorInfo], linears: Iterable[Linear]) -> list[Step]:
        """Of tensors that stay and of linears: what lies outside of layers, then layer by layer, then the head."""
        steps = [*map(self._copy, tensors), *map(self._quantize, linears)]
        return sorted(steps, key=lambda step: self._place(step.group))

    def _copy(self, tensor: TensorInfo) -> Step:
        return Step(tensor, (OutputTensor(tensor.name, tensor.dtype, tensor.shape),), group=self._group(tensor.name))

    def _quantize(self, linear: Linear) -> Step:
        return Step(
            linear.tensor,
            output.outputs(linear.module, linear.shape, self.bits[linear.module]),
            first_row=linear.first,
            last_row=linear.last,
            constants=output.markers(linear.module, self.codebook),
            compute=partial(self._compute, linear),
            group=self._group(linear.module),
        )

    def _compute(self, linear: Linear, rows: torch.Tensor, progress: Progress) -> Computed:
        size = DTYPE_BYTES[linear.tensor.dtype]
        hessian = None if self.hessians is None else self.hessians.of(linear).to(self.device)
        found = quantize_linear(
            rows.to(self.device),
            hessian,
            self.bits[linear.module],
            self.codebook,
            seed=seed_of(linear.module),
            backend=self.encoder,
            progress=lambda weights: progress(weights * size),
        )
        tensors = [tensor.cpu() for tensor in (found.weight.trellis, found.weight.suh, found.weight.svh)]
        return Computed(tensors, {linear.module: {"nmse": found.nmse, "proxy": found.proxy}})

    def _group(self, name: str) -> str:
        """A layer; the output layer; all that lies outside."""
        if name.startswith(f"{self.root}layers."):
            return str(layer_index(name))
        return LM_HEAD if name.startswith(f"{LM_HEAD}.") or name == LM_HEAD else ""

    def _place(self, group: str) -> float:
        return math.inf if group == LM_HEAD else int(group or -1)


def seed_of(module: str) -> int:
    """Of a linear's random signs, 32 bits: a hash of its name."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little")


def kept(tensors: Iterable[TensorInfo], linears: Iterable[Linear]) -> Iterator[TensorInfo]:
    """Tensors that stay in the file: not those of quantized linears, but the embedding, which the head is made of."""
    gone = {f"{LM_HEAD}.weight" if linear.module == LM_HEAD else linear.tensor.name for linear in linears}
    return (tensor for tensor in tensors if tensor.name not in gone)
