"""Look at what a restore wrote before it is called a checkpoint: read back, compared with the base, scales counted."""

from collections.abc import Iterable
from pathlib import Path

from vllm_gemma4q.architecture import is_linear_weight
from vllm_gemma4q.checkpoint import TensorInfo
from vllm_gemma4q.checkpoint.header import read_header
from vllm_gemma4q.conformance import FLOAT_DTYPES
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.restore.compare import Files, span
from vllm_gemma4q.restore.names import canonical, is_fused, is_weight, module_of
from vllm_gemma4q.restore.plan import Restoration

_SCALES = ("_scale", "_scale_inv", "_zero_point")


def verify(restoration: Restoration, shards: Iterable[Path]) -> None:
    """Check the result's shards.

    Raises:
        InputError: a restored tensor is not the base's bit for bit, a quantized weight lacks a scale, a scale belongs
            to a weight that is not quantized, or a listed module is quantized.
    """
    written = {name: tensor for shard in shards for name, tensor in read_header(shard).items()}
    base = restoration.conversion.base
    assert base is not None
    originals = {canonical(tensor.name): tensor for tensor in base.tensors.values()}
    with Files() as files:
        for name in restoration.restored:
            tensor, original = written[name], originals[canonical(name)]
            is_same = (tensor.dtype, tensor.shape) == (original.dtype, original.shape)
            if not is_same or not files.are_same(span(tensor), span(original)):
                raise InputError(f"tensor {name}: written otherwise than it is in {base.folder}")
    _check_scales(restoration, {canonical(name): tensor for name, tensor in written.items()})


def _check_scales(restoration: Restoration, tensors: dict[str, TensorInfo]) -> None:
    weights = [name for name, tensor in tensors.items() if is_weight(name) and tensor.dtype not in FLOAT_DTYPES]
    quantized = {module_of(name) for name in weights}
    for name in weights:
        if missing := restoration.form.missing(name, tensors):
            raise InputError(f"tensor {tensors[name].name}: written without the {missing} that it needs")
        if not is_fused(name) and not _may_be_quantized(name, tensors[name]):
            raise InputError(f"tensor {tensors[name].name}: written quantized, which it never is")
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        is_scale = name.endswith(_SCALES) and f"{module}.weight" in tensors
        if is_scale and module not in quantized:
            raise InputError(f"tensor {tensor.name}: written, and {module}.weight is not quantized")
    for module in restoration.conversion.config["quantization_config"][restoration.form.lists[0]]:
        if canonical(module) in quantized:
            raise InputError(f"{module}: written quantized, and listed as not quantized")


def _may_be_quantized(name: str, tensor: TensorInfo) -> bool:
    plain = name.removesuffix("_packed")
    return is_linear_weight(f"model.{plain}", tensor.shape)
