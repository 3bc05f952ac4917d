"""From decisions to a conversion: what is written under which name, the new configuration, and a report.

What is neither kept nor restored is dropped: scales of modules that are not quantized, and tensors that the base does
not have. Names are those of Hugging Face checkpoints, whatever root the quantized one used.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_gemma4q.architecture import Role, parse_text_architecture, role_of
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo
from vllm_gemma4q.checkpoint.convert import Conversion
from vllm_gemma4q.checkpoint.rewrite import Progress
from vllm_gemma4q.checkpoint.steps import MAX_SHARD_BYTES, OutputTensor, Step
from vllm_gemma4q.restore.decide import Decision, decide
from vllm_gemma4q.restore.formats import Format, current_name, listed, parse_format, with_list
from vllm_gemma4q.restore.names import canonical
from vllm_gemma4q.restore.units import Pair, pair
from vllm_gemma4q.summary import summarize

SCHEME = "restore"
_NEVER_LINEAR = frozenset({Role.EMBEDDING, Role.NORM, Role.OTHER})
_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Restoration:
    """What a restore will do.

    Attributes:
        restored: tensors that come from the base, by full name in the result, and why.
        dropped: tensors of the quantized checkpoint that the result does not have.
        renamed: from a name in the quantized checkpoint to that in the result.
        list_added, list_removed: changes to the configuration's list of modules that are not quantized.
    """

    conversion: Conversion
    form: Format
    restored: Mapping[str, str]
    dropped: tuple[str, ...]
    renamed: Mapping[str, str]
    list_added: tuple[str, ...]
    list_removed: tuple[str, ...]

    @property
    def is_needed(self) -> bool:
        """Whether the quantized checkpoint is not yet what the result would be."""
        source = self.conversion.source
        return bool(self.restored or self.dropped or self.renamed) or self.conversion.config != source.config


def bytes_to_compare(quantized: Checkpoint, base: Checkpoint) -> int:
    """At most what `plan` will read of the base, for a progress bar."""
    found = {canonical(tensor.name): tensor.shape for tensor in quantized.tensors.values()}
    same = (one for one in base.tensors.values() if found.get(canonical(one.name)) == one.shape)
    return sum(tensor.end - tensor.start for tensor in same)


def plan(
    quantized: Checkpoint,
    base: Checkpoint,
    progress: Progress = lambda _: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Restoration:
    """Compare both checkpoints; nothing is written yet.

    Args:
        progress: called with numbers of the base's bytes that were compared.

    Raises:
        InputError: see `parse_format`, `pair` and `decide`.
    """
    form, both = parse_format(quantized.config), pair(quantized, base)
    decision = decide(both, form, progress)
    kept = {tensor.name: both.result_name(current_name(name)) for name, tensor in decision.kept.items()}
    restored = {both.result_name(canonical(tensor.name)): reason for tensor, reason in decision.restored}
    steps = [_copy(tensor, kept[tensor.name]) for tensor in quantized.tensors.values() if tensor.name in kept]
    steps += [_copy(tensor, both.result_name(canonical(tensor.name))) for tensor, _ in decision.restored]
    modules, before = sorted(_unquantized(both, decision)), listed(quantized.config, form)
    config = _with_output_layer(with_list(quantized.config, form, modules), base.config)
    dropped = tuple(_dropped(both, set(kept), restored))
    renamed = {name: target for name, target in kept.items() if name != target}
    added = tuple(name for name in modules if name not in before)
    removed = tuple(name for name in before if name not in modules)
    details = {
        "method": form.method,
        "restored": restored,
        "dropped": list(dropped),
        "renamed": renamed,
        "list": {"key": form.lists[0], "added": list(added), "removed": list(removed)},
    }
    conversion = Conversion(
        SCHEME, quantized, steps, config, summarize(steps), max_shard_bytes, details=details, base=base
    )
    return Restoration(conversion, form, restored, dropped, renamed, added, removed)


def _copy(tensor: TensorInfo, name: str) -> Step:
    return Step(tensor, (OutputTensor(name, tensor.dtype, tensor.shape),))


def _dropped(both: Pair, kept: set[str], restored: Mapping[str, str]) -> Iterator[str]:
    """What the result has neither as it is nor from the base."""
    for tensor in both.quantized.tensors.values():
        if tensor.name not in kept and both.result_name(canonical(tensor.name)) not in restored:
            yield tensor.name


def _unquantized(both: Pair, decision: Decision) -> Iterator[str]:
    """Full names of all linears that are not quantized, virtual ones included."""
    yield "lm_head"
    for name, tensor in both.rest.items():
        is_linear = name.endswith(".weight") and len(tensor.shape) == 2 and role_of(tensor.name) not in _NEVER_LINEAR
        if is_linear and name != "lm_head.weight":
            yield both.result_name(name).removesuffix(".weight")
    root = both.architecture.root
    yield from (root + name for name in both.units if name not in decision.kept_units)
    for layer in both.architecture.layers:
        # Engines fuse v_proj with q and k, and ask for it by name even where values are the keys.
        attention = f"layers.{layer.index}.self_attn"
        is_virtual = layer.has_key_value and not layer.has_value
        if is_virtual and f"{attention}.k_proj" not in decision.kept_units:
            yield f"{root}{attention}.v_proj"


def _with_output_layer(config: Mapping[str, Any], base: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration, with an output layer of its own where the base has one."""
    tied = parse_text_architecture(base).tie_word_embeddings
    if parse_text_architecture(config).tie_word_embeddings == tied:
        return config
    text = config.get("text_config")
    nested = {} if text is None else {"text_config": {**text, _TIED: tied}}
    return {**config, _TIED: tied, **nested}
