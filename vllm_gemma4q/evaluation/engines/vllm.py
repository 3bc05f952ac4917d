"""Score text with vLLM: the checkpoint as it would be served, one window after the other.

vLLM runs in a process of its own, which ends with the measurement, or with this process, and gives all memory back.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gguf_mixed.atomic_file import refusals
from gguf_mixed.tether import spawn
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.engines.interface import Scores, Windows, all_windows, perplexities
from vllm_gemma4q.evaluation.server import engine_environment, engine_folder, last_error
from vllm_gemma4q.evaluation.windows import Window

_RECORDER = "vllm_gemma4q.evaluation.engines.vllm_recorder.Recorder"
_EMBEDDINGS = "embed_tokens.weight"
_PROCESS = "vllm_gemma4q.evaluation.engines.vllm_process"
# On GPUs vLLM 0.32 has a second model runner, which never holds the log-probabilities of a whole vocabulary.
_RECORDABLE = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


@dataclass(frozen=True)
class VLLM:
    """vLLM as `vllm serve` would start it.

    Attributes:
        dtype: "auto" for the checkpoint's own.
        tensor_parallel_size: ranks.
    """

    dtype: str = "auto"
    tensor_parallel_size: int = 1

    def facts(self) -> dict[str, str]:
        """Name and version. Raises InputError: vLLM is not installed."""
        _require()
        return {"name": "vllm", "version": metadata.version("vllm")}

    def vocabulary(self, model: Path) -> int:
        """See `Engine`."""
        _require()
        for name, tensor in open_checkpoint(model).tensors.items():
            if name.endswith(_EMBEDDINGS):  # config.json may leave sizes to transformers' defaults
                return tensor.rows
        raise InputError(f"{model}: has no tensor {_EMBEDDINGS}")

    def score(self, model: Path, windows: Windows, log: Path, distributions: Path | None = None) -> Scores:
        """See `Engine`. Where vLLM dies, the message is its last error and names the log."""
        _require()
        request = {
            "engine": self._arguments(model, all_windows(windows)),
            "windows": [[list(window.tokens), window.first, window.last] for window in all_windows(windows)],
            "distributions": None if distributions is None else str(distributions.resolve()),
        }
        with engine_folder() as folder:
            asked, answered = folder / "request.json", folder / "answer.npz"
            with refusals(asked):
                asked.write_text(json.dumps(request))
            environment = engine_environment(folder) | ({} if distributions is None else _RECORDABLE)
            code = _run([sys.executable, "-m", _PROCESS, str(asked), str(answered)], log, environment)
            if code or not answered.exists():
                raise InputError(f"{model}: vLLM ended with code {code}; last error: {last_error(log)}")
            answer = np.load(answered)
            found = perplexities(model, answer["logprobs"], windows)
            return Scores(found, int(answer["vocabulary"]), float(answer["seconds"]))

    def _arguments(self, model: Path, windows: Sequence[Window]) -> dict[str, Any]:
        """Of `vllm.LLM`. One window at a time and never in parts: `Recorder` counts on both."""
        length = 1 + max(len(window.tokens) for window in windows)
        return {
            "model": str(model.resolve()),
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "max_model_len": length,
            "max_num_batched_tokens": max(length, 2048),
            "max_num_seqs": 1,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0},
            "worker_extension_cls": _RECORDER,
        }


def _require() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vllm: not installed, expected vLLM 0.32 or newer")


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """The exit code."""
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL}
    with log.open("ab") as output, spawn(command, **options, stdout=output, stderr=subprocess.STDOUT) as process:
        return process.wait()
