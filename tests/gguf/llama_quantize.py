"""What a real llama-quantize does, for comparison: run it, or read what it did when the record was made.

`python tests/gguf/llama_quantize.py` rewrites the record next to this file with the llama-quantize it finds.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, GGMLQuantizationType, type_name
from gguf_files import gemma4_metadata, small_moe, write_gguf

from gguf_mixed.imatrix import Imatrix, ImatrixEntry
from gguf_mixed.imatrix_gguf import write_imatrix
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.tensors import Inventory, read_inventory

RECORD = Path(__file__).with_name("llama_quantize_b11434.json")
# The names as given are stored in the output, so they must not depend on where the test runs.
MODEL, IMATRIX, OUTPUT = "model.gguf", "imatrix.gguf", "output.gguf"
_LINE = re.compile(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\w+), .*?(?:\((\w+)\))?$", re.MULTILINE)


def small_model(folder: Path, alignment: int | None = None) -> Path:
    """A model of `gguf_files.small_moe` with weights, and metadata that exercises how keys are copied."""
    metadata = gemma4_metadata(2, 256, 2112, 3) | {
        "general.name": "cut\0here", "general.alias": "été", "general.quantization_version": "replaced",
        "tokenizer.ggml.tokens": ["x", "\0y", "ééé"] * 700, "test.flags": [True, False], "test.long": [1.5] * 1500,
    }  # fmt: skip
    return write_gguf(folder / MODEL, small_moe(), metadata, random_weights=True, alignment=alignment)


def imatrix_of(inventory: Inventory) -> Imatrix:
    """Data for every quantizable tensor, one expert never visited."""
    entries = {}
    for tensor in inventory.tensors.values():
        if not tensor.kept_because:
            counts = np.arange(tensor.n_matrices, dtype=np.int64) * 7 if tensor.n_matrices > 1 else np.array([7])
            sums = np.full((tensor.n_matrices, tensor.row_length), 2.5, np.float32)
            entries[tensor.name] = ImatrixEntry(sums, counts)
    return Imatrix(entries, ("calibration.txt", "other.txt"), 7, 512)


def run(
    folder: Path,
    asked: Mapping[str, GGMLQuantizationType],
    *arguments: str,
    dry: bool = False,
    base: str | None = None,
    model: str = MODEL,
) -> subprocess.CompletedProcess[str]:
    """Quantize `model` in `folder` to OUTPUT with one override a tensor, above a base type that is in none of them."""
    base = base or ("Q4_0" if GGMLQuantizationType.Q8_0 in asked.values() else "Q8_0")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.writelines(f"^{re.escape(name)}$={type_name(qtype)}\n" for name, qtype in asked.items())
        overrides.flush()
        files = ["--dry-run", model] if dry else [model, OUTPUT]
        command = [find_tool("llama-quantize"), "--tensor-type-file", overrides.name, *arguments, *files, base, "1"]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def types_of_dry_run(log: str) -> dict[str, GGMLQuantizationType]:
    """Type of every tensor as a dry run reports it."""
    return {name: GGMLQuantizationType[(new or old).upper()] for name, old, new in _LINE.findall(log)}


def outcomes(folder: Path, types: Iterable[GGMLQuantizationType] = QUANTIZABLE_TYPES) -> dict[str, dict[str, object]]:
    """What llama-quantize makes of the small model when every tensor is asked to become one type.

    `size` is the file's, `types` those of its tensors; `stops` says that it failed instead.
    """
    inventory = read_inventory(small_model(folder))
    write_imatrix(imatrix_of(inventory), folder / IMATRIX)
    found: dict[str, dict[str, object]] = {}
    for qtype in types:
        (folder / OUTPUT).unlink(missing_ok=True)
        finished = run(folder, dict.fromkeys(inventory.tensors, qtype), "--imatrix", IMATRIX)
        if finished.returncode:
            found[qtype.name] = {"stops": True}
        else:
            written = read_inventory(folder / OUTPUT)
            names = {name: tensor.qtype.name for name, tensor in written.tensors.items()}
            found[qtype.name] = {"size": (folder / OUTPUT).stat().st_size, "types": dict(sorted(names.items()))}
    return found


def record() -> dict[str, dict[str, object]]:
    """The recorded `outcomes`, of llama.cpp b11434."""
    return json.loads(RECORD.read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        RECORD.write_text(json.dumps(outcomes(Path(scratch)), indent=1) + "\n")
