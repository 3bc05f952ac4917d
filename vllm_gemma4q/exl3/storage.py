"""quantization_config.json, which ExLlamaV3 writes beside a checkpoint: what each tensor should look like.

Old checkpoints have none. The headers of the weights decide; what the file says otherwise is told.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.module_headers import Header

FILE = "quantization_config.json"
_KEY = "tensor_storage"


def read_storage(model: str, revision: str | None) -> Mapping[str, Any]:
    """Its `tensor_storage`, by module; empty where there is no such file.

    Args:
        model: a folder, or a hub repository.
        revision: a hub branch, tag or commit; None means the default branch.

    Raises:
        InputError: the file is no JSON, or its entry no object.
    """
    try:
        content = _read(model, revision)
    except ValueError as error:
        raise InputError(f"{FILE}: got no JSON ({error}), expected an object") from error
    storage = content.get(_KEY, {}) if isinstance(content, dict) else content
    if not isinstance(storage, dict):
        raise InputError(f"{FILE}: {_KEY}: got {type(storage).__name__}, expected an object")
    return storage


def _read(model: str, revision: str | None) -> Any:
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    if Path(model).is_dir() and not Path(model, FILE).is_file():
        return {}  # vLLM would take the folder for a repository
    found = get_hf_file_to_dict(FILE, model, revision)
    return {} if found is None else found


def disagreements(storage: Mapping[str, Any], tensors: Mapping[str, Header]) -> list[str]:
    """Tensors that the headers do not have in the shape that the file says, by name."""
    found = []
    for module in storage.values():
        stored = module.get("stored_tensors") if isinstance(module, Mapping) else None
        for name, entry in stored.items() if isinstance(stored, Mapping) else ():
            header = tensors.get(name)
            shape = entry.get("shape") if isinstance(entry, Mapping) else None
            if header is None or shape != list(header.shape):
                found.append(name)
    return sorted(found)
