"""Quality against size: a model in EXL3 at several rates, each written, served and measured beside the original.

FOLDER/exl3-4bpw-h6/     one checkpoint a rate, kept
FOLDER/results.json      of one source and protocol; written anew after each measurement; what it holds is kept
FOLDER/sweep.png
FOLDER/engine.log        what the engine printed, of the last run that measured something
FOLDER/gemma4q-*/        distributions of the original and of one rate while they are compared: 1 MB a position each
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf_mixed.atomic_file import exclusive_folder, refusals, write_file
from gguf_mixed.identity import first_difference
from gguf_mixed.temporary import temporary_folder
from vllm_gemma4q.calibration.identity import model_identity
from vllm_gemma4q.checkpoint import Checkpoint, open_checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert
from vllm_gemma4q.checkpoint.header import read_json
from vllm_gemma4q.checkpoint.run import MANIFEST
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.measure import Measured, Protocol
from vllm_gemma4q.exl3 import quantize
from vllm_gemma4q.exl3.report import LAYERS

RESULTS, PLOT, LOG = "results.json", "sweep.png", "engine.log"
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
            InputError: the source is bad, a file cannot be written, another run is here, the folder holds results of
                another source or protocol, distributions do not fit in it, or the engine died.
        """
        with refusals(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        with exclusive_folder(self._folder), temporary_folder(place=self._folder) as recordings:
            results = self._earlier()
            if any(name_of(options) not in results["points"] for options in points):
                source = self._source.folder
                self._protocol.check_room(source, [source], self._folder, "another FOLDER")
            for options in points:
                name = name_of(options)
                model = self._write(options, self._folder / name, command)
                if results["points"].get(name, {}).get("model") != model:
                    self._say(f"{name}: measuring")
                    results["points"][name] = {
                        "model": model,
                        **_size(self._folder / name),
                        **self._measure(self._folder / name, results, recordings),
                    }
                    self._save(results)
        return {**results, "points": {name: results["points"][name] for name in map(name_of, points)}}

    def _write(self, options: quantize.Options, target: Path, command: Sequence[str]) -> dict[str, str]:
        """One checkpoint, resumed where it was left. Returns its identity."""
        conversion = quantize.plan(self._source, options, self._statistics)
        with self._bar(conversion) as bar:
            convert(conversion, target, command, bar.update)
        return model_identity(open_checkpoint(target))

    def _measure(self, target: Path, results: dict[str, Any], recordings: Path) -> dict[str, Any]:
        if self._reference is None:
            self._say("the original: measuring")
            with refusals(self._folder / LOG):
                (self._folder / LOG).write_bytes(b"")  # a killed run's engine may have had a last word
            self._reference = self._protocol.run(self._source.folder, self._folder / LOG, recordings / "reference")
            results["reference"] = {"model": model_identity(self._source), **self._reference.to_json()}
        other = self._protocol.run(target, self._folder / LOG, recordings / "other")
        return other.to_json(self._protocol.compare(self._reference, other))

    def _earlier(self) -> dict[str, Any]:
        """What an earlier run left, of the same source on the same protocol. Raises InputError: of another."""
        path, protocol = self._folder / RESULTS, json.loads(json.dumps(self._protocol.to_json()))
        found: dict[str, Any] = {"points": {}}
        if path.exists():
            found = read_json(path)
            expected = _conditions(model_identity(self._source), protocol)
            model = _object(found.get("reference")).get("model")
            if difference := first_difference(_conditions(model, _object(found.get("protocol"))), expected):
                raise InputError(f"{path}: made with {difference}: another FOLDER, or move the file away")
        return {**found, "source": str(self._source.folder), "protocol": protocol}

    def _save(self, results: dict[str, Any]) -> None:
        write_file(self._folder / RESULTS, json.dumps(results, indent=2) + "\n")


def name_of(options: quantize.Options) -> str:
    """The folder of one point."""
    return f"exl3-{options.bits:g}bpw-h{options.head_bits}-{options.codebook}"


def _conditions(source: Any, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What decides figures. Of texts the content counts, not the name: one key each, and their number."""
    texts = protocol["texts"] if isinstance(protocol.get("texts"), list) else []
    of_texts = {f"text {number}": text for number, text in enumerate(texts, 1)}
    return {"source": source, **protocol, "texts": len(texts), **of_texts}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _size(target: Path) -> dict[str, Any]:
    """Bits a weight of the layers with all that is stored for them, and bytes of all weights."""
    manifest = read_json(target / MANIFEST)
    weights = sum(file["bytes"] for name, file in manifest["output"].items() if name.endswith(".safetensors"))
    return {"bpw": manifest["details"]["bits"][LAYERS]["bpw"], "bytes": weights}
