"""Find a served checkpoint's headers, wherever the engine will take its weights from.

A folder is read as it is. A hub repository is looked up in the local Hugging Face cache; where its weights are
not there yet, the hub serves the headers alone (ranged requests), so nothing is downloaded twice.
"""

from collections.abc import Mapping
from pathlib import Path

from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.module_headers import Header


def find_headers(model: str, revision: str | None) -> Mapping[str, Header]:
    """dtype and shape of every tensor of a model, by full name.

    Args:
        model: a folder, or a hub repository such as `google/gemma-4-31b-it`.
        revision: a hub branch, tag or commit; None means the default branch.

    Raises:
        InputError: nothing there can be read as a safetensors checkpoint.
    """
    folder = Path(model) if Path(model).is_dir() else _cached_folder(model, revision)
    if folder is not None:
        return open_checkpoint(folder).tensors
    return _remote_headers(model, revision)


def _cached_folder(repository: str, revision: str | None) -> Path | None:
    """The repository's snapshot in the Hugging Face cache, None unless its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def _remote_headers(repository: str, revision: str | None) -> Mapping[str, Header]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, OfflineModeIsEnabled

    try:
        metadata = get_safetensors_metadata(repository, revision=revision)
    except (HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, OfflineModeIsEnabled, OSError) as error:
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
