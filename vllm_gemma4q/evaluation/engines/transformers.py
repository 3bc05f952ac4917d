"""Score text with transformers, one decoder layer in memory at a time: `calibration.decoder`.

So a 31B model in float32 needs no 124 GB: all windows pass one layer before the next is loaded. In memory lie one
layer, the output layer, and what windows hold between two layers (hidden size x tokens; many windows are scored in
several passes over the weights). A second engine to check vLLM with, and what computes the noise floor.

BF16, F16 and F32 checkpoints only: transformers loads none of the quantized ones that this package writes.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gguf_mixed.atomic_file import refusals
from vllm_gemma4q.calibration.decoder import Decoder
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.engines.interface import Scores, Windows, all_windows, perplexities
from vllm_gemma4q.evaluation.windows import Window

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ACTIVATION_BYTES = 4 << 30


@dataclass(frozen=True)
class Transformers:
    """transformers' own modules.

    Attributes:
        dtype: to compute in: "auto" for the checkpoint's own, "bfloat16" or "float32".
        device: "cpu" or "cuda".
        activation_bytes: of windows between two layers; more windows are scored in several passes.
    """

    dtype: str = "auto"
    device: str = "cpu"
    activation_bytes: int = _ACTIVATION_BYTES

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype: got {self.dtype}, expected one of {', '.join(DTYPES)} with transformers")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU")

    def facts(self) -> dict[str, str]:
        """Name and version."""
        return {"name": "transformers", "version": metadata.version("transformers")}

    def load(self, model: Path) -> Decoder:
        """What `score` runs, nothing of it in memory yet. Raises InputError: see `Decoder`; quantized."""
        checkpoint = open_checkpoint(model)
        if method := (checkpoint.config.get("quantization_config") or {}).get("quant_method"):
            raise InputError(f"{model}: quantized ({method}), which transformers does not load; expected --engine vllm")
        return Decoder(checkpoint, DTYPES[self.dtype], self.device)

    def vocabulary(self, model: Path) -> int:
        """See `Engine`."""
        return self.load(model).architecture.vocab_size

    @torch.no_grad()
    def score(self, model: Path, windows: Windows, log: Path, distributions: Path | None = None) -> Scores:
        """See `Engine`. Nothing is printed."""
        decoder, started = self.load(model), time.monotonic()
        if distributions is not None:
            with refusals(distributions):
                distributions.write_bytes(b"")
        width = decoder.architecture.hidden_size * decoder.dtype.itemsize
        logprobs = [
            _score_predicted(decoder, group, distributions)
            for group in _groups(all_windows(windows), self.activation_bytes // width)
        ]
        found = perplexities(model, np.concatenate(logprobs), windows)
        vocabulary = 0 if distributions is None else decoder.architecture.vocab_size
        return Scores(found, vocabulary, time.monotonic() - started)


def _groups(windows: Sequence[Window], most_tokens: int) -> Iterator[list[Window]]:
    """Windows in their order, as many as `most_tokens` hold, at least one."""
    group: list[Window] = []
    for window in windows:
        if group and sum(len(member.tokens) for member in [*group, window]) > most_tokens:
            yield group
            group = []
        group.append(window)
    yield group


def _score_predicted(decoder: Decoder, windows: Sequence[Window], distributions: Path | None) -> Any:
    """Float32 [predicted tokens] of windows that pass the layers together; appends their distributions to the file."""
    hidden = [decoder.embed(window.tokens).cpu() for window in windows]
    for index in range(decoder.n_layers):
        layer = decoder.layer(index)
        hidden = [decoder.run(layer, each.to(decoder.device)).cpu() for each in hidden]
    norm, head = decoder.norm(), decoder.head(0, decoder.architecture.vocab_size)
    cap: float | None = decoder.config.final_logit_softcapping
    scores = []
    for window, each in zip(windows, hidden, strict=True):
        logits = norm(each.to(decoder.device))[window.first - 1 : window.last - 1] @ head.T
        if cap is not None:  # in the logits' own dtype, as transformers does
            logits = torch.tanh(logits / cap) * cap
        rows = logits.float().log_softmax(-1).cpu()
        scores.append(rows.gather(1, torch.tensor(window.tokens[window.first : window.last])[:, None])[:, 0].numpy())
        if distributions is not None:
            with refusals(distributions), distributions.open("ab") as file:
                file.write(rows.numpy().data)
    return np.concatenate(scores)
