"""One checkpoint of every scheme, made from the small trained models by the commands that users run."""

import gzip
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "examples" / "small_gemma4"
_KEPT = 12  # of 16 experts
_TEXT_CHARACTERS = 40_000


def checkpoints(work: Path, wanted: Sequence[str] = ()) -> dict[str, Path]:
    """Folders by name, such as `int8-moe`.

    Args:
        work: folder for what is written; what is there already is used again.
        wanted: names; all where there are none.
    """
    found = {}
    for name, make in _MAKERS.items():
        if not wanted or name in wanted:
            found[name] = make(work)
    return found


def chats(count: int) -> list[list[dict[str, str]]]:
    """Questions whose answer is one word that the small models learned: a longer one ends in near-ties of bfloat16."""
    spec = importlib.util.spec_from_file_location("held_out", SMALL / "held_out.py")
    assert spec is not None and spec.loader is not None
    held_out = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(held_out)
    conversations = held_out.conversations(8 * count)
    facts = [chat[:-1] for chat in conversations
             if not re.search(r"\d", chat[-2]["content"]) and " " not in chat[-1]["content"]]  # fmt: skip
    return facts[:count]


def _original(kind: str) -> Callable[[Path], Path]:
    return lambda work: SMALL / kind


def _quantized(kind: str, scheme: str, *options: str) -> Callable[[Path], Path]:
    def make(work: Path) -> Path:
        given = ["--statistics", _statistics(work, kind)] if scheme == "fp8-static" else []
        return _written(work / f"{scheme}-{kind}", "quantize", SMALL / kind, "--scheme", scheme, *options, *given)

    return make


def _pruned(work: Path) -> Path:
    statistics = ["--statistics", _statistics(work, "moe"), "--no-refit", "--keep", str(_KEPT)]
    return _written(work / "pruned", "prune", SMALL / "moe", *statistics)


def _pruned_by_layer(work: Path) -> Path:
    """Layers of 12, 14 and 13 experts."""
    drop_map = work / "drop-map.json"
    drop_map.write_text(json.dumps({"0": [0, 3, 5, 9], "1": [2, 7], "2": [1, 4, 15]}))
    return _written(work / "pruned-by-layer", "prune", SMALL / "moe", "--drop-map", str(drop_map))


def _pruned_int8(work: Path) -> Path:
    return _written(work / "pruned-int8", "quantize", _pruned(work), "--scheme", "quark-int8")


_MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "bf16-dense": _original("dense"),
    "bf16-moe": _original("moe"),
    "int8-dense": _quantized("dense", "quark-int8"),
    "int8-moe": _quantized("moe", "quark-int8"),
    "fp8-dense": _quantized("dense", "fp8-static"),
    "fp8-moe": _quantized("moe", "fp8-static"),
    "exl3-dense": _quantized("dense", "exl3", "--bits", "4", "--no-hessian"),
    "exl3-moe": _quantized("moe", "exl3", "--bits", "4", "--no-hessian"),
    "pruned-moe": _pruned,
    "pruned-by-layer-moe": _pruned_by_layer,
    "pruned-int8-moe": _pruned_int8,
}


def _statistics(work: Path, kind: str) -> str:
    """Calibration of a small model on the text that it learned."""
    path, text = work / f"statistics-{kind}.safetensors", work / "calibration.txt"
    if not path.exists():
        text.write_bytes(gzip.decompress((SMALL / "corpus.txt.gz").read_bytes())[:_TEXT_CHARACTERS])
        _run("calibrate", SMALL / kind, path, "--text", text, "--samples", "32", "--max-length", "256")
    return str(path)


def _written(target: Path, command: str, source: Path, *options: str) -> Path:
    _run(command, source, target, *options)
    return target


def _run(*arguments: object) -> None:
    gemma4q = Path(sys.executable).with_name("gemma4q")
    subprocess.run([str(gemma4q), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
