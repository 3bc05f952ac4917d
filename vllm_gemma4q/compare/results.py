"""Result files in one form, whichever command printed them with `--json`.

    gemma4q evaluate perplexity, divergence    {"protocol", "checkpoints": {PATH: ..}, "reference", "noise_floor"}
    gemma4q sweep                              {"protocol", "points": {NAME: ..}, "reference": figures, "source"}
    gemma4q evaluate gsm8k                     {"run", "strict", "flexible", ..}
    gguf-mixed divergence                      {"format", "reference", "text", "chunks", "context", "models": [..]}
    gguf-mixed sweep                           {"format", "inputs", "evaluation", "tiers": [..]}

Figures are of a model where the digest beside them says so, never by name. Those without one (`gemma4q evaluate gsm8k`
of a running server, files of earlier versions) are of nobody.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_mixed import base_file, sweep_results
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.errors import InputError

Json = Mapping[str, Any]
RAW = "raw"  # llama-perplexity's only framing
_KINDS = "what gemma4q evaluate .. --json, gemma4q sweep .. --json or gguf-mixed divergence|sweep .. --json printed"


@dataclass(frozen=True)
class Entry:
    """Figures of one model.

    Attributes:
        model: `name` and `sha256`, either of which may be absent.
        perplexity: by framing: `value`, `error`, `positions`.
        divergence: by framing: `mean_kld`, `error`, `p99_kld`, `same_top` and more.
        engine: what ran it, where that is not the protocol's.
    """

    model: Json
    perplexity: Mapping[str, Json] = field(default_factory=dict)
    divergence: Mapping[str, Json] = field(default_factory=dict)
    engine: Json | None = None

    @property
    def sha256(self) -> str | None:
        """What names the model."""
        found = self.model.get("sha256")
        return found if isinstance(found, str) else None


@dataclass(frozen=True)
class TextResults:
    """Perplexity, and perhaps divergence, of several models under one protocol.

    Attributes:
        protocol: `texts`, `context`, `windows` by framing, `engine` and more.
        entries: the reference's too, where it was measured with the rest.
        reference: what divergences are from; None where there are none.
        noise_floor: by framing, divergence of the reference from itself.
    """

    path: Path
    protocol: Json
    entries: tuple[Entry, ...]
    reference: Entry | None
    noise_floor: Mapping[str, Json] = field(default_factory=dict)

    @property
    def models(self) -> list[Json]:
        return [entry.model for entry in self.entries]


@dataclass(frozen=True)
class Gsm8kResults:
    """One run of questions: `document` is the whole file."""

    path: Path
    document: Json

    @property
    def models(self) -> list[Json]:
        found = self.document["run"].get("model")
        return [found if isinstance(found, Mapping) else {"name": found}]


Results = TextResults | Gsm8kResults


def read_results(paths: Sequence[Path], models: Sequence[Mapping[str, str]], whose: str) -> list[Results]:
    """Result files, each of which must hold figures of one of `models` at least.

    Args:
        models: `name` and `sha256` of each.
        whose: what `models` are, for the error.

    Raises:
        InputError: a file cannot be read, is of another kind, is damaged, or is of other models only.
    """
    results = [_read(path) for path in paths]
    wanted = {model["sha256"] for model in models}
    for each in results:
        if not any(model.get("sha256") in wanted for model in each.models):
            found = ", ".join(map(_named, each.models)) or "nothing"
            raise InputError(f"{each.path}: figures of {found}, expected of {whose}, {', '.join(map(_named, models))}")
    return results


def _read(path: Path) -> Results:
    document = read_json(path)
    try:
        if "run" in document and "strict" in document:
            return _gsm8k(path, document)
        if document.get("format") == base_file.FORMAT and "models" in document:
            return _checked(_gguf_divergence(path, document))
        if document.get("format") == sweep_results.FORMAT:
            return _checked(_gguf_sweep(path, document))
        if "protocol" in document and ("checkpoints" in document or "points" in document):
            return _checked(_evaluate(path, document))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {type(error).__name__}: {error}, expected {_KINDS}") from error
    raise InputError(f"{path}: got keys {sorted(document)[:5]}, expected {_KINDS}")


def _checked(results: TextResults) -> TextResults:
    """Results that hold all that is read of them later. Raises KeyError or TypeError: they do not."""
    _require(results.protocol, "context", "engine")
    _require(results.protocol["engine"], "name")
    for text in results.protocol["texts"]:
        _require(text, "name")
    for entry in results.entries:
        for found in entry.perplexity.values():
            _require(found, "value", "error", "positions")
    for found in [
        *results.noise_floor.values(),
        *(each for entry in results.entries for each in entry.divergence.values()),
    ]:
        _require(found, "mean_kld", "error", "p99_kld", "same_top")
    return results


def _gsm8k(path: Path, document: Json) -> Gsm8kResults:
    _require(document["run"]["questions"], "count")
    for parse in ("strict", "flexible"):
        _require(document[parse], "accuracy", "interval")
    return Gsm8kResults(path, document)


def _require(found: Json, *keys: str) -> None:
    for key in keys:
        _ = found[key]


def _evaluate(path: Path, document: Json) -> TextResults:
    measured = {**document.get("checkpoints", {}), **document.get("points", {})}
    entries = {name: _entry(found) for name, found in measured.items()}
    reference = document.get("reference")
    if isinstance(reference, str):
        original: Entry | None = entries[reference]
    elif reference is not None:  # of a sweep
        original = _entry({"model": {"name": Path(document["source"]).name}, **reference})
        entries[""] = original
    else:
        original = None
    floor = {name: document.get("noise_floor", {}).get(name) for name in document["protocol"]["windows"]}
    known = {name: found for name, found in floor.items() if isinstance(found, Mapping)}
    return TextResults(path, document["protocol"], tuple(entries.values()), original, known)


def _entry(found: Json) -> Entry:
    return Entry(found.get("model") or {}, found["perplexity"], found.get("divergence", {}), found.get("engine"))


def _gguf_divergence(path: Path, document: Json) -> TextResults:
    entries = tuple(
        _gguf_entry({"name": Path(each["model"]).name, "sha256": each.get("sha256")}, each["divergence"])
        for each in document["models"]
    )
    return TextResults(path, _gguf_protocol(document), entries, Entry(document["reference"]))


def _gguf_sweep(path: Path, document: Json) -> TextResults:
    if document["evaluation"] is None:
        raise InputError(f"{path}: holds plans only, expected a sweep that was measured (--text)")
    entries = tuple(
        _gguf_entry(each.get("model") or {"name": each["name"]}, each["measured"])
        for each in document["tiers"]
        if each["measured"]
    )
    return TextResults(path, _gguf_protocol(document["evaluation"]), entries, Entry(document["inputs"]["model"]))


def _gguf_protocol(found: Json) -> Json:
    """llama-perplexity's figures do not say which llama.cpp it was."""
    windows = {RAW: found["chunks"]}
    return {"texts": [found["text"]], "context": found["context"], "windows": windows, "engine": {"name": "llama.cpp"}}


def _gguf_entry(model: Json, found: Json) -> Entry:
    ppl = {"value": found["perplexity"], "error": found["perplexity_error"], "positions": found["positions"]}
    kld = {"mean_kld": found["mean_kld"], "error": found["mean_kld_error"]}
    kept = ("median_kld", "p99_kld", "p999_kld", "max_kld", "same_top", "positions")
    return Entry(model, {RAW: ppl}, {RAW: {**kld, **{key: found[key] for key in kept}}})


def _named(model: Mapping[str, Any]) -> str:
    digest = model.get("sha256")
    return f"{model.get('name')} ({str(digest)[:8] if digest else 'no digest'})"


def text_results(results: Sequence[Results]) -> Iterator[TextResults]:
    """Those with perplexity or divergence."""
    return (each for each in results if isinstance(each, TextResults))


def gsm8k_results(results: Sequence[Results]) -> Iterator[Gsm8kResults]:
    """Those of questions."""
    return (each for each in results if isinstance(each, Gsm8kResults))
