"""Safetensors checkpoints in and out: strict headers, one bounded stream of rows, atomic and resumable output."""

from vllm_gemma4q.checkpoint.header import DTYPE_BYTES, TensorInfo
from vllm_gemma4q.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_gemma4q.checkpoint.rewrite import rewrite
from vllm_gemma4q.checkpoint.steps import OutputTensor, Step

__all__ = ["DTYPE_BYTES", "Checkpoint", "OutputTensor", "Step", "TensorInfo", "open_checkpoint", "rewrite"]
