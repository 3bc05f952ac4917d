"""Find a served checkpoint's headers, wherever the engine will take its weights from.

A folder is read as it is. A hub repository is looked up in the local Hugging Face cache; where its weights are
not there yet, the hub serves the headers alone (ranged requests), so nothing is downloaded twice. Not done: weights in
object storage.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.reader import CONFIG, INDEX, PICKLE_SUFFIXES
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.module_headers import Header

_WEIGHTS = frozenset({".safetensors", *PICKLE_SUFFIXES})


def find_headers(model: str, revision: str | None) -> Mapping[str, Header]:
    """dtype and shape of every tensor of a model, by full name.

    Args:
        model: a folder, or a hub repository such as `google/gemma-4-31b-it`.
        revision: a hub branch, tag or commit; None means the default branch.

    Raises:
        InputError: nothing there can be read as a safetensors checkpoint.
    """
    if Path(model).is_dir():
        _refuse_object_storage(Path(model))
        return open_checkpoint(model).tensors
    folder = _cached_folder(model, revision)
    return _remote_headers(model, revision) if folder is None else open_checkpoint(folder).tensors


def _refuse_object_storage(folder: Path) -> None:
    """Raises InputError where the engine has fetched all but the weights, which it streams from elsewhere."""
    if (folder / CONFIG).is_file() and not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        raise InputError(
            f"{folder}: got a configuration without weights, expected *.safetensors beside it: weights in object "
            "storage (s3://, gs://) cannot be looked into; copy the checkpoint to a disk, or leave this plugin out by "
            "VLLM_PLUGINS"
        )


def _cached_folder(repository: str, revision: str | None) -> Path | None:
    """The repository's snapshot in the Hugging Face cache, None unless all of its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    found: str | None
    try:
        found = snapshot_download(repository, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        # Newer versions refuse a snapshot that lacks any file of the repository, and the engine fetches what it needs.
        found = getattr(error, "snapshot_path", None)
    except (HfHubHTTPError, HFValidationError):
        found = None
    return Path(found) if found is not None and _has_all_weights(Path(found)) else None


def _has_all_weights(folder: Path) -> bool:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
        return all((folder / shard).is_file() for shard in shards)
    files = [path.name for path in folder.glob("*.safetensors")]
    return len(files) == 1 and "-of-" not in files[0]  # a shard without an index: the engine is not done


def _remote_headers(repository: str, revision: str | None) -> Mapping[str, Header]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError

    # A lost connection raises what the hub's own error is based on, of requests, httpx or httpx2, by version.
    bases = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    expected: tuple[type[Exception], ...] = (*bases, HFValidationError, NotASafetensorsRepoError, OSError)
    try:
        metadata = get_safetensors_metadata(repository, revision=revision)
    except expected as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{repository}: cannot read the headers of its weights: {reason}") from error
    return {
        name: _Remote(tensor.dtype, tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


class _Remote:
    """The header of a tensor on the hub."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
