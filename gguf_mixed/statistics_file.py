"""What `gemma4q calibrate` writes, as an importance matrix. The format is documented in
`vllm_gemma4q/calibration/statistics.py`; here only sums of inputs are read.

llama-imatrix counts the same things on the same tokens: sums over tokens of each channel's square, experts one by one.
Left out like there: the output layer, which only `--process-output` adds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gguf_mixed import strict_json
from gguf_mixed.errors import InputError
from gguf_mixed.hf_names import GEMMA4, HfNames, n_layers_of
from gguf_mixed.imatrix import Imatrix, ImatrixEntry

FORMAT = "gemma4q statistics 1"
_OUTPUT = "lm_head"


def is_statistics(path: Path) -> bool:
    """Whether a file says that it is one."""
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def read_as_imatrix(path: Path) -> Imatrix:
    """The imatrix that a statistics file holds; a chunk is a sample.

    Raises:
        InputError: unreadable, of another kind, damaged, or with a linear that GGUF has no name for.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path.name}: got format {metadata.get('format')}, expected {FORMAT}")
            details, stored_as = _parse(path, metadata)
            names = HfNames(GEMMA4, n_layers_of(list(stored_as)))
            entries = {
                _gguf_name(path, names, module): _entry(file, stored)
                for module, stored in stored_as.items()
                if module != _OUTPUT
            }
            return Imatrix(
                entries,
                tuple(str(text["name"]) for text in details["texts"]),
                _count(details, "samples"),
                _count(details, "max_length"),
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name}: cannot be read as a statistics file: {error}") from error


def _parse(path: Path, metadata: Mapping[str, str]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    try:
        details, stored_as = (strict_json.parse(metadata[key].encode()) for key in ("details", "stored_as"))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path.name}: damaged metadata: {error}") from error
    if not isinstance(details, dict) or not isinstance(stored_as, dict):
        raise InputError(f"{path.name}: damaged metadata: details and stored_as must be objects")
    return details, stored_as


def _count(details: Mapping[str, Any], key: str) -> int:
    """Raises KeyError or ValueError: it is missing, or nothing that a GGUF can say."""
    if type(count := details[key]) is not int or not 0 <= count < 2**32:
        raise ValueError(f"{key} is {count!r}, expected a count")
    return count


def _gguf_name(path: Path, names: HfNames, module: str) -> str:
    name = names.gguf(module)
    if name is None:
        raise InputError(f"{path.name}: GGUF has no name for {module}")
    return name


def _entry(file: Any, stored: str) -> ImatrixEntry:
    squares, totals, counts = (file.get_tensor(f"{stored}.input_{part}") for part in ("sum_squares", "sum", "count"))
    return ImatrixEntry(squares.astype(np.float32), counts, totals.astype(np.float32))
