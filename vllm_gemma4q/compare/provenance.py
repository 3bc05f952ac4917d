"""What manifests and sidecars say of the files that models were made from: whether all of a comparison have one origin.

A manifest of gemma4q holds the digests of all files it read; the sidecar of an override table, which `gguf-mixed sweep`
leaves as NAME.txt.json beside NAME.gguf, that of the source's header. Chains are followed: a checkpoint quantized from
a pruned one that is compared too is of that one's origin. Not done: hashing weights, so an original is recognised by
config.json and the names and sizes of its shards. Nothing recorded relates a GGUF to a checkpoint, nor says anything of
files that other tools wrote: nothing is said of these.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf_mixed.identity import file_sha256
from gguf_mixed.sidecar import header_sha256
from gguf_mixed.tensors import Inventory
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.reader import CONFIG
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.errors import InputError

if TYPE_CHECKING:
    from vllm_gemma4q.compare.model import Model

Files = Mapping[str, tuple[int, str | None]]  # bytes, and SHA-256 where it is known
_QUANTIZING = frozenset({"quark-int8", "fp8-static", "exl3"})
_HEADER = "header"


@dataclass(frozen=True)
class Provenance:
    """Of one model.

    Attributes:
        scheme: as the manifest has it, where that is a format; None elsewhere.
        files: the model's own.
        source: those it was made from; None where nothing says so.
        is_original: whether nothing says that it was made from anything, and it is not quantized.
    """

    scheme: str | None
    files: Files
    source: Files | None
    is_original: bool


def of_checkpoint(checkpoint: Checkpoint) -> Provenance:
    """From the manifest, where there is one. Raises InputError: it is damaged."""
    path = checkpoint.folder / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    try:
        return _of_manifest(checkpoint, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def _of_manifest(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> Provenance:
    config = checkpoint.folder / CONFIG
    own = {shard.name: (shard.stat().st_size, None) for shard in checkpoint.shards}
    named = str(manifest.get("identity", {}).get("scheme"))
    return Provenance(
        scheme=named if named in _QUANTIZING else None,
        files=_decisive(manifest["output"])
        if manifest
        else {**own, CONFIG: (config.stat().st_size, file_sha256(config))},
        source=_decisive(manifest["source"]) if manifest else None,
        is_original=not manifest and "quantization_config" not in checkpoint.config,
    )


def of_gguf(inventory: Inventory) -> Provenance:
    """From the sidecar of the table that the file was written by, where it lies beside it.

    Raises:
        InputError: the sidecar is damaged.
    """
    path = inventory.path.with_suffix(".txt.json")
    try:
        made_of = read_json(path)["model"] if path.is_file() else None
        source = None if made_of is None else {_HEADER: (int(made_of["bytes"]), str(made_of["header_sha256"]))}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    files = {_HEADER: (inventory.file_bytes, header_sha256(inventory))}
    return Provenance(None, files, source, source is None and not inventory.already_quantized)


def describe_origins(models: Sequence["Model"]) -> list[str]:
    """Lines for the user where models come from different origins; none where they agree or nothing is recorded."""
    return [line for kind in (False, True) for line in _origins([model for model in models if model.is_gguf is kind])]


def _origins(models: Sequence["Model"]) -> Iterator[str]:
    known = [model for model in models if model.provenance.source is not None or model.provenance.is_original]
    roots = {model.path: _root(model, known) for model in known}
    if len({_key(root) for root in roots.values()}) < 2:
        return
    for model in known:
        if model.provenance.source is not None:
            yield f"{model.name} was made from {_named(roots[model.path])}"


def _root(model: "Model", models: Sequence["Model"]) -> "Model":
    """What it was made from in the end, among those given; one whose source is not among them ends a chain."""
    seen = {model.path}
    while model.provenance.source is not None:
        source = model.provenance.source
        parent = next(
            (each for each in models if each.path not in seen and _match(source, each.provenance.files)), None
        )
        if parent is None:
            return model
        seen.add(parent.path)
        model = parent
    return model


def _key(root: "Model") -> tuple[tuple[str, int, str | None], ...]:
    files = root.provenance.files if root.provenance.source is None else root.provenance.source
    return tuple(sorted((name, *fact) for name, fact in files.items()))


def _named(root: "Model") -> str:
    if root.provenance.source is None:
        return root.name
    name, (_, digest) = min(root.provenance.source.items())
    return f"files that are none of these, {name} {str(digest)[:8]}"


def _match(source: Files, files: Files) -> bool:
    return source.keys() == files.keys() and all(
        size == files[name][0] and (digest is None or files[name][1] in (None, digest))
        for name, (size, digest) in source.items()
    )


def _decisive(files: Mapping[str, Any]) -> Files:
    """Weights and configuration; tokenizers and the like may differ."""
    return {
        name: (int(fact["bytes"]), str(fact["sha256"]))
        for name, fact in files.items()
        if name.endswith(".safetensors") or name == CONFIG
    }
