"""One name for one tensor, whoever wrote it.

A canonical name has no root: `layers.0.self_attn.q_proj.weight`, `vision_tower.encoder..`, `embed_vision..`,
`lm_head.weight`. Checkpoints put `model.language_model.`, `language_model.model.`, `language_model.` or `model.` before
it. A unit is what is quantized or not as a whole: one linear, or all experts of a layer (`layers.0.experts`), which
are stored fused (`experts.gate_up_proj`, with or without `.weight`) or one by one (`experts.3.up_proj.weight`).
"""

import re

_ROOT = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?")
_EXPERTS = re.compile(r"^layers\.\d+\.experts(?=\.)")
_FUSED = re.compile(r"^layers\.\d+\.experts\.(?:gate_up_proj|down_proj)(?:\.weight)?$")
_LAYER_SCALE = re.compile(r"^(layers\.\d+\.self_attn)(?:\.attn)?\.(?:q|k|v|kv|prob_output)_scale$")
_WEIGHTS = (".weight", ".weight_packed")


def canonical(name: str) -> str:
    """A tensor's or module's name without its root."""
    return _ROOT.sub("", name, count=1)


def unit_of(name: str) -> str:
    """The unit that a tensor belongs to, by canonical name: its module, all experts of its layer, or, of a KV cache
    scale, the layer's k_proj."""
    if match := _EXPERTS.match(name):
        return match[0]
    if match := _LAYER_SCALE.match(name):
        return f"{match[1]}.k_proj"
    return name.rpartition(".")[0]


def is_weight(name: str) -> bool:
    """Whether a tensor of a unit, by canonical name, is a weight rather than what comes with one."""
    return name.endswith(_WEIGHTS) or is_fused(name)


def is_fused(name: str) -> bool:
    """Whether a canonical name is that of all experts of a layer in one tensor."""
    return _FUSED.match(name) is not None


def module_of(weight: str) -> str:
    """The module of a weight, by the weight's canonical name."""
    for suffix in _WEIGHTS:
        weight = weight.removesuffix(suffix)
    return weight
