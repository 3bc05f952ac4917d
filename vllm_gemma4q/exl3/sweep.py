"""Quality against size: a model in EXL3 at several rates, each written, served and measured beside the original.

FOLDER/exl3-4bpw-h6/     one checkpoint a rate, kept
FOLDER/results.json      written anew after each measurement; what it holds is not measured again
FOLDER/sweep.png
FOLDER/engine.log        what the engine printed, of the last run that measured something
FOLDER/reference.logits  the original's distributions while there is something to compare: 1 MB a position
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf_mixed.atomic_file import exclusive_folder, refusals, write_file
from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.checkpoint import Checkpoint, open_checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.evaluation.measure import Measured, Protocol
from vllm_gemma4q.exl3 import quantize
from vllm_gemma4q.exl3.report import LAYERS

RESULTS, PLOT, LOG = "results.json", "sweep.png", "engine.log"
_REFERENCE, _OTHER = "reference.logits", "other.logits"
Bar = Callable[[Conversion], Any]


class Sweep:
    """Rates of one model.

    Args:
        source: the original.
        folder: of everything that is written.
        protocol: what to measure on.
        statistics: with Hessians; None rounds every weight for itself.
        bar: a progress bar for one conversion, a context manager whose `update` takes bytes.
        say: told what is done next.
    """

    def __init__(
        self,
        source: Checkpoint,
        folder: Path,
        protocol: Protocol,
        statistics: Path | None,
        bar: Bar,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._source, self._folder, self._protocol = source, folder, protocol
        self._statistics, self._bar, self._say = statistics, bar, say
        self._reference: Measured | None = None

    def run(self, points: Sequence[quantize.Options], command: Sequence[str]) -> dict[str, Any]:
        """Write and measure all points; returns what `results.json` holds.

        Raises:
            InputError: the source is bad, a file cannot be written, another run is here, or the engine died.
        """
        with refusals(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        with exclusive_folder(self._folder), self._recordings():
            results = self._earlier()
            for options in points:
                name = name_of(options)
                model = self._write(options, self._folder / name, command)
                if results["points"].get(name, {}).get("model") != model:
                    self._say(f"{name}: measuring")
                    results["points"][name] = {
                        "model": model,
                        **_size(self._folder / name),
                        **self._measure(self._folder / name, results),
                    }
                    self._save(results)
        return {**results, "points": {name: results["points"][name] for name in map(name_of, points)}}

    def _write(self, options: quantize.Options, target: Path, command: Sequence[str]) -> dict[str, str]:
        """One checkpoint, resumed where it was left. Returns its identity."""
        conversion = quantize.plan(self._source, options, self._statistics)
        with self._bar(conversion) as bar:
            convert(conversion, target, command, bar.update)
        return model_identity(open_checkpoint(target))

    def _measure(self, target: Path, results: dict[str, Any]) -> dict[str, Any]:
        if self._reference is None:
            self._say("the original: measuring")
            (self._folder / LOG).write_bytes(b"")  # a killed run's engine may have had a last word
            self._reference = self._protocol.run(self._source.folder, self._folder / LOG, self._folder / _REFERENCE)
            results["reference"] = {"model": model_identity(self._source), **self._reference.to_json()}
        other = self._protocol.run(target, self._folder / LOG, self._folder / _OTHER)
        return other.to_json(self._protocol.compare(self._reference, other))

    def _earlier(self) -> dict[str, Any]:
        """Results of the same source on the same protocol; none of another."""
        empty: dict[str, Any] = {"source": str(self._source.folder), "protocol": self._protocol.to_json(), "points": {}}
        path = self._folder / RESULTS
        if not path.exists():
            return empty
        found: dict[str, Any] = read_json(path)
        same = all(found.get(key) == json.loads(json.dumps(empty[key])) for key in ("source", "protocol"))
        return found if same else empty

    def _save(self, results: dict[str, Any]) -> None:
        write_file(self._folder / RESULTS, json.dumps(results, indent=2) + "\n")

    @contextmanager
    def _recordings(self) -> Iterator[None]:
        """Distributions are gigabytes of a real model: gone at the end, however it comes."""
        try:
            yield
        finally:
            for name in (_REFERENCE, _OTHER):
                (self._folder / name).unlink(missing_ok=True)


def name_of(options: quantize.Options) -> str:
    """The folder of one point."""
    return f"exl3-{options.bits:g}bpw-h{options.head_bits}-{options.codebook}"


def _size(target: Path) -> dict[str, Any]:
    """Bits a weight of the layers with all that is stored for them, and bytes of all weights."""
    manifest = read_json(target / MANIFEST)
    weights = sum(file["bytes"] for name, file in manifest["output"].items() if name.endswith(".safetensors"))
    return {"bpw": manifest["details"]["bits"][LAYERS]["bpw"], "bytes": weights}
