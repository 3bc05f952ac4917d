"""Finding llama.cpp's programs (llama-quantize, llama-imatrix, llama-perplexity) on this machine.

Order: the folder that the user names, and then nothing else; PATH; the cache folder, where
`environment/build_llama_cpp.py` of the source repository builds them.
"""

import os
import shutil
from pathlib import Path

from gguf_mixed.errors import InputError

_SUBFOLDERS = ("", "bin", "build/bin")


def cache_folder() -> Path:
    """Where a build of our own is kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "gemma4q" / "llama.cpp"


def find_tool(name: str, folder: Path | None = None) -> Path:
    """Path of one of llama.cpp's programs.

    Args:
        name: such as llama-quantize.
        folder: a llama.cpp checkout, its build folder, or the folder of its programs.

    Raises:
        InputError: not found; says where it was looked for.
    """
    if folder is not None:
        found = _in_folder(name, folder)
        if found is None:
            raise InputError(f"{name}: not in {folder}, nor in bin or build/bin below it")
        return found
    on_path = shutil.which(name)
    found = Path(on_path) if on_path else _in_folder(name, cache_folder())
    if found is None:
        raise InputError(f"{name}: not on PATH and not in {cache_folder()}; name its folder with --llama-cpp DIR")
    return found


def _in_folder(name: str, folder: Path) -> Path | None:
    for subfolder in _SUBFOLDERS:
        found = shutil.which(name, path=folder / subfolder)
        if found:
            return Path(found)
    return None
