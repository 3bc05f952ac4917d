"""Small FP8 checkpoints with static scales, in every layout and state that has been seen.

Made with transformers, plain torch and the safetensors library, without the code under test: absmax scales, inputs
observed by hooks while the BF16 model reads a few paragraphs.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm_plugin.checkpoints import Tensors, edit, load

E4M3 = torch.float8_e4m3fn
LAYERS = "model.language_model.layers."
_LINEAR = re.compile(r"^model\.language_model\.layers\.\d+\.(?:self_attn|mlp)\.[a-z]+_proj\.weight$")
_EXPERTS = re.compile(r"^(model\.language_model\.layers\.\d+\.experts)\.(gate_up_proj|down_proj)$")


def observe(folder: Path, texts: Sequence[str]) -> dict[str, float]:
    """Largest magnitude of every linear's input in the language model, by module; experts' by fused tensor."""
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = transformers.Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    largest: dict[str, float] = {}

    def note(name: str, values: torch.Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(values.abs().max()))

    for name, module in model.named_modules():
        if _LINEAR.match(f"{name}.weight"):
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(lambda m, args, name=name: _note_experts(note, name, m, *args))
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256))
    torch.set_num_threads(threads)
    return largest


def _note_experts(
    note: Callable[..., None], name: str, module: Any, x: torch.Tensor, ids: torch.Tensor, _: Any
) -> None:
    note(f"{name}.gate_up_proj", x)
    for expert in ids.unique().tolist():
        tokens = x[(ids == expert).any(dim=1)]
        gate, up = torch.nn.functional.linear(tokens, module.gate_up_proj[expert]).chunk(2, dim=-1)
        note(f"{name}.down_proj", module.act_fn(gate) * up)


def quantize(source: Path, target: Path, inputs: dict[str, float], ignored: Sequence[str]) -> Path:
    """Linears and experts of the language model in E4M3, one weight scale a linear, experts one by one."""

    def convert(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, tensor in tensors.items():
            if _LINEAR.match(name):
                module = name.removesuffix(".weight")
                result |= _quantized(module, tensor, inputs[module])
            elif match := _EXPERTS.match(name):
                result |= _experts(match[1], match[2], tensor, inputs[name])
            else:
                result[name] = tensor
        return result

    edit(source, target, convert)
    config = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": list(ignored)}
    return reconfigured(target, config)


def _quantized(module: str, weight: torch.Tensor, input_absmax: float) -> Tensors:
    scale = weight.float().abs().max() / 448
    return {
        f"{module}.weight": (weight.float() / scale).clamp(-448, 448).to(E4M3),
        f"{module}.weight_scale": scale,
        f"{module}.input_scale": torch.tensor(input_absmax / 448),
    }


def _experts(prefix: str, part: str, stack: torch.Tensor, input_absmax: float) -> Tensors:
    result: Tensors = {}
    for expert, weight in enumerate(stack):
        shards = (
            [("down_proj", weight)]
            if part == "down_proj"
            else zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True)
        )
        for shard, rows in shards:
            result |= _quantized(f"{prefix}.{expert}.{shard}", rows, input_absmax)
    return result


def reconfigured(folder: Path, quantization: dict[str, Any]) -> Path:
    """The same folder with another quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def variant(
    source: Path,
    target: Path,
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    ignored: Sequence[str] | None = None,
) -> Path:
    """A copy with other tensors, and with another list of ignored modules where one is given."""
    edit(source, target, tensors)
    if ignored is not None:
        config = json.loads((target / "config.json").read_text())["quantization_config"]
        reconfigured(target, config | {"ignored_layers": list(ignored)})
    return target


def linears_outside(source: Path) -> list[str]:
    """Full names of what a careful tool lists: every 2-D weight that is no linear of the language model's layers."""
    names = [name for name, tensor in load(source).items() if name.endswith(".weight") and tensor.dim() == 2]
    return sorted({name.removesuffix(".weight") for name in names if not _LINEAR.match(name)} | {"lm_head"})


def virtual_values(source: Path) -> list[str]:
    """The v_proj that layers without values do not have: what stock vLLM wants to be told of."""
    names = {name for name in load(source) if ".self_attn." in name and name.startswith(LAYERS)}
    keys = {name.removesuffix("k_proj.weight") for name in names if name.endswith(".k_proj.weight")}
    return sorted(f"{prefix}v_proj" for prefix in keys if f"{prefix}v_proj.weight" not in names)


def leave_scales(tensors: Tensors, pattern: str) -> Tensors:
    """Both scales beside every unquantized weight that matches, as a careless restoration leaves them."""
    modules = [name.removesuffix(".weight") for name in tensors if re.search(pattern, name) and ".weight_" not in name]
    assert modules
    leftovers = {
        f"{module}.{leaf}": torch.tensor(0.5) for module in modules for leaf in ("weight_scale", "input_scale")
    }
    return tensors | leftovers


def damage(tensors: Tensors, pattern: str) -> Tensors:
    """Weights that should have stayed BF16, quantized like the others."""
    result = dict(tensors)
    for name in [name for name in tensors if re.search(pattern, name) and tensors[name].dim() == 2]:
        result |= _quantized(name.removesuffix(".weight"), tensors[name], 1.0)
    assert len(result) > len(tensors)
    return result


def scale_half(tensors: Tensors, pattern: str, factor: float) -> Tensors:
    """Every other scale whose name matches, times a factor."""
    names = sorted(name for name in tensors if re.search(pattern, name))[::2]
    assert names
    return tensors | {name: tensors[name] * factor for name in names}


def by_channel(tensors: Tensors) -> Tensors:
    """Scales of linears as columns, one a row of the weight: the same numbers."""
    columns = {
        name: scale.expand(tensors[name.removesuffix("_scale")].shape[0]).reshape(-1, 1).clone()
        for name, scale in tensors.items()
        if name.endswith(".weight_scale")
    }
    return tensors | columns


def fuse_experts(tensors: Tensors) -> Tensors:
    """Experts as 3-D tensors, `experts.gate_up_proj` with `experts.gate_up_proj_scale` [E, 2] and one input scale."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.split("experts.")[0] + "experts." for name in tensors if ".experts." in name}):
        count = sum(name.startswith(prefix) and name.endswith(".up_proj.weight") for name in tensors)

        def stack(shard: str, leaf: str, prefix: str = prefix, count: int = count) -> torch.Tensor:
            rows = [tensors[f"{prefix}{expert}.{shard}.{leaf}"] for expert in range(count)]
            return torch.stack([row.view(torch.uint8) if row.dtype == E4M3 else row for row in rows])

        both = torch.cat([stack("gate_proj", "weight"), stack("up_proj", "weight")], dim=1)
        fused[f"{prefix}gate_up_proj"] = both.view(E4M3)
        fused[f"{prefix}down_proj"] = stack("down_proj", "weight").view(E4M3)
        gates, ups = stack("gate_proj", "weight_scale"), stack("up_proj", "weight_scale")
        fused[f"{prefix}gate_up_proj_scale"] = torch.stack([gates, ups], dim=1)
        fused[f"{prefix}down_proj_scale"] = stack("down_proj", "weight_scale")
        fused[f"{prefix}gate_up_proj_input_scale"] = stack("gate_proj", "input_scale").max()
        fused[f"{prefix}down_proj_input_scale"] = stack("down_proj", "input_scale")
    return fused


def compressed_tensors(ignored: Sequence[str]) -> dict[str, Any]:
    """The same scheme in llm-compressor's words."""
    float8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": float8 | {"strategy": "channel"},
        "input_activations": float8 | {"strategy": "tensor"},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
    }
