"""How far a reference is from itself: the divergence that its engine's arithmetic makes, without any quantization.

An engine rounds each result of a BF16 model to 8 bits, and in an order that depends on kernels, batches and ranks. The
same weights in float32, in which BF16 weights are exact, are what all these orders come close to: vLLM and transformers
in float32 are 4e-8 nats apart on the small models, a ten-thousandth of what BF16 makes. So the floor is

    KL(reference as its engine runs it || the same weights in float32)

and a quantized checkpoint that is no further away cannot be told from the reference by divergence: both its own noise
and its quantization are within.

Computed by transformers with one layer in memory (`engines.transformers`), whatever the reference's engine is: vLLM in
float32 would have to hold twice the reference's bytes, 124 GB for 31B, which the machines that serve it often lack.
"""

from pathlib import Path

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.engines.interface import Engine
from vllm_gemma4q.evaluation.engines.settings import Settings, is_gguf

_FLOAT32 = ("float32", "float")


def exact_engine(reference: Path, settings: Settings) -> Engine:
    """What computes a reference in float32. Nothing of it is loaded yet.

    Raises:
        InputError: the reference is a GGUF, quantized, or runs in float32 already.
    """
    import torch

    from vllm_gemma4q.evaluation.engines.transformers import Transformers

    if is_gguf(reference):
        raise InputError(f"--noise-floor: got {reference.name} as the reference, expected a BF16 checkpoint folder")
    own = Transformers("auto", settings.device).load(reference).dtype
    if settings.dtype in _FLOAT32 or (settings.dtype == "auto" and own is torch.float32):
        raise InputError(f"--noise-floor: {reference} runs in float32 already, expected BF16: its arithmetic is exact")
    return Transformers("float32", settings.device)
