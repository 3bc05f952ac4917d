"""Parts of a checkpoint folder, from headers alone; a damaged one is read as far as the doctor reads it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from gemma4q_kernels.exl3_layout import TILE

from vllm_gemma4q.architecture import Role, TextArchitecture, is_fused_experts, layer_of
from vllm_gemma4q.checkpoint import TensorInfo
from vllm_gemma4q.doctor.subject import Subject
from vllm_gemma4q.module_headers import FLOATS, relative_name
from vllm_gemma4q.report.parts import LINEAR_COLUMNS, Column, Part

TRELLIS = "trellis"
_WEIGHT, _PACKED = "weight", "weight_packed"
_FUSED = re.compile(r"^(?P<module>.+\.experts\.(?:gate_up_proj|down_proj))(?:[._](?P<leaf>\w+))?$")
_CACHE_SCALE = re.compile(r"^(?P<layer>.+\.self_attn)(?:\.attn)?\.(?P<leaf>(?:q|k|v|kv|prob_output)_scale)$")
# Leaves that are no weights. A router's `scale` and `per_expert_scale` are.
_SCALES = frozenset({
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_shape", "weight_g_idx",
    "input_scale", "input_zero_point", "act_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
    "prob_output_scale", "suh", "svh", "su", "sv", "mcg", "mul1",
})  # fmt: skip
_PACKED_CODES = 8  # 4-bit codes in an I32
_TOWERS = (Role.VISION, Role.EMBED_VISION, Role.AUDIO)


def checkpoint_parts(subject: Subject) -> Iterator[Part]:
    """Every weight, in the order of the files."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in subject.tensors.items():
        module, leaf = split_name(name)
        modules.setdefault(module, {})[leaf] = tensor
    expected = _linear_shapes(subject.architecture)
    for module, leaves in modules.items():
        yield _part(module, leaves, subject, expected)


def split_name(name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and what it is of it (`weight`, `weight_scale`, `suh`)."""
    if match := _FUSED.match(name):
        return match["module"], match["leaf"] or _WEIGHT
    if match := _CACHE_SCALE.match(name):
        return f"{match['layer']}.k_proj", match["leaf"]
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _part(
    module: str, leaves: Mapping[str, TensorInfo], subject: Subject, expected: Mapping[str, tuple[int, int]]
) -> Part:
    beside = _beside(module, leaves)
    weights = [leaf for leaf in leaves if leaf not in beside]
    tensors = [leaves[leaf] for leaf in weights]
    main = next(iter(weights), next(iter(leaves)))
    role = subject.roles[leaves[main].name]
    shape = _shape(main, leaves[main], expected.get(relative_name(module)))
    layer = _layer(leaves[main].name, role, len(subject.architecture.layers))
    return Part(
        name=module if main in (_WEIGHT, _PACKED, TRELLIS) else leaves[main].name,
        role=role,
        layer=layer,
        column=None if layer is None else _column(module, role),
        dtype=_dtype(main, leaves[main]) if weights else "nothing",
        shape=shape,
        parameters=math.prod(shape) + sum(math.prod(tensor.shape) for tensor in tensors[1:]) if weights else 0,
        n_bytes=sum(tensor.end - tensor.start for tensor in leaves.values()),
        is_quantized=any(tensor.dtype not in FLOATS for tensor in tensors),
        scales=tuple(f"{leaf} {leaves[leaf].dtype} {list(leaves[leaf].shape)}" for leaf in sorted(beside)),
    )


def _layer(name: str, role: Role, n_layers: int) -> int | None:
    """Its layer; None outside, and of layers that the configuration does not have: any number can be in a name."""
    layer = None if role in _TOWERS else layer_of(name)
    return layer if layer is not None and layer < n_layers else None


def _beside(module: str, leaves: Sequence[str] | Mapping[str, TensorInfo]) -> set[str]:
    if is_fused_experts(module):
        return {leaf for leaf in leaves if leaf not in (_WEIGHT, _PACKED)}
    return {leaf for leaf in leaves if leaf in _SCALES}


def _shape(leaf: str, tensor: TensorInfo, expected: tuple[int, int] | None) -> tuple[int, ...]:
    """The weight's; a trellis has its linear's, or its own with the padding where that is not known."""
    if leaf == TRELLIS and len(tensor.shape) == 3:
        return expected or (TILE * tensor.shape[1], TILE * tensor.shape[0])
    if leaf == _PACKED and tensor.dtype == "I32":
        return (*tensor.shape[:-1], tensor.shape[-1] * _PACKED_CODES)
    return tuple(tensor.shape)


def _dtype(leaf: str, tensor: TensorInfo) -> str:
    if leaf == TRELLIS and len(tensor.shape) == 3:
        return f"EXL3 {tensor.shape[2] / TILE:g} bit"
    return f"packed {tensor.dtype}" if leaf == _PACKED else tensor.dtype


def _column(module: str, role: Role) -> Column:
    last = module.rpartition(".")[2]
    if role is Role.EXPERTS:
        return Column.EXPERTS_OUT if last == "down_proj" else Column.EXPERTS_IN
    if role is Role.ROUTER:
        return Column.ROUTER
    if role is Role.NORM:
        return Column.NORMS
    return LINEAR_COLUMNS.get(last, Column.OTHER) if role is not Role.OTHER else Column.OTHER


def _linear_shapes(architecture: TextArchitecture) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear by relative module name, experts one by one, and the output layer."""
    shapes = {"lm_head": (architecture.vocab_size, architecture.hidden_size)}
    for name, shape in architecture.shapes():
        module = relative_name(name).removesuffix(".weight")
        if is_fused_experts(name):
            parent, _, part = module.rpartition(".")
            shards = ("down_proj",) if part == "down_proj" else ("gate_proj", "up_proj")
            linear = (shape[1] // len(shards), shape[2])
            shapes |= {f"{parent}.{expert}.{shard}": linear for expert in range(shape[0]) for shard in shards}
        elif len(shape) == 2:
            shapes[module] = (shape[0], shape[1])
    return shapes


def scheme_words(subject: Subject) -> str:
    """What config.json says the weights are, by `quant_method` where this package has no name for it."""
    method = subject.quantization.get("quant_method")
    return str(method) if method and not subject.is_claimed else subject.scheme.value
