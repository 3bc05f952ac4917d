"""The EXL3 checkpoint as ExLlamaV3 writes it: tensors of a linear, `quantization_config`, `quantization_config.json`.

    X.trellis   I16 [in/16, out/16, 16 K]    in and out padded with zeros to 128; K bits a weight
    X.suh       F16 [in]
    X.svh       F16 [out]
    X.mcg       I32 []                       or X.mul1: the codebook's multiplier; none for 3inst

config.json says `quant_method: exl3`; `bits` is what the layers come to, `head_bits` what `lm_head` has, whose tensors
are there even where config.json ties it to the embedding. quantization_config.json repeats that and adds, by module,
every tensor with its shape, bytes and dtype.

Source: exllamav3 1.4.1, `conversion/compile.py` and `conversion/quant_config.py`.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from gemma4q_kernels.exl3_layout import TILE

from vllm_gemma4q.checkpoint.sidecars import to_json
from vllm_gemma4q.checkpoint.steps import Constant, OutputTensor
from vllm_gemma4q.exl3.allocation import padded
from vllm_gemma4q.exl3.facts import INPUT_SIGNS, OUTPUT_SIGNS, TRELLIS
from vllm_gemma4q.exl3.scheme import METHOD

# Of the converter whose layout this is.
VERSION = "1.4.1"
MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}

_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def outputs(module: str, shape: tuple[int, int], bits: int) -> tuple[OutputTensor, OutputTensor, OutputTensor]:
    """Trellis, suh and svh of a linear [out, in]."""
    rows, columns = map(padded, reversed(shape))
    return (
        OutputTensor(f"{module}.{TRELLIS}", "I16", (rows // TILE, columns // TILE, TILE * bits)),
        OutputTensor(f"{module}.{INPUT_SIGNS}", "F16", (rows,)),
        OutputTensor(f"{module}.{OUTPUT_SIGNS}", "F16", (columns,)),
    )


def markers(module: str, codebook: str) -> tuple[Constant, ...]:
    """What tells a linear's codebook."""
    if codebook not in MULTIPLIERS:
        return ()
    return (Constant(OutputTensor(f"{module}.{codebook}", "I32", ()), struct.pack("<I", MULTIPLIERS[codebook])),)


def quantization_config(
    bits: float, head_bits: int, codebook: str, calibration: tuple[int, int] | None
) -> dict[str, Any]:
    """What goes under `quantization_config` in config.json.

    Args:
        bits: of the layers, on average.
        head_bits: of `lm_head`; 16 where it is not quantized.
        calibration: samples and tokens of each at most; None without Hessians.
    """
    rows, columns = calibration or (0, 0)
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "bits": round(bits, 2),
        "head_bits": head_bits,
        "calibration": {"rows": rows, "cols": columns},
        "out_scales": "always",
        "codebook": codebook,
    }


def storage_file(config: Mapping[str, Any], tensors: Iterable[OutputTensor]) -> bytes:
    """quantization_config.json of a checkpoint of these tensors."""
    modules: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        entry = modules.setdefault(module, {"stored_tensors": {}})
        entry["stored_tensors"][tensor.name] = {
            "shape": list(tensor.shape),
            "n_bytes": tensor.n_bytes,
            "dtype": f"torch.{_TORCH_NAMES[tensor.dtype]}",
        }
        if leaf == TRELLIS:
            entry |= {"quant_format": METHOD, "bits_per_weight": tensor.shape[-1] // TILE}
        elif leaf in MULTIPLIERS:
            entry[f"{leaf}_multiplier"] = MULTIPLIERS[leaf]
    return to_json({**config, "tensor_storage": modules})
