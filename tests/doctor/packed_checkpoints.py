"""Headers of checkpoints in formats that other tools pack, with a hole where their weights would be."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from synthetic import shapes, small_config

from vllm_gemma4q.architecture import is_fused_experts, is_linear_weight
from vllm_gemma4q.checkpoint.header import write_header

Stored = list[tuple[str, str, tuple[int, ...]]]
TOWERS = ("re:.*vision_tower.*", "re:.*embed_vision.*")
GROUP = 16


def w4a16(module: str, rows: int, columns: int) -> Stored:
    """compressed-tensors, eight weights an I32."""
    return [
        (f"{module}.weight_packed", "I32", (rows, columns // 8)),
        (f"{module}.weight_scale", "BF16", (rows, columns // GROUP)),
        (f"{module}.weight_shape", "I64", (2,)),
    ]


def nvfp4(module: str, rows: int, columns: int) -> Stored:
    """compressed-tensors, two weights a byte."""
    return [
        (f"{module}.weight_packed", "U8", (rows, columns // 2)),
        (f"{module}.weight_scale", "F8_E4M3", (rows, columns // GROUP)),
        (f"{module}.weight_global_scale", "F32", (1,)),
        (f"{module}.input_global_scale", "F32", (1,)),
    ]


def modelopt(module: str, rows: int, columns: int) -> Stored:
    """NVFP4 whose weights are named as those that are not packed."""
    return [
        (f"{module}.weight", "U8", (rows, columns // 2)),
        (f"{module}.weight_scale", "F8_E4M3", (rows, columns // GROUP)),
        (f"{module}.weight_scale_2", "F32", ()),
    ]


def gptq(bits: int) -> Callable[[str, int, int], Stored]:
    """An I32 holds what belongs to one output."""

    def store(module: str, rows: int, columns: int) -> Stored:
        return [
            (f"{module}.qweight", "I32", (columns * bits // 32, rows)),
            (f"{module}.qzeros", "I32", (columns // GROUP, rows * bits // 32)),
            (f"{module}.scales", "F16", (columns // GROUP, rows)),
            (f"{module}.g_idx", "I32", (columns,)),
        ]

    return store


def awq(module: str, rows: int, columns: int) -> Stored:
    """An I32 holds what belongs to one input."""
    return [
        (f"{module}.qweight", "I32", (columns, rows // 8)),
        (f"{module}.qzeros", "I32", (columns // GROUP, rows // 8)),
        (f"{module}.scales", "F16", (columns // GROUP, rows)),
    ]


def compressed(form: str, kind: str, ignored: Iterable[str] = TOWERS) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": kind, "group_size": GROUP}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head", *ignored]}  # fmt: skip


FORMATS: dict[str, tuple[Callable[[str, int, int], Stored], dict[str, Any]]] = {
    "w4a16": (w4a16, compressed("pack-quantized", "int")),
    "nvfp4": (nvfp4, compressed("nvfp4-pack-quantized", "float")),
    "modelopt": (modelopt, {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}),
    "gptq": (gptq(4), {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq-8": (gptq(8), {"quant_method": "gptq", "bits": 8, "group_size": GROUP}),
    "awq": (awq, {"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP}),
}


def linears(name: str, shape: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """Modules that are packed of one tensor of the original, with their rows and columns."""
    if not is_fused_experts(name):
        return [(name.removesuffix(".weight"), *shape)]
    prefix, _, part = name.rpartition(".")
    shards, rows = (["down_proj"], shape[1]) if part == "down_proj" else (["gate_proj", "up_proj"], shape[1] // 2)
    return [(f"{prefix}.{expert}.{shard}", rows, shape[2]) for expert in range(shape[0]) for shard in shards]


def write_packed(
    folder: Path,
    form: str,
    moe: bool = False,
    is_packed: Callable[[str], bool] = lambda name: True,
    without: tuple[str, ...] = (),
    quantization: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint of `small_config`.

    Args:
        form: one of `FORMATS`.
        is_packed: which linears of layers and tower are, by the name of the original's tensor.
        without: tensors that are lost.
        quantization: another `quantization_config` than the format's.
    """
    pack, own = FORMATS[form]
    config = {**small_config(moe), "dtype": "bfloat16"}
    stored: Stored = []
    for name, shape in shapes(config).items():
        if is_packed(name) and (is_linear_weight(name, shape) or name.endswith(".linear.weight")):
            stored += [tensor for module in linears(name, shape) for tensor in pack(*module)]
        else:
            stored.append((name, "BF16", shape))
    left = [tensor for tensor in stored if tensor[0] not in without]
    assert len(left) == len(stored) - len(without)
    folder.mkdir()
    write_holes(folder / "model.safetensors", left)
    config = {**config, "quantization_config": dict(own if quantization is None else quantization)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_holes(path: Path, stored: Stored) -> None:
    widths = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1, "F8_E4M3": 1}
    header = write_header(stored)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(widths[dtype] * math.prod(shape) for _, dtype, shape in stored))
