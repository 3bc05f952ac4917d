"""Lists of modules that are not quantized, as any tool writes them.

An entry may be a full name (Hugging Face's or vLLM's), a part of one at dots (`vision_tower`, `self_attn.q_proj`,
`model.language_model.layers.0`), the name of a fused linear (`qkv_proj`), a glob, or a `re:` pattern matched from
the start, as compressed-tensors does. vLLM 0.32 reads full names only, and ignores the others without a word.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator

from vllm_gemma4q.architecture import EXPERT_SHARDS, FUSED_SHARDS, Role, role_of
from vllm_gemma4q.module_headers import relative_name
from vllm_gemma4q.name_patterns import compile_pattern

_ROOTS = ("", "model.language_model.", "language_model.model.", "model.", "language_model.")
_TOWERS = (Role.VISION, Role.EMBED_VISION, Role.AUDIO)


class IgnoreList:
    """One list, asked about modules by name."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises InputError where a pattern is not one (see `compile_pattern`)."""
        self._names: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        for entry in entries:
            if entry.startswith("re:"):
                self._patterns.append(compile_pattern(entry))
            elif any(character in entry for character in "*?["):
                self._patterns.append(re.compile(fnmatch.translate(entry)))
            else:
                self._names.add(entry.strip("."))

    def covers(self, module: str) -> bool:
        """Whether the list means a module, given by its full name in the checkpoint or relative to the root."""
        aliases = tuple(_aliases(module))
        if any(part in self._names for alias in aliases for part in _parts(alias)):
            return True
        return any(pattern.match(alias) for pattern in self._patterns for alias in aliases)


def _parts(name: str) -> Iterator[str]:
    """Every run of components: `a.b.c` -> a, a.b, a.b.c, b, b.c, c."""
    components = name.split(".")
    for start in range(len(components)):
        for end in range(start + 1, len(components) + 1):
            yield ".".join(components[start:end])


def _aliases(module: str) -> Iterator[str]:
    """Every name by which a list may mean a module: the checkpoint's, the engine's, fused and per expert."""
    if role_of(f"{module}.weight") in _TOWERS:
        yield module
        yield module.removeprefix("model.")
        return
    relative = relative_name(module)
    parent, _, last = relative.rpartition(".")
    names = [relative, *(f"{parent}.{fused}" for fused, shards in FUSED_SHARDS.items() if last in shards)]
    if last == "experts":
        names += [f"{relative}.gate_up_proj", f"{relative}.down_proj"]
        names += [f"{relative}.0.{shard}" for shard in EXPERT_SHARDS]
    for root in _ROOTS:
        for name in names:
            yield root + name
