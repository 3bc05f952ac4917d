"""What a card says of a mixture that lost experts: how many stay, how they were chosen, what else was changed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.doctor.subject import Scheme, Subject, open_subject
from vllm_gemma4q.errors import InputError

_METADATA = "expert_drop_metadata.json"  # `pruned_moe.prune.METADATA`, which imports torch
_NO_OPTIONS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Experts:
    """Experts of a pruned mixture.

    Attributes:
        before: of every layer.
        kept: by layer, those that stay.
    """

    before: int
    kept: tuple[int, ...]

    @property
    def sentence(self) -> str:
        """How many of how many."""
        least, most = min(self.kept), max(self.kept)
        mean = sum(self.kept) / len(self.kept)
        count = str(most) if least == most else f"{least} to {most}, {mean:.1f} on average,"
        return f"{len(self.kept)} layers keep {count} of {self.before} experts."


@dataclass(frozen=True)
class Stored:
    """What the checkpoint's own files say, whichever command wrote it last.

    Attributes:
        experts: of a pruned mixture; None of any other model.
        scheme: of its weights; None where they are not quantized, or as nobody here quantizes.
    """

    experts: Experts | None = None
    scheme: str | None = None


NOTHING = Stored()


def stored_in(folder: Path) -> Stored:
    """Read a checkpoint.

    Raises:
        InputError: see `open_subject`.
    """
    subject = open_subject(folder, None)
    known = subject.scheme not in (Scheme.UNQUANTIZED, Scheme.OTHER)
    return Stored(_experts_of(subject), subject.scheme.value if known else None)


def _experts_of(subject: Subject) -> Experts | None:
    """By the file that `prune` writes and later commands copy; of another form or model, it says nothing."""
    try:
        content = read_json(subject.folder / _METADATA)
    except InputError:
        return None
    before, kept = content.get("num_experts"), content.get("per_layer_keep")
    if not isinstance(before, int) or not isinstance(kept, dict):
        return None
    counts = [layer.num_experts for layer in subject.architecture.layers]
    lists = [kept.get(str(layer)) for layer in range(len(counts))]
    found = tuple(len(ids) for ids in lists if isinstance(ids, list))
    return Experts(before, found) if list(found) == counts and max(found) <= before else None


def pruned_by(details: Mapping[str, Any]) -> Experts:
    """Of the manifest that `prune` wrote. Raises KeyError, TypeError or ValueError: it is damaged."""
    found = details["experts"]
    experts = Experts(int(found["before"]), tuple(map(int, found["after"])))
    if not experts.kept:
        raise ValueError("experts: no layer")
    return experts


def how(details: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on the choice and on what else was changed, from the manifest that `prune` wrote."""
    if "recipe" in details:
        given = details.get("statistics")
        calibrated = "" if given is None else f" on statistics of {_texts(given)}"
        spread = ", more in layers where dropping costs more" if details.get("spread") else ""
        yield f"Chosen by the recipe `{details['recipe']}`{calibrated}{spread}."
    elif details.get("drop_map"):
        yield f"Chosen by the drop map `{details['drop_map']}`."
    if "refit" in details:
        yield f"`down_proj` of the experts that stay was refitted on {_texts(details['refit'])}."
    yield from _options(details.get("options") or _NO_OPTIONS)


def _options(options: Mapping[str, Any]) -> Iterator[str]:
    if (boost := options.get("shared_boost", 1)) != 1:
        yield f"The dense MLP's share is multiplied by {boost:g}."
    if share := options.get("soft_transfer", 0):
        yield f"{share:g} of dropped router rows were added to their nearest."
    if (top_k := options.get("top_k")) is not None:
        yield f"Experts a token: {top_k}."


def _texts(found: Mapping[str, Any]) -> str:
    texts: Sequence[Mapping[str, Any]] = found["texts"]
    return f"{', '.join(text['name'] for text in texts)} ({found['samples']:,} samples)"
