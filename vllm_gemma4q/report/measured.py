"""Errors of a quantized checkpoint's linears against the unquantized one: ||W_hat - W||^2 / ||W||^2, linear by linear.

INT8 and FP8 with one scale, or one a row or an expert; EXL3. A few thousand rows are in memory, never a whole model.
Left out, as not measured: scales of blocks and zero points, packed 4-bit codes, linears that the plugin's reader of
EXL3 refuses, and what is not quantized.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from gemma4q_kernels.exl3 import codebook_of, reconstruct
from gemma4q_kernels.exl3_layout import BLOCK, TILE

from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo
from vllm_gemma4q.doctor.subject import CODES, Subject
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.linears import Linear, linears_of
from vllm_gemma4q.report.checkpoint_parts import TRELLIS, split_name
from vllm_gemma4q.restore.compare import Files, span
from vllm_gemma4q.restore.names import canonical

Progress = Callable[[int], Any]
Measured = dict[str, list[float]]
_CHUNK_WEIGHTS = 1 << 22
_BLOCK_SCALES = frozenset({"weight_scale_inv", "weight_zero_point"})
_SCALE_LEAVES = ("weight_scale", "scale")
_LM_HEAD, _EMBEDDING = "lm_head", "embed_tokens"


class Work:
    """What is to be measured.

    Args:
        subject: the quantized checkpoint.

    Attributes:
        n_bytes: of the base that will be read.

    Raises:
        InputError: the base is quantized, cannot be read, or lacks a linear or has it in another shape.
    """

    def __init__(self, subject: Subject, base: Checkpoint) -> None:
        if "quantization_config" in base.config:
            raise InputError(f"{base.folder}: got a quantized checkpoint, expected the BF16 one as --base")
        _check_experts(subject, base)
        self._base = _linears_by_name(base.tensors.values())
        self._modules: dict[str, dict[str, TensorInfo]] = {}
        for name, tensor in subject.tensors.items():
            module, leaf = split_name(name)
            self._modules.setdefault(module, {})[leaf] = tensor
        self._jobs = [job for module, leaves in self._modules.items() for job in self._jobs_of(module, leaves)]
        self.n_bytes = sum(4 * job[1].shape[0] * job[1].shape[1] for job in self._jobs)

    def measure(self, progress: Progress) -> Measured:
        """Errors by full module name, one for each of its matrices.

        Args:
            progress: called with bytes of float32 weights that were compared.
        """
        found: Measured = {}
        with Files() as files:
            for module, base, chunks in self._jobs:
                error, size = 0.0, 0.0
                for first, last, values in chunks(files):
                    expected = _rows(files, base, first, last)
                    error += float((values - expected).double().square().sum())
                    size += float(expected.double().square().sum())
                    progress(4 * expected.numel())
                if size:
                    found.setdefault(module, []).append(error / size)
        return found

    def _jobs_of(self, module: str, leaves: Mapping[str, TensorInfo]) -> Iterator["Job"]:
        if TRELLIS in leaves:
            base = self._of_base(module, canonical(module))
            if base is not None:
                yield module, base, _Trellis(module, leaves, base.shape)
            return
        weight = leaves.get("weight")
        scale = next((leaves[leaf] for leaf in _SCALE_LEAVES if leaf in leaves), None)
        if weight is None or weight.dtype not in CODES or scale is None or _BLOCK_SCALES & leaves.keys():
            return
        name = weight.name if len(weight.shape) == 2 else module
        for linear in _linears_of(replace(weight, name=name)):
            factors = _factors(linear, scale)
            base = self._of_base(linear.module, canonical(linear.module))
            if factors is not None and base is not None:
                _check_shape(linear.module, linear.shape, base)
                yield module, base, _Coded(linear, scale, factors)

    def _of_base(self, module: str, name: str) -> Linear | None:
        found = self._base.get(name)
        if found is None and name == _LM_HEAD:
            found = self._base.get(_EMBEDDING)
        if found is None:
            raise InputError(f"--base: tensor {module}: got no such linear, expected that of {module}")
        return found


Chunks = Iterator[tuple[int, int, torch.Tensor]]
Job = tuple[str, Linear, Callable[[Files], Chunks]]


class _Coded:
    """Integer or FP8 codes with scales; yields rows [first, last) as float32."""

    def __init__(self, linear: Linear, scale: TensorInfo, factors: tuple[int, int]) -> None:
        self._linear, self._scale, self._factors = linear, scale, factors

    def __call__(self, files: Files) -> Chunks:
        rows, _ = self._linear.shape
        start, count = self._factors
        scales = files.values(self._scale, span(self._scale)).flatten()[start : start + count, None]
        for first, last in _ranges(self._linear.shape):
            values = _rows(files, self._linear, first, last)
            yield first, last, values * (scales if count != rows else scales[first:last])


class _Trellis:
    """A packed linear, decoded some blocks of outputs at a time: blocks of outputs do not depend on each other."""

    def __init__(self, module: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, int]) -> None:
        self._module, self._leaves, self._shape = module, leaves, shape
        padded = (TILE * leaves[TRELLIS].shape[1], TILE * leaves[TRELLIS].shape[0])
        if any(not 0 <= stored - size < BLOCK for stored, size in zip(padded, shape, strict=True)):
            raise InputError(f"--base: tensor {module}: got {list(shape)}, expected {list(padded)} up to padding")

    def __call__(self, files: Files) -> Chunks:
        rows, columns = self._shape
        tiles = [_stored(self._leaves[leaf]) for leaf in (TRELLIS, *self._signs)]
        trellis, suh, svh = tiles
        codebook = codebook_of(self._leaves)
        step = max(1, _CHUNK_WEIGHTS // (columns * BLOCK)) * BLOCK
        per_sign = TILE * trellis.shape[1] // svh.shape[0]  # 16 where signs are packed, else 1
        for first in range(0, rows, step):
            last = min(rows, first + step)
            covered = -(-last // BLOCK) * BLOCK
            part = trellis[:, first // TILE : covered // TILE].contiguous()
            signs = svh[first // per_sign : covered // per_sign].contiguous()
            dense = reconstruct(part, suh, signs, codebook, dtype=torch.float32)
            yield first, last, dense[:columns, : last - first].T

    @property
    def _signs(self) -> tuple[str, str]:
        pairs = (("suh", "su"), ("svh", "sv"))
        names = [next((leaf for leaf in pair if leaf in self._leaves), pair[0]) for pair in pairs]
        for name in names:
            if name not in self._leaves:
                raise InputError(f"tensor {self._module}.{name}: got nothing (missing), expected the trellis's signs")
        return names[0], names[1]


def measure_errors(subject: Subject, work: Work, progress: Progress) -> Measured:
    """See `Work.measure`; nothing where the plugin refuses the checkpoint: its weights mean nothing."""
    return {} if subject.refusal is not None else work.measure(progress)


def _linears_by_name(tensors: Collection[TensorInfo]) -> dict[str, Linear]:
    found = {canonical(linear.module): linear for tensor in tensors for linear in linears_of(tensor)}
    for tensor in tensors:
        name = canonical(tensor.name).removesuffix(".weight")
        if name in (_LM_HEAD, _EMBEDDING):
            found[name] = Linear(name, tensor, 0, tensor.rows)
    return found


def _linears_of(weight: TensorInfo) -> list[Linear]:
    return list(linears_of(weight)) or [Linear(weight.name.removesuffix(".weight"), weight, 0, weight.rows)]


def _factors(linear: Linear, scale: TensorInfo) -> tuple[int, int] | None:
    """Index of the linear's first scale and how many it has; None where scales are of blocks."""
    rows, count = linear.last - linear.first, math.prod(scale.shape)
    matrices = linear.tensor.shape[0] if len(linear.tensor.shape) == 3 else 1
    # Scales of blocks, [R / 128, C / 128], may be as many as there are rows. Experts' are [E, rows] or [E, rows, 1].
    if len(linear.tensor.shape) == 2 and max(scale.shape, default=1) != count:
        return None
    if count == 1:
        return 0, 1
    if count == linear.tensor.rows:
        return linear.first, rows
    return (linear.first * matrices // linear.tensor.rows, 1) if count == matrices else None


def _check_experts(subject: Subject, base: Checkpoint) -> None:
    """A pruned model's experts are others than the base's of that number."""
    ours, theirs = ([layer.num_experts for layer in architecture.layers]
                    for architecture in (subject.architecture, parse_text_architecture(base.config)))  # fmt: skip
    for layer, (got, expected) in enumerate(zip(theirs, ours, strict=False)):
        if got != expected:
            raise InputError(
                f"--base: layer {layer}: got {got or 'no'} experts, expected {expected or 'none'}: it is another model"
            )


def _check_shape(module: str, shape: tuple[int, int], base: Linear) -> None:
    if base.shape != shape:
        raise InputError(f"--base: tensor {module}: got {list(base.shape)}, expected {list(shape)}")


def _ranges(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    rows, columns = shape
    step = max(1, _CHUNK_WEIGHTS // columns)
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _rows(files: Files, linear: Linear, first: int, last: int) -> torch.Tensor:
    """Rows of a linear, as stored, float32 [last - first, in]."""
    tensor = linear.tensor
    return files.values(tensor, span(tensor, linear.first + first, linear.first + last)).view(-1, tensor.row_length)


def _stored(tensor: TensorInfo) -> torch.Tensor:
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        data = bytearray(file.read(tensor.end - tensor.start))
    dtype = torch.int16 if tensor.dtype == "I16" else torch.float16
    return torch.frombuffer(data, dtype=dtype).view(tensor.shape)
