"""Does a BF16 checkpoint hold what its configuration says? Checked from headers, before any byte is written."""

from collections.abc import Mapping

from vllm_gemma4q.architecture import EXPERT_SHARDS, TextArchitecture, is_fused_experts, is_linear_weight
from vllm_gemma4q.checkpoint.header import TensorInfo
from vllm_gemma4q.errors import InputError

FLOAT_DTYPES = ("BF16", "F16", "F32")


def check_unquantized(architecture: TextArchitecture, tensors: Mapping[str, TensorInfo]) -> None:
    """Every tensor of the language model is there, in its shape, and every linear in a float dtype.

    Experts may be fused (`experts.gate_up_proj`) or one by one (`experts.0.gate_proj.weight`). Tensors that
    the configuration does not ask for are allowed.

    Raises:
        InputError: naming the tensor, what was found and what was expected.
    """
    for name, shape in architecture.shapes():
        if name in tensors:
            _check_shape(tensors[name], shape)
        elif is_fused_experts(name) and any(key.startswith(f"{name.rpartition('.')[0]}.0.") for key in tensors):
            for key, expert_shape in _unfused(name, shape):
                if key not in tensors:
                    raise InputError(f"tensor {key}: missing, expected {list(expert_shape)}")
                _check_shape(tensors[key], expert_shape)
        else:
            raise InputError(f"tensor {name}: missing, expected {list(shape)}")
    for tensor in tensors.values():
        if is_linear_weight(tensor.name, tensor.shape) and tensor.dtype not in FLOAT_DTYPES:
            raise InputError(f"tensor {tensor.name}: got {tensor.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")


def _check_shape(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise InputError(f"tensor {tensor.name}: got shape {list(tensor.shape)}, expected {list(shape)}")


def _unfused(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The per-expert tensors that stand for one fused tensor."""
    experts, prefix = shape[0], name.rpartition(".")[0]
    gate, up, down = EXPERT_SHARDS
    shards = ([(gate, (shape[1] // 2, shape[2])), (up, (shape[1] // 2, shape[2]))]
              if name.endswith("gate_up_proj") else [(down, shape[1:])])  # fmt: skip
    return [(f"{prefix}.{expert}.{shard}.weight", size) for expert in range(experts) for shard, size in shards]
