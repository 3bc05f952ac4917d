"""Options of commands that run a model layer by layer, and how they load it."""

from enum import StrEnum
from typing import TYPE_CHECKING

from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.errors import InputError

if TYPE_CHECKING:  # transformers, which only these commands need
    from vllm_gemma4q.calibration.decoder import Decoder


class Dtype(StrEnum):
    """What to compute in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Device(StrEnum):
    """Where to compute."""

    CPU = "cpu"
    CUDA = "cuda"


def load_decoder(checkpoint: Checkpoint, device: Device, dtype: Dtype) -> "Decoder":
    """The model on a device.

    Raises:
        InputError: no such device, transformers is not installed, or see `Decoder`.
    """
    import torch

    if device is Device.CUDA and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU")
    try:
        from vllm_gemma4q.calibration.decoder import Decoder
    except ImportError as error:
        raise InputError(f"{error.name}: not installed: pip install 'vllm-gemma4q[calibrate]'") from error
    return Decoder(checkpoint, None if dtype is Dtype.AUTO else getattr(torch, dtype.value), device.value)
