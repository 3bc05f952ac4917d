"""Safetensors checkpoints in and out: strict headers, one bounded stream of rows, atomic and resumable output.

Importing this package imports no torch, which takes seconds: `steps` and what comes after it do.
"""

from vllm_gemma4q.checkpoint.header import DTYPE_BYTES, TensorInfo
from vllm_gemma4q.checkpoint.reader import Checkpoint, open_checkpoint

__all__ = ["DTYPE_BYTES", "Checkpoint", "TensorInfo", "open_checkpoint"]
