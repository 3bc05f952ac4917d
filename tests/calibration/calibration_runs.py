"""How these tests calibrate the small models."""

from pathlib import Path

import torch

from vllm_gemma4q.calibration.calibrate import Calibration
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.calibration.texts import load_samples
from vllm_gemma4q.checkpoint import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, LENGTH = 5, 150  # sliding layers see 64 tokens
IN_MEMORY, SPILLED = 1 << 30, 1


def small(kind: str) -> Path:
    """The folder of a small trained model."""
    return ROOT / "examples" / "small_gemma4" / kind


def calibration(
    kind: str | Path,
    text: Path,
    limit: int = IN_MEMORY,
    hessians: bool = False,
    samples: int = SAMPLES,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """Of a small model, or of a folder made of one."""
    folder = small(kind) if isinstance(kind, str) else kind
    cut = load_samples(folder, [text], samples, LENGTH)
    return Calibration(Decoder(open_checkpoint(folder), dtype), cut, LENGTH, limit, hessians)
