"""Score text with llama.cpp: a GGUF as llama-perplexity runs it.

That program reads a text, not tokens: so it is asked first for the tokens it makes of the text (`text_tokens`), and
they are checked against the windows of the other models before anything is measured, and again afterwards. It knows
raw windows alone. Figures are its own: perplexity as printed, to 4 decimals; distributions as saved, see `logits_file`.

Text reaches the model as it is: llama-perplexity by itself would take a backslash and an n in it for a new line.
Not done: choosing devices, threads and offloaded layers: llama.cpp's own choice, and its environment variables
(LLAMA_ARG_THREADS, LLAMA_ARG_N_GPU_LAYERS).
"""

import math
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_mixed.atomic_file import refusals
from gguf_mixed.llama_cpp import error_line, find_tool, last_line, run_tool
from gguf_mixed.perplexity import NICENESS, positions_of, text_command, vocabulary_of, write_base
from gguf_mixed.temporary import temporary_folder
from gguf_mixed.tether import spawn
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.engines import logits_file
from vllm_gemma4q.evaluation.engines.interface import Scores, Windows
from vllm_gemma4q.evaluation.perplexity import Perplexity
from vllm_gemma4q.evaluation.windows import Framing, Window

_TOOL = "llama-perplexity"
_AS_IT_IS = ("--no-escape",)
_TOKENS_ONLY = ("--no-warmup", "--gpu-layers", "0")
_LOOK_AGAIN_SECONDS = 0.05
_NUMBER = r"(-?(?:[\d.]+|nan|inf))"


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's programs on one text.

    Attributes:
        text: what windows were cut from.
        folder: where the programs are looked for; None: see `find_tool`.
    """

    text: str = field(repr=False)
    folder: Path | None = None

    def facts(self) -> dict[str, str]:
        """Name and version. Raises InputError: not found."""
        finished = subprocess.run([self._tool, "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"^version: (.*)$", finished.stdout + finished.stderr, re.M)
        return {"name": "llama.cpp", "version": found.group(1) if found else "unknown"}

    def vocabulary(self, model: Path) -> int:
        """See `Engine`."""
        return vocabulary_of(model)

    def tokens(self, model: Path, context: int, chunks: int | None, log: Path) -> logits_file.Tokens:
        """What llama.cpp makes of the text, int32 [chunks, context]; seconds, since the model is not run.

        Raises:
            InputError: llama-perplexity is not found, cannot load the model, or the text is too short.
        """
        with temporary_folder() as folder:
            path = folder / "logits"
            command = text_command(self._tool, model, self._write(folder), chunks or -1, context)
            command += ["--kl-divergence-base", str(path), *_AS_IT_IS, *_TOKENS_ONLY]
            begun = log.stat().st_size if log.exists() else 0
            with log.open("ab") as output, spawn(command, **_to(output)) as process:
                while (header := logits_file.read_header(path)) is None and process.poll() is None:
                    time.sleep(_LOOK_AGAIN_SECONDS)
            header = header or logits_file.read_header(path)
        if header is None:
            lines = log.read_bytes()[begun:].decode(errors="replace").splitlines()
            raise InputError(f"{model}: {_TOOL}: {error_line(lines) or last_line(lines)}")
        return header.tokens

    def score(self, model: Path, windows: Windows, log: Path, distributions: Path | None = None) -> Scores:
        """See `Engine`. Raises InputError also: windows that are not raw; tokens that are not those of the windows."""
        if set(windows) != {Framing.RAW}:
            raise InputError(f"{model}: got windows of {', '.join(windows)}, expected {Framing.RAW.value} for a GGUF")
        started = time.monotonic()
        place = None if distributions is None else distributions.parent
        with temporary_folder(place=place) as folder:
            for niceness in NICENESS:  # until the last line is not lost
                lines, vocabulary = self._run(model, windows[Framing.RAW], folder, log, distributions, niceness)
                if found := _estimate(model, lines, windows[Framing.RAW]):
                    return Scores({Framing.RAW: found}, vocabulary, time.monotonic() - started, logits_file.FLOOR)
        raise InputError(f"{model}: {_TOOL} printed no final estimate: {error_line(lines) or last_line(lines)}")

    @property
    def _tool(self) -> Path:
        return find_tool(_TOOL, self.folder)

    def _write(self, folder: Path) -> Path:
        """The text as a file; llama.cpp takes a new line from its end."""
        path = folder / "text.txt"
        with refusals(path):
            path.write_text(self.text + "\n" * self.text.endswith("\n"), encoding="utf-8")
        return path

    def _run(
        self,
        model: Path,
        windows: Sequence[Window],
        folder: Path,
        log: Path,
        distributions: Path | None,
        niceness: int,
    ) -> tuple[list[str], int]:
        """Lines printed, and the vocabulary of what was recorded."""
        text, chunks, context = self._write(folder), len(windows), len(windows[0].tokens)
        lines: list[str] = []
        with refusals(log), log.open("a") as output:

            def keep(line: str) -> None:
                lines.append(line)
                print(line, file=output, flush=True)

            if distributions is None:
                command = text_command(self._tool, model, text, chunks, context)
                run_tool([*command, *_AS_IT_IS], keep, niceness)
                return lines, 0
            options: dict[str, Any] = {"options": _AS_IT_IS, "main_niceness": niceness}
            path = folder / "base"
            base = write_base(self._tool, model, text, path, chunks=chunks, context=context, log=keep, **options)
        header = logits_file.read_header(path)
        assert header is not None
        logits_file.check_tokens(model, header.tokens, windows)
        logits_file.write_rows(base, distributions)
        path.unlink()
        return lines, base.vocabulary


def _estimate(model: Path, lines: Sequence[str], windows: Sequence[Window]) -> Perplexity | None:
    """What llama-perplexity prints at its end; None: it has not. Raises InputError: not a finite number."""
    found = re.search(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}", "\n".join(lines))
    if found is None:
        return None
    value, error = (float(number) for number in found.groups())
    if not (math.isfinite(value) and math.isfinite(error)):
        raise InputError(f"{model}: {_TOOL}: perplexity is {value}, expected a finite number")
    return Perplexity(value, error, len(windows) * positions_of(len(windows[0].tokens)))


def _to(output: Any) -> dict[str, Any]:
    return {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
