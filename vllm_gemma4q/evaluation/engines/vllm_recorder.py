"""Loaded into vLLM's workers: writes the log-probabilities of every token of the vocabulary while prompts are scored.

vLLM itself hands them out as dictionaries, a Python object a token: unusable for 262,144 of them. The worker computes
them once for each prompt, in `Sampler.compute_logprobs`; what that returns goes to a file as it is. vLLM's second model
runner (`VLLM_USE_V2_MODEL_RUNNER`) does not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Recorder:
    """Mixed into a worker by vLLM (`worker_extension_cls`); methods are called with `LLM.collective_rpc`."""

    model_runner: Any
    rank: int

    def gemma4q_record(self, path: str, spans: Sequence[tuple[int, int]]) -> None:
        """Start recording.

        Args:
            path: file to write, float32 rows; the first rank's alone is written.
            spans: rows (start, stop) of each prompt to keep; prompts are scored one by one and in this order.

        Raises:
            RuntimeError: this model runner computes them elsewhere.
        """
        if self.rank == 0:
            sampler = self.model_runner.sampler
            if not hasattr(sampler, "compute_logprobs"):
                found = f"{type(sampler).__module__}.{type(sampler).__name__}"
                raise RuntimeError(f"distributions: got {found}, expected a sampler that has compute_logprobs")
            Path(path).write_bytes(b"")
            sampler.compute_logprobs = _Recording(Path(path), spans, sampler.compute_logprobs)

    def gemma4q_stop(self) -> tuple[int, int] | None:
        """End recording: prompts recorded, and the vocabulary's size; None from other ranks."""
        if self.rank:
            return None
        recording: _Recording = self.model_runner.sampler.compute_logprobs
        del self.model_runner.sampler.compute_logprobs  # the class's own is underneath
        return recording.done, recording.width


class _Recording:
    """Stands before `compute_logprobs`: float [T, V] to float32 [T, V]."""

    def __init__(self, path: Path, spans: Sequence[tuple[int, int]], original: Any) -> None:
        self.done = self.width = 0
        self._path, self._spans, self._original = path, spans, original

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logprobs: torch.Tensor = self._original(logits)
        start, stop = self._spans[self.done]
        if stop > len(logprobs):
            raise RuntimeError(f"prompt {self.done}: got {len(logprobs)} rows at once, expected at least {stop}")
        with self._path.open("ab") as file:
            file.write(logprobs[start:stop].float().cpu().contiguous().numpy().tobytes())
        self.done, self.width = self.done + 1, logprobs.shape[1]
        return logprobs
