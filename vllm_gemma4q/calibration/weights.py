"""Tensors of a checkpoint into memory: one module's, or some rows of one.

Only what is asked for is read; a file that ended early since its header was checked is an error. Experts stored one
by one are put into the fused arrays that transformers computes with.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vllm_gemma4q.architecture import is_fused_experts
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo
from vllm_gemma4q.errors import InputError, reading

_FIRST_LINEAR = ".self_attn.q_proj.weight"
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def read_rows(tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) along the first axis, as stored; all of them by default.

    Raises:
        InputError: not a float tensor, or the file ends before them.
    """
    if tensor.dtype not in TORCH_DTYPES:
        raise InputError(f"tensor {tensor.name}: got {tensor.dtype}, expected one of {', '.join(TORCH_DTYPES)}")
    stop = tensor.shape[0] if stop is None else stop
    values = torch.empty((stop - start, *tensor.shape[1:]), dtype=TORCH_DTYPES[tensor.dtype])
    row_bytes = (tensor.end - tensor.start) // tensor.shape[0]
    _read_into(tensor.path, tensor.start + start * row_bytes, values, tensor.name)
    return values


def gather_rows(tensor: TensorInfo, rows: Sequence[int]) -> torch.Tensor:
    """Single rows of a matrix, [len(rows), columns], as stored. Raises InputError like `read_rows`."""
    return torch.cat([read_rows(tensor, row, row + 1) for row in rows])


def load_module(
    module: torch.nn.Module, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a module that was made on the meta device, tensor by tensor; a tensor's copy in another dtype is all that
    is held beside it.

    Raises:
        InputError: a tensor is missing, of another shape, or cannot be read.
    """
    for name, expected in dict(module.state_dict()).items():
        values = _read(checkpoint, prefix + name, tuple(expected.shape))
        _assign(module, name, values.to(device=device, dtype=dtype))


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = checkpoint.tensors.get(name)
    if tensor is None and is_fused_experts(name):
        return _fused(checkpoint, name, shape)
    if tensor is None:
        raise InputError(f"tensor {name}: missing, expected {list(shape)}")
    if tensor.shape != shape:
        raise InputError(f"tensor {name}: got shape {list(tensor.shape)}, expected {list(shape)}")
    return read_rows(tensor)


def _fused(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    prefix, _, which = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
    fused: torch.Tensor | None = None
    for expert in range(shape[0]):
        matrix = torch.cat(
            [
                _read(checkpoint, f"{prefix}.{expert}.{part}.weight", (shape[1] // len(parts), shape[2]))
                for part in parts
            ]
        )
        if fused is None:
            fused = torch.empty(shape, dtype=matrix.dtype)
        fused[expert] = matrix
    assert fused is not None
    return fused


def _assign(module: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        setattr(owner, leaf, torch.nn.Parameter(values, requires_grad=False))
    else:
        setattr(owner, leaf, values)


def _read_into(path: Path, offset: int, values: torch.Tensor, name: str) -> None:
    buffer = memoryview(values.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
    with reading(path), path.open("rb", buffering=0) as file:
        file.seek(offset)
        for part in _pieces(buffer):
            n_read = file.readinto(part)
            if n_read != len(part):
                raise InputError(f"tensor {name}: {path.name} ended early: got {n_read}, expected {len(part)} bytes")


def _pieces(buffer: memoryview, n_bytes: int = 1 << 26) -> Iterator[memoryview]:
    """Linux reads less than 2 GiB at a time."""
    for start in range(0, len(buffer), n_bytes):
        yield buffer[start : start + n_bytes]


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that a checkpoint's linears are stored in."""
    found = next((tensor.dtype for name, tensor in checkpoint.tensors.items() if name.endswith(_FIRST_LINEAR)), "")
    if found not in TORCH_DTYPES:
        raise InputError(
            f"{checkpoint.folder}: got weights in {found or 'no dtype'}, expected {', '.join(TORCH_DTYPES)}"
        )
    return TORCH_DTYPES[found]
