"""From an override table to a checked file: the exact llama-quantize command, run, verified, and only then renamed.

Builds differ, so the one that is found is asked what it knows: `--tensor-type-file`, else `--tensor-type` for each
tensor. The base type is one that no tensor has, since builds before #22572 dropped an override equal to it; the file's
label is then set by `--override-kv general.file_type=int:N`, N being the type that most weights have. Where there is no
llama-quantize, `ggml_writer` writes the same file, and it is checked alike.
Not done: sharded output (`--keep-split`), removing layers (`--prune-layers`).
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gemma4q_kernels.ggml import GGMLQuantizationType
from gguf.constants import GGML_QUANT_VERSION, LlamaFileType

from gguf_mixed.atomic_file import PARTIAL, exclusive, put_in_place, refusals
from gguf_mixed.errors import InputError
from gguf_mixed.file_size import metadata_changes, predict_size
from gguf_mixed.header import Scalar
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.llama_cpp import Log, run_tool, tool_help
from gguf_mixed.overrides import OverrideTable, check_complete
from gguf_mixed.tensors import Inventory, Tensor, written_types
from gguf_mixed.verify import find_differences

T = GGMLQuantizationType

# llama-quantize's types that stand for one number format, preferred first: old builds know them all.
BASE_TYPES = (T.Q8_0, T.Q5_1, T.Q5_0, T.Q4_1, T.Q4_0, T.Q6_K, T.IQ4_NL, T.IQ4_XS)
_MIX_OF_TYPE = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
_FLOAT_LABELS = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}
_NEWER_LABELS = {"Q2_0": 41}  # LLAMA_FTYPE_MOSTLY_Q2_0, which the gguf package does not list yet


class PlannedFile(Protocol):
    """What a file that is made of a model must turn out to be."""

    @property
    def inventory(self) -> Inventory:
        """The model."""

    @property
    def written(self) -> Mapping[str, GGMLQuantizationType]:
        """Type of every tensor in the output."""

    @property
    def file_type(self) -> int | None:
        """The output's label, `general.file_type`; None: it has none."""

    @property
    def file_bytes(self) -> int:
        """The output's size."""


@dataclass(frozen=True)
class Job:
    """A model and a table that fit together, and what comes of them.

    Raises:
        InputError: the table does not list exactly the model's quantizable tensors; a tensor needs imatrix data that is
            not there; the imatrix is of another model; see `Tensor.written_type`.
    """

    inventory: Inventory
    table: OverrideTable
    imatrix: Imatrix | None = None
    imatrix_path: Path | None = None

    def __post_init__(self) -> None:
        check_complete(self.inventory, self.table.types)
        if self.imatrix is not None:
            self.imatrix.matches(self.inventory)
        entries = self.imatrix.entries if self.imatrix else {}
        for name, qtype in self.table.types.items():
            if name not in entries and self.inventory.tensors[name].requires_imatrix(qtype):
                raise InputError(f"tensor {name}: {qtype.name} needs imatrix data, and there is none for it")

    @cached_property
    def written(self) -> dict[str, GGMLQuantizationType]:
        """Type of every tensor in the output."""
        return written_types(self.inventory, self.table.types)

    @cached_property
    def metadata_changes(self) -> dict[str, Scalar | None]:
        """What is set in the model's keys, in the order in which it is set, and removed from them."""
        labels = {"general.quantization_version": GGML_QUANT_VERSION, "general.file_type": self.file_type}
        return metadata_changes(self.imatrix, str(self.imatrix_path or ""), labels)

    @cached_property
    def file_bytes(self) -> int:
        """The output's size."""
        return predict_size(self.inventory, self.table.types, self.metadata_changes)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of the output's tensors, without alignment."""
        tensors = self.inventory.tensors
        return sum(tensors[name].bytes_as(qtype) for name, qtype in self.table.types.items()) + sum(
            tensor.n_bytes for name, tensor in tensors.items() if name not in self.table.types
        )

    @property
    def bpw(self) -> float:
        """Bits a weight over all tensors, kept ones included."""
        return 8 * self.tensor_bytes / self.inventory.n_elements

    def weights(self, tensor: Tensor) -> npt.NDArray[np.float32] | None:
        """What the tensor is quantized under, see `Imatrix.weights_of`."""
        return self.imatrix.weights_of(tensor) if self.imatrix else None

    @property
    def file_type(self) -> int:
        """The label `general.file_type`: of the type that most weights of quantizable tensors have."""
        return file_type_of(self.inventory, {name: self.written[name] for name in self.table.types})


def file_type_of(inventory: Inventory, types: Mapping[str, GGMLQuantizationType]) -> int:
    """The label for a file with these types; of equals, the one whose tensor comes first."""
    weights: Counter[str] = Counter()
    for name, qtype in types.items():
        weights[qtype.name] += inventory.tensors[name].n_elements
    name = weights.most_common(1)[0][0]
    if name in _FLOAT_LABELS:
        return int(_FLOAT_LABELS[name])
    if name in _NEWER_LABELS:
        return _NEWER_LABELS[name]
    return int(LlamaFileType[f"MOSTLY_{_MIX_OF_TYPE.get(name, name)}"])


def base_type(types: Mapping[str, GGMLQuantizationType]) -> GGMLQuantizationType:
    """A base type that no tensor has; the first of all where every one is used, which only old builds mind."""
    used = set(types.values())
    return next((qtype for qtype in BASE_TYPES if qtype not in used), BASE_TYPES[0])


def override_options(tool: Path, table: OverrideTable, table_path: Path) -> list[str]:
    """How this llama-quantize takes a table.

    Raises:
        InputError: it cannot, or it does not run.
    """
    help_text = tool_help(tool)
    if "--tensor-type-file" in help_text:
        return ["--tensor-type-file", str(table_path)]
    if re.search(r"--tensor-type(?![\w-])", help_text):
        return [part for line in table.lines for part in ("--tensor-type", line)]
    raise InputError(f"{tool}: knows neither --tensor-type-file nor --tensor-type: too old")


def build_command(
    tool: Path,
    job: Job,
    table_path: Path,
    output: Path,
    *,
    threads: int | None = None,
    allow_requantize: bool = False,
) -> list[str]:
    """The command that writes `output`.

    Raises:
        InputError: see `check_source` and `override_options`.
    """
    check_source(job, allow_requantize)
    command = [str(tool), *override_options(tool, job.table, table_path)]
    command += ["--override-kv", f"general.file_type=int:{job.file_type}"]
    command += ["--allow-requantize"] if allow_requantize else []
    command += ["--imatrix", str(job.imatrix_path)] if job.imatrix_path else []
    command += [str(job.inventory.path), str(output), base_type(job.table.types).name]
    return command + ([str(threads)] if threads else [])


def partial_path(output: Path) -> Path:
    """Where the output is written until it is verified."""
    return output.with_name(output.name + PARTIAL)


def check_source(job: Job, allow_requantize: bool) -> None:
    """Check that the model may be quantized.

    Raises:
        InputError: it is quantized already and `allow_requantize` is not set.
    """
    if job.inventory.already_quantized and not allow_requantize:
        raise InputError(f"{job.inventory.path.name}: already quantized, which costs quality twice: --allow-requantize")


def check_output(job: PlannedFile, output: Path, overwrite: bool) -> None:
    """Check that the output may be written and fits on the disk.

    Raises:
        InputError: it exists and `overwrite` is not set, it is the model itself, no folder, or too little space.
    """
    if output.exists() and any(output.samefile(header.path) for header in job.inventory.headers):
        raise InputError(f"{output.name}: is the model itself")
    if output.exists() and not overwrite:
        raise InputError(f"{output.name}: exists: --overwrite")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    free = shutil.disk_usage(output.parent).free
    if free < job.file_bytes:
        raise InputError(f"{output.name}: takes {job.file_bytes:,} bytes, and {free:,} are free")


def run_and_verify(job: Job, command: list[str], output: Path, log: Log) -> list[str]:
    """`write_and_verify` with a command of `build_command`.

    Args:
        log: gets every line that llama-quantize prints.

    Raises:
        InputError: llama-quantize fails, with its last error line.
    """
    return write_and_verify(job, output, lambda _: run_tool(command, log))


def write_and_verify(job: PlannedFile, output: Path, write: Callable[[Path], object]) -> list[str]:
    """Have the output written to `partial_path(output)`; rename that when all is as planned.

    Args:
        write: writes the file it is given. Whatever it raises is raised again, and the partial file is removed.

    Returns:
        Differences from the plan. Where there are any, the partial file is left for inspection.

    Raises:
        InputError: what was written is not a GGUF file, see `find_differences`; another run is writing this output.
    """
    with refusals(output), exclusive(output) as partial:
        try:
            write(partial)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        differences = find_differences(partial, job.written, job.file_type, job.file_bytes)
        if not differences:
            put_in_place(partial, output)
    return differences
