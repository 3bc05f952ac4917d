"""config.json of a pruned checkpoint: counts of experts, top-k, and lists that name experts by their numbers.

`num_experts` is the largest count of any layer. Where counts differ, `num_experts_per_layer` lists them, one a layer;
stock engines do not know that key.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.architecture import EXPERT_SHARDS, EXPERTS_PER_LAYER
from vllm_gemma4q.errors import InputError

_QUANTIZATION = "quantization_config"
_EXPERT = re.compile(r"(?P<before>(?:^|\.)layers\.(?P<layer>\d+)\.experts\.)(?P<expert>\d+)(?=\.|$)")


def pruned_config(config: Mapping[str, Any], retained: RetainedExperts, top_k: int | None = None) -> dict[str, Any]:
    """The configuration of what stays; `top_k` None keeps the source's.

    Raises:
        InputError: a pattern under `quantization_config` tells experts apart by number (see `check_patterns`).
    """
    nested = "text_config" in config
    text = _with_counts(config["text_config"] if nested else config, retained, top_k)
    text = _renumbered_quantization(text, retained)
    return _renumbered_quantization({**config, "text_config": text}, retained) if nested else text


def _with_counts(text: Mapping[str, Any], retained: RetainedExperts, top_k: int | None) -> dict[str, Any]:
    result = {key: value for key, value in text.items() if key != EXPERTS_PER_LAYER}
    result["num_experts"] = max(retained.counts)
    if not retained.is_uniform:
        result[EXPERTS_PER_LAYER] = list(retained.counts)
    if top_k is not None:
        result["top_k_experts"] = top_k
    return result


def _renumbered_quantization(config: Mapping[str, Any], retained: RetainedExperts) -> dict[str, Any]:
    if _QUANTIZATION not in config:
        return dict(config)
    for pattern in _strings(config[_QUANTIZATION]):
        check_pattern(pattern, retained)
    return {**config, _QUANTIZATION: renumbered(config[_QUANTIZATION], retained)}


def renumbered(value: Any, retained: RetainedExperts) -> Any:
    """Any JSON value with experts' new numbers in all names; list items and keys that name a dropped one are gone."""
    if isinstance(value, str):
        return new_name(value, retained) or value
    if isinstance(value, list):
        return [renumbered(item, retained) for item in value if not _is_dropped(item, retained)]
    if isinstance(value, Mapping):
        return {
            new_name(key, retained): renumbered(item, retained)
            for key, item in value.items()
            if not _is_dropped(key, retained)
        }
    return value


def new_name(name: str, retained: RetainedExperts) -> str | None:
    """A module's or tensor's name after the prune; None for what belongs to a dropped expert."""
    match = _EXPERT.search(name)
    if match is None:
        return name
    layer, expert = int(match["layer"]), int(match["expert"])
    if layer >= len(retained.kept) or expert not in retained.kept[layer]:
        return None
    return f"{name[: match.start('expert')]}{retained.kept[layer].index(expert)}{name[match.end('expert') :]}"


def check_pattern(pattern: str, retained: RetainedExperts) -> None:
    """A regular expression (`re:`) or glob is kept as it is, so it must treat each expert after the prune like before.

    Raises:
        InputError: it tells experts apart by number, or is no regular expression.
    """
    matches = _matcher(pattern)
    if matches is None:
        return
    for layer, kept in enumerate(retained.kept):
        for new, old in enumerate(kept):
            for linear in EXPERT_SHARDS if new != old else ():
                before, after = (f"model.language_model.layers.{layer}.experts.{n}.{linear}" for n in (old, new))
                if matches(before) != matches(after):
                    raise InputError(
                        f"config.json: {_QUANTIZATION}: pattern {pattern!r} tells experts {old} and {new} of layer "
                        f"{layer} apart, which will be renumbered; expected names instead"
                    )


def _matcher(pattern: str) -> Callable[[str], bool] | None:
    try:
        if pattern.startswith("re:"):
            compiled = re.compile(pattern.removeprefix("re:"))
        elif any(character in pattern for character in "*?["):
            compiled = re.compile(fnmatch.translate(pattern))
        else:
            return None
    except re.error as error:
        raise InputError(f"config.json: {_QUANTIZATION}: {pattern!r} is no regular expression: {error}") from error
    return lambda name: compiled.match(name) is not None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _is_dropped(value: Any, retained: RetainedExperts) -> bool:
    return isinstance(value, str) and new_name(value, retained) is None
