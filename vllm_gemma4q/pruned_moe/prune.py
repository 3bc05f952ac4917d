"""A Gemma 4 MoE checkpoint in, one with fewer experts out: file to file, whatever its format.

Of tensors that hold all experts, slices of the first axis are copied; those of one expert are dropped, or go by their
new number; the router loses the same rows. Everything else is copied bit for bit, and so is every expert that stays:
pruning commutes with quantizing, as long as scales do not depend on other experts. Engines see an ordinary checkpoint
where all layers keep as many experts (see `config.py`).

Beside the weights lies `expert_drop_metadata.json`, with ids as the source numbers them:

    {"num_experts": 128, "per_layer_keep": {"0": [0, 1, 3, ..], ..}, "per_layer_drop": {"0": [2, ..], ..}, ..}
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.architecture import Role, TextArchitecture, role_of
from vllm_gemma4q.calibration.weights import read_rows
from vllm_gemma4q.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from vllm_gemma4q.checkpoint.convert import Conversion
from vllm_gemma4q.checkpoint.sidecars import to_json
from vllm_gemma4q.checkpoint.steps import MAX_SHARD_BYTES, Constant, OutputTensor, Step
from vllm_gemma4q.conformance import check_unquantized
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.config import pruned_config
from vllm_gemma4q.pruned_moe.knobs import Options, boosted, transferred
from vllm_gemma4q.pruned_moe.mixture import mixture_of
from vllm_gemma4q.pruned_moe.tensors import Place, check_experts, is_shared, place_of
from vllm_gemma4q.restore.names import canonical

SCHEME = "prune"
METADATA = "expert_drop_metadata.json"

_ROUTER = "router.proj.weight"
_SHARED_NORM = "post_feedforward_layernorm_1.weight"
_COUNTERS = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")


def plan(
    source: Checkpoint,
    retained: RetainedExperts,
    options: Options | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    refitted: Checkpoint | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Conversion:
    """What pruning a checkpoint will read and write; nothing is written yet.

    Reads headers, and with a shared boost or soft transfer the norms or routers that they change.

    Args:
        retained: of this model's experts, those that stay; none has to go.
        refitted: `..experts.down_proj` of every layer, all experts, to write in place of the source's (see `refit`).
        provenance: for the manifest, how the choice was made.

    Raises:
        InputError: not a Gemma 4 MoE, of another number of layers or experts, pruned to differing numbers before,
            with fewer experts left than a token takes, or tensors are missing or have the wrong shape or dtype.
    """
    options = options or Options()
    architecture, num_experts, top_k = mixture_of(source.config)
    _check_retained(retained, len(architecture.layers), num_experts, options.top_k or top_k)
    check_experts(source.tensors.values(), retained.num_experts, len(architecture.layers))
    if "quantization_config" not in source.config:
        check_unquantized(architecture, source.tensors)
    steps = list(_steps(source, retained, options, {} if refitted is None else refitted.tensors))
    _check_found(steps, architecture, options)
    config = pruned_config(source.config, retained, options.top_k)
    details = {
        **(provenance or {}),
        "options": asdict(options),
        "experts": {"before": retained.num_experts, "after": list(retained.counts)},
    }
    return Conversion(
        SCHEME,
        source,
        steps,
        config,
        _summary(source, steps),
        max_shard_bytes,
        details,
        files={METADATA: to_json(_metadata(retained, options))},
        base=refitted,
    )


def _check_retained(retained: RetainedExperts, n_layers: int, num_experts: int, top_k: int) -> None:
    if len(retained.kept) != n_layers:
        raise InputError(f"experts to keep: got {len(retained.kept)} layers, the model has {n_layers}")
    if retained.num_experts != num_experts:
        raise InputError(f"experts to keep: chosen among {retained.num_experts} a layer, the model has {num_experts}")
    for layer, kept in enumerate(retained.kept):
        _check_layer(layer, kept, retained.num_experts, top_k)


def _check_layer(layer: int, kept: tuple[int, ...], num_experts: int, top_k: int) -> None:
    if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < num_experts):
        raise InputError(f"layer {layer}: got experts {list(kept)}, expected ids of 0..{num_experts - 1}, ascending")
    if len(kept) < max(top_k, 1):
        raise InputError(f"layer {layer}: {len(kept)} of {num_experts} experts left, expected at least {top_k} (top_k)")


def _steps(
    source: Checkpoint, retained: RetainedExperts, options: Options, refitted: Mapping[str, TensorInfo]
) -> Iterator[Step]:
    for tensor in source.tensors.values():
        place = place_of(tensor.name)
        if place is not None:
            yield from _step_of_experts(tensor, place, retained, options, refitted)
        elif _is_shared_norm(tensor) and options.shared_boost != 1:
            yield _replaced(tensor, boosted(read_rows(tensor), options.shared_boost))
        else:
            yield Step(tensor, (OutputTensor(tensor.name, tensor.dtype, tensor.shape),))


def _step_of_experts(
    tensor: TensorInfo,
    place: Place,
    retained: RetainedExperts,
    options: Options,
    refitted: Mapping[str, TensorInfo],
) -> Iterator[Step]:
    kept = retained.kept[place.layer]
    if place.expert is not None:
        if place.expert in kept:
            prefix = tensor.name.removesuffix(f"{place.expert}.{place.name}")
            output = OutputTensor(f"{prefix}{kept.index(place.expert)}.{place.name}", tensor.dtype, tensor.shape)
            fitted = refitted.get(f"{prefix}down_proj") if place.name == "down_proj.weight" else None
            first = place.expert * tensor.rows
            yield (
                Step(tensor, (output,))
                if fitted is None
                else Step(fitted, (output,), first_row=first, last_row=first + tensor.rows)
            )
        return
    if is_shared(tensor):
        yield Step(tensor, (OutputTensor(tensor.name, tensor.dtype, tensor.shape),))
    elif place.name == _ROUTER and options.soft_transfer and len(kept) < retained.num_experts:
        yield _replaced(tensor, transferred(read_rows(tensor), kept, options.soft_transfer))
    else:
        output = OutputTensor(tensor.name, tensor.dtype, (len(kept), *tensor.shape[1:]))
        yield Step(refitted.get(tensor.name, tensor), (output,), slices=_ranges(kept))


def _replaced(tensor: TensorInfo, values: torch.Tensor) -> Step:
    """A step that writes values known already in place of a tensor, and reads nothing."""
    if not bool(values.isfinite().all()):
        raise InputError(f"tensor {tensor.name}: NaN or infinite in {tensor.dtype} with the options given")
    output = OutputTensor(tensor.name, tensor.dtype, tuple(values.shape))
    data = values.contiguous().view(torch.uint8).numpy().tobytes()
    return Step(tensor, (), first_row=0, last_row=0, constants=(Constant(output, data),))


def _ranges(kept: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Ascending ids as (first, last + 1) of each run of neighbours: [0, 1, 2, 5] -> (0, 3), (5, 6)."""
    runs = [[expert for _, expert in run] for _, run in groupby(enumerate(kept), lambda pair: pair[1] - pair[0])]
    return tuple((run[0], run[-1] + 1) for run in runs)


def _is_shared_norm(tensor: TensorInfo) -> bool:
    return role_of(tensor.name) is Role.NORM and canonical(tensor.name).endswith(_SHARED_NORM)


def _check_found(steps: list[Step], architecture: TextArchitecture, options: Options) -> None:
    """A boost that finds no norm in some layer would be half a boost."""
    found = sum(_is_shared_norm(step.source) for step in steps)
    if options.shared_boost != 1 and found != len(architecture.layers):
        raise InputError(f"shared boost: got {found} tensors {_SHARED_NORM}, expected {len(architecture.layers)}")


def _metadata(retained: RetainedExperts, options: Options) -> dict[str, Any]:
    by_layer = {"per_layer_keep": retained.kept, "per_layer_drop": retained.dropped}
    return {
        "num_experts": retained.num_experts,
        **{key: {str(layer): list(ids) for layer, ids in enumerate(lists)} for key, lists in by_layer.items()},
        "options": asdict(options),
    }


def _summary(source: Checkpoint, steps: list[Step]) -> dict[str, dict[str, int]]:
    """Elements, scales included, and bytes by role (`Role` values), plus `total`."""
    table = {role.value: dict.fromkeys(_COUNTERS, 0) for role in Role}
    sizes = [("before", tensor.name, tensor.dtype, tensor.end - tensor.start) for tensor in source.tensors.values()]
    sizes += [("after", output.name, output.dtype, output.n_bytes) for step in steps for output in step.written]
    for when, name, dtype, n_bytes in sizes:
        row = table[role_of(name).value]
        row[f"parameters_{when}"] += n_bytes // DTYPE_BYTES[dtype]
        row[f"bytes_{when}"] += n_bytes
    result = {role: row for role, row in table.items() if row["bytes_before"]}
    result["total"] = {key: sum(row[key] for row in result.values()) for key in _COUNTERS}
    return result
