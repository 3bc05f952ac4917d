"""The work folder of one calibration: parts of the result, and activations from which a killed run goes on.

`checkpoint.run.Run` holds it: its journal is the lock, knows the run's identity and every finished part. A part is one
layer's sums as safetensors. Activations lie beside the parts, under their final name only when they are whole.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors.numpy import load_file

from gguf_mixed.atomic_file import refusals, replacing
from vllm_gemma4q.calibration.activations import partial_path
from vllm_gemma4q.calibration.hessian import Mirrored
from vllm_gemma4q.calibration.statistics import Array
from vllm_gemma4q.calibration.weights import TORCH_DTYPES
from vllm_gemma4q.checkpoint.hashing import HashingWriter
from vllm_gemma4q.checkpoint.header import DTYPE_BYTES, TensorInfo, read_header, write_header
from vllm_gemma4q.checkpoint.run import RESUMABLE, FinishedFile, Run, writing_partial
from vllm_gemma4q.errors import InputError

_BLOCK_BYTES = 1 << 24
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_DTYPES = {"float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64"}


class Work:
    """Exclusive hold of the folder, as a context manager.

    Args:
        folder: created when absent; otherwise empty or left by a run of the same identity.
        identity: JSON values that decide every byte of the result.

    Bad input removes what was written; any other end keeps it for the next run of the same command.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder = folder
        self._run = Run(folder, identity)

    def __enter__(self) -> Self:
        self._run.__enter__()
        self._drop_partial()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._drop_partial()
            is_bad_input = issubclass(kind, InputError) and not issubclass(kind, RESUMABLE)
            if is_bad_input or not self._run.finished:
                self.drop_activations()
        self._run.__exit__(kind, error, tb)

    def has(self, part: str) -> bool:
        """Whether a part is finished, by this run or one that it resumes."""
        return self.part(part).name in self._run.finished

    def part(self, name: str) -> Path:
        """Where a finished part lies."""
        return self.folder / f"{name}.safetensors"

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every finished part, by the file's name."""
        return {name: file.sha256 for name, file in self._run.finished.items()}

    def activations(self, name: str) -> Path:
        """Where activations lie."""
        return self.folder / f"{name}.bin"

    def drop_activations(self, name: str = "*") -> None:
        """Remove activations that are no longer needed; `name` may hold wildcards."""
        for path in self.folder.glob(f"{name}.bin"):
            path.unlink()

    def write_part(self, name: str, arrays: Mapping[str, Array | Mirrored]) -> None:
        """Write a part and note it in the journal."""
        file_name = self.part(name).name
        with self._run.writing(file_name) as file:
            _write_arrays(file, arrays)
        self._run.record(file_name)

    def take_part(self, file: FinishedFile, attempt: str, activations: Path | None = None) -> None:
        """Give a worker's part its name and note it, after the activations that it has written, where it has."""
        if activations is not None:
            with refusals(activations):
                partial_path(activations, attempt).replace(activations)
        self._run.publish(file, attempt)
        self._run.record(file.name)

    def drop_part(self, name: str) -> None:
        """Remove a part that is no longer needed; a killed run may have named it and not noted it."""
        self._run.finished.pop(self.part(name).name, None)
        self.part(name).unlink(missing_ok=True)

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """The same for tensors that stay in their dtype, which numpy may not have."""
        file_name = self.part(name).name
        with self._run.writing(file_name) as file:
            file.write(write_header((key, _NAMES[value.dtype], tuple(value.shape)) for key, value in tensors.items()))
            for value in tensors.values():
                file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._run.record(file_name)

    def read_part(self, name: str) -> dict[str, Array]:
        """A finished part's arrays."""
        return load_file(self.part(name))

    def _drop_partial(self) -> None:
        for path in self.folder.glob("*.partial"):
            path.unlink()

    def complete(self) -> None:
        """The result is written: remove everything."""
        self.drop_activations()
        for name in self._run.finished:
            (self.folder / name).unlink(missing_ok=True)
        self._run.complete()
        self.folder.rmdir()


def write_unnamed_part(folder: Path, name: str, arrays: Mapping[str, Array], attempt: str) -> FinishedFile:
    """Write a part of a work folder that another process holds; it has no name before `Work.take_part`."""
    with writing_partial(folder, f"{name}.safetensors", attempt) as file:
        _write_arrays(file, arrays)
    return FinishedFile(f"{name}.safetensors", file.n_bytes, file.sha256.hexdigest())


def _write_arrays(file: HashingWriter, arrays: Mapping[str, Array | Mirrored]) -> None:
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    file.write(write_header((key, _DTYPES[array.dtype.name], array.shape) for key, array in ordered))
    for _, array in ordered:
        for block in array.blocks() if isinstance(array, Mirrored) else [array]:
            file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def join_parts(path: Path, parts: Sequence[Path], metadata: Mapping[str, str]) -> None:
    """Put safetensors files together into one, a block in memory at a time; it appears only when it is complete.

    Raises:
        WriteError: `path` cannot be written.
    """
    tensors = [tensor for part in parts for tensor in read_header(part).values()]
    tensors.sort(key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(_header(tensors, metadata))
        for tensor in tensors:
            file.writelines(_blocks(tensor))


def _header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.end - tensor.start
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: TensorInfo) -> Iterator[bytes]:
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.end - tensor.start
        while left:
            block = file.read(min(left, _BLOCK_BYTES))
            if not block:
                raise InputError(f"{tensor.path}: ended early")
            yield block
            left -= len(block)
