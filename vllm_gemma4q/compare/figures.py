"""Figures matched to models by digest, and set apart by how they were measured.

A **group** of text figures shares its framing, texts (by digest), context, windows, engine and what else its protocol
says; divergences also the reference they are from. Figures of two groups are never side by side. Perplexity does not
depend on the reference, so a run without one fills in the groups of the same protocol. Within a group a model may have
been run by another engine than the rest, where one run compared engines: its figures then name it.

Runs of GSM8K are of one group where all is equal that their file says but for the model and how it was served.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_gemma4q.compare.model import Model
from vllm_gemma4q.compare.results import Entry, Gsm8kResults, Json, Results, TextResults, gsm8k_results, text_results
from vllm_gemma4q.errors import InputError

_OWN = ("model", "serve_flags")  # of a run of GSM8K: what differs between those that are compared


@dataclass
class Figures:
    """Of one model in one group; None where nothing was measured."""

    perplexity: Json | None = None
    divergence: Json | None = None
    engine: Json | None = None


@dataclass
class TextGroup:
    """Figures that may be compared.

    Attributes:
        protocol: of the framing alone.
        reference: what divergences are from, `name` and `sha256`; None where nothing was compared.
        reference_perplexity: of it in the same run; None where it was not measured.
        noise_floor: divergence of the reference from itself.
        figures: by the models' SHA-256.
    """

    framing: str
    protocol: Json
    reference: Json | None = None
    reference_perplexity: Json | None = None
    noise_floor: Json | None = None
    figures: dict[str, Figures] = field(default_factory=dict)

    def of(self, model: Model) -> Figures:
        """A model's figures, empty where there are none."""
        return self.figures.get(model.sha256, Figures())

    def is_reference(self, model: Model) -> bool:
        """Whether divergences are from this model."""
        return self.reference is not None and self.reference.get("sha256") == model.sha256

    def title(self) -> str:
        """How it was measured, in words."""
        texts = ", ".join(str(text["name"]) for text in self.protocol["texts"])
        parts = [texts, f"{self.protocol['windows']:,} windows of {self.protocol['context']:,} tokens ({self.framing})"]
        parts.append(engine_name(self.protocol["engine"]))
        if self.protocol.get("dtype", "auto") != "auto":
            parts.append(f"dtype {self.protocol['dtype']}")
        if self.protocol.get("tensor_parallel_size", 1) != 1:
            parts.append(f"tensor parallel {self.protocol['tensor_parallel_size']}")
        if self.reference is not None:
            digest = self.reference.get("sha256")
            known = digest[:8] if isinstance(digest, str) else "which the result file does not identify"
            parts.append(f"divergence from {self.reference.get('name')} ({known})")
        return ", ".join(parts)


@dataclass(frozen=True)
class Gsm8kGroup:
    """Runs of the same questions, asked alike: `protocol` is what they share, `figures` the runs by model."""

    protocol: Json
    figures: dict[str, Json]

    def title(self) -> str:
        questions, prompt = self.protocol["questions"], self.protocol.get("prompt", {})
        shots = f"{prompt['shots']}-shot, " if "shots" in prompt else ""
        return f"{shots}{questions['count']:,} questions ({str(questions.get('sha256'))[:8]}), strict answers"


def engine_name(engine: Json) -> str:
    """`vllm 0.32.0`, or the name alone where the version is not recorded."""
    return " ".join(str(engine[key]) for key in ("name", "version") if engine.get(key))


def text_groups(models: Sequence[Model], results: Sequence[Results]) -> list[TextGroup]:
    """Groups with a figure of one of the models, in the order of the files.

    Raises:
        InputError: two files have different figures for the same.
    """
    groups: dict[tuple[str, str | None], TextGroup] = {}
    for found in text_results(results):
        for framing in found.protocol["windows"]:
            group = _group(groups, found, framing)
            _put(group, "noise_floor", found.noise_floor.get(framing), found, "noise floor")
            for entry in found.entries:
                _add(group, entry, framing, found)
    _share_perplexity(groups)
    known = {model.sha256 for model in models}
    return [group for group in groups.values() if known & group.figures.keys()]


def gsm8k_groups(results: Sequence[Results]) -> list[Gsm8kGroup]:
    """Groups in the order of the files.

    Raises:
        InputError: a model was asked twice, with different results.
    """
    groups: dict[str, Gsm8kGroup] = {}
    for found in gsm8k_results(results):
        run = found.document["run"]
        protocol = {key: value for key, value in run.items() if key not in _OWN}
        group = groups.setdefault(_key(protocol), Gsm8kGroup(protocol, {}))
        figures = {key: found.document[key] for key in ("strict", "flexible")}
        digest = str(found.models[0].get("sha256"))
        if group.figures.setdefault(digest, figures) != figures:
            raise _twice(found, "GSM8K", found.models[0])
    return list(groups.values())


def _group(groups: dict[tuple[str, str | None], TextGroup], found: TextResults, framing: str) -> TextGroup:
    protocol = {**found.protocol, "windows": found.protocol["windows"][framing]}
    texts = [text.get("sha256", text["name"]) for text in protocol["texts"]]
    reference = found.reference
    # A reference without a digest is nobody but its own file's.
    origin = None if reference is None else reference.sha256 or f"{found.path}"
    key = (_key({**protocol, "texts": texts, "framing": framing}), origin)
    model = None if reference is None else reference.model
    group = groups.setdefault(key, TextGroup(framing, protocol, model))
    if reference is not None:
        _put(group, "reference_perplexity", reference.perplexity.get(framing), found, "perplexity of the reference")
    return group


def _add(group: TextGroup, entry: Entry, framing: str, found: TextResults) -> None:
    if entry.sha256 is None or framing not in entry.perplexity:
        return
    figures = group.figures.setdefault(entry.sha256, Figures(engine=entry.engine))
    if figures.engine != entry.engine:
        raise _twice(found, "figures by two engines", entry.model)
    _put(figures, "perplexity", entry.perplexity[framing], found, f"perplexity of {entry.model.get('name')}")
    _put(figures, "divergence", entry.divergence.get(framing), found, f"divergence of {entry.model.get('name')}")


def _put(target: object, key: str, value: Json | None, found: TextResults, what: str) -> None:
    """Set what is not known yet."""
    before = getattr(target, key)
    if before is None:
        setattr(target, key, value)
    elif value is not None and value != before:
        raise InputError(f"{found.path}: {what}: got another than an earlier --result has for the same measurement")


def _share_perplexity(groups: dict[tuple[str, str | None], TextGroup]) -> None:
    """Perplexities of runs without a reference go to the groups of that protocol that have one."""
    for (protocol, origin), group in list(groups.items()):
        others = [other for (key, its), other in groups.items() if key == protocol and its is not None]
        if origin is not None or not others:
            continue
        for other in others:
            for digest, figures in group.figures.items():
                if other.figures.setdefault(digest, figures).perplexity != figures.perplexity:
                    raise InputError(f"perplexity of {digest[:8]}: two --result files differ, expected one measurement")
        del groups[protocol, origin]


def _twice(found: Gsm8kResults | TextResults, what: str, model: Mapping[str, Any]) -> InputError:
    return InputError(f"{found.path}: {what} of {model.get('name')}: an earlier --result has others; give one of them")


def _key(protocol: Json) -> str:
    return json.dumps(protocol, sort_keys=True)


def report_text(group: TextGroup, models: Sequence[Model]) -> dict[str, Any]:
    """What `--json` says of a group: figures by the models' paths, null where nothing was measured."""
    return {
        "framing": group.framing,
        "protocol": group.protocol,
        "reference": group.reference,
        "reference_perplexity": group.reference_perplexity,
        "noise_floor": group.noise_floor,
        "figures": {str(model.path): vars(group.of(model)) for model in models},
    }


def report_gsm8k(group: Gsm8kGroup, models: Sequence[Model]) -> dict[str, Any]:
    """As `report_text`."""
    return {
        "protocol": group.protocol,
        "figures": {str(model.path): group.figures.get(model.sha256) for model in models},
    }
