"""What is damaged and who reads it: one family a kind of file."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hostile import readers, seeds
from hostile.gguf_bytes import File
from hostile.mutate_bytes import mangle
from hostile.mutate_gguf import mangle_gguf
from hostile.mutate_json import mangle_json
from hostile.mutate_safetensors import mangle_safetensors
from hostile.readers import gemma4q, gguf_mixed_command, refusing
from hostile.sandbox import Reader

CONFIGS = Path(readers.tiles.__file__).parent / "configs"
SIDECARS = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "quantization_config.json",
            "gemma4q-manifest.json")  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Files of one kind.

    Attributes:
        files: how many of them CI reads.
        quick: how many of these the quick tests read.
        write: puts a damaged file, and what it needs beside it, into a folder.
        readers: one of them, in turn, reads it.
    """

    files: int
    quick: int
    write: Callable[[Random, Path], None]
    readers: Sequence[Reader]


def quick_families(folder: Path) -> dict[str, Family]:
    """Those that need no large library and no quantized checkpoint, their sound files made in `folder`."""
    folder.mkdir(parents=True)
    made = seeds.write_unquantized(folder)
    return {**_unquantized(made), **_maps()}


def all_families(folder: Path) -> dict[str, Family]:
    """Every family."""
    readers.preload()
    quick = quick_families(folder)
    made = seeds.write_quantized(folder)
    return {**quick, **_checkpoints(made), **_statistics(folder, made), **_gguf(), **_plans(folder), **_others()}


def _unquantized(made: Mapping[str, Path]) -> dict[str, Family]:
    tiny, sharded = made["tiny"], made["sharded"]
    header, index = [readers.HEADER, readers.CHECKPOINT], "model.safetensors.index.json"
    configs = _damaged([made["dense"], made["moe"]], ["config.json"], mangle_json)
    return {
        "safetensors": Family(2500, 400, _damaged([tiny], ["model.safetensors"], mangle_safetensors), header),
        "index": Family(500, 100, _damaged([sharded], [index], mangle_json), [readers.CHECKPOINT]),
        "shards": Family(
            200, 20, _damaged([sharded], ["model-00002-of-00003.safetensors"], mangle_safetensors), header[1:]
        ),
        "config": Family(700, 150, configs, [readers.JSON, readers.ARCHITECTURE]),
        "gguf": Family(1500, 300, _of_gguf("model.gguf", seeds.gguf_model()), [readers.INVENTORY]),
    }


def _maps() -> dict[str, Family]:
    return {
        "drop map": Family(300, 50, _of_bytes("drop.json", seeds.DROP_MAP, mangle_json), [readers.DROP_MAP]),
        "error cache": Family(200, 30, _of_lines("cache", seeds.ERROR_CACHE), [refusing(readers.error_cache)]),
        "base file": Family(100, 10, _of_bytes("base", seeds.BASE_FILE, mangle), [readers.BASE_FILE]),
    }


def _checkpoints(made: Mapping[str, Path]) -> dict[str, Family]:
    dense, moe, sharded = made["dense"], made["moe"], made["sharded"]
    quantized = [made[name] for name in sorted(made) if "-" in name]
    doctor = [gemma4q("doctor", "IN"), gemma4q("doctor", "IN", "--json"), gemma4q("doctor", "IN", "--engine",
              "vllm-stock"),
              gemma4q("doctor", "IN", "--engine", "exllamav3", "--engine", "vllm", "-tp", "4")]  # fmt: skip
    plans = [gemma4q("quantize", "IN", "OUT/made", "--scheme", "quark-int8", "--dry-run"),
             gemma4q("quantize", "IN", "OUT/made", "--scheme", "exl3", "--bits", "3", "--no-hessian",
             "--dry-run")]  # fmt: skip
    memory = gemma4q("vram", "IN", "--json")
    write = gemma4q("quantize", "IN", "OUT/made", "--scheme", "quark-int8")
    restore = gemma4q("restore", "IN", str(dense), "OUT/made", "--dry-run")
    return {
        "doctor: headers": Family(700, 0, _damaged(quantized, ["model.safetensors"], mangle_safetensors), doctor),
        "doctor: config": Family(700, 0, _damaged([*quantized, dense, moe], ["config.json"], mangle_json), doctor),
        "doctor: index": Family(150, 0, _damaged([sharded], ["model.safetensors.index.json"], mangle_json), doctor),
        "doctor: sidecars": Family(400, 0, _damaged(quantized, SIDECARS, _mangle_text), doctor),
        "plan": Family(300, 0, _damaged([dense, moe], ["config.json", "model.safetensors"], _by_name), plans),
        "quantize": Family(
            150, 0, _damaged([dense], ["config.json", "model.safetensors", *SIDECARS[:3]], _by_name), [write]
        ),
        "restore": Family(
            150,
            0,
            _damaged([made["int8-dense"], made["fp8-dense"]], ["config.json", "model.safetensors"], _by_name),
            [restore],
        ),
        "vram": Family(150, 0, _damaged([*quantized, dense], ["config.json"], mangle_json), [memory]),
    }


def _statistics(folder: Path, made: Mapping[str, Path]) -> dict[str, Family]:
    path = seeds.write_statistics(folder, made["moe"])
    quantize = gemma4q(
        "quantize", "IN/model", "OUT/made", "--scheme", "fp8-static", "--statistics", "IN/statistics", "--dry-run"
    )
    everything = [refusing(readers.statistics), refusing(readers.statistics_as_imatrix), quantize]

    def write(rng: Random, target: Path) -> None:
        (target / "statistics").write_bytes(mangle_safetensors(rng, path.read_bytes()))
        _copy(made["moe"], target / "model")

    return {"statistics": Family(400, 0, write, everything)}


def _gguf() -> dict[str, Family]:
    model, imatrix, legacy = seeds.gguf_model(), seeds.gguf_imatrix(), seeds.legacy_imatrix()
    commands = [gguf_mixed_command("inspect", "IN/model.gguf"), gguf_mixed_command("inspect", "IN/model.gguf",
                "--json"),
                gguf_mixed_command("modelfile", "IN/model.gguf"), gemma4q("doctor", "IN/model.gguf"),
                gemma4q("vram", "IN/model.gguf"),
                gguf_mixed_command("plan", "IN/model.gguf", "--recipe", "uniform-q4_k", "-o", "OUT/t.txt")]  # fmt: skip
    show = [gguf_mixed_command("imatrix", "IN/imatrix", "--json"), gguf_mixed_command("imatrix", "IN/imatrix"),
            gguf_mixed_command("inspect", "IN/model.gguf", "--imatrix", "IN/imatrix"),
            gguf_mixed_command("imatrix", "IN/imatrix", "--write", "OUT/i.gguf")]  # fmt: skip
    prune = gguf_mixed_command("prune", "IN/model.gguf", "OUT/o.gguf", "--drop-map", "IN/drop.json")
    pruned = {"drop.json": b'{"0": [1]}'}
    return {
        "gguf: commands": Family(600, 0, _of_gguf("model.gguf", model), commands),
        "gguf: prune": Family(150, 0, _of_gguf("model.gguf", model, pruned), [prune]),
        "imatrix": Family(400, 0, _of_gguf("imatrix", imatrix, {"model.gguf": model.to_bytes()}), show),
        "imatrix: legacy": Family(300, 0, _of_bytes("imatrix", legacy, mangle, {"model.gguf": model.to_bytes()}), show),
    }


def _plans(folder: Path) -> dict[str, Family]:
    """Override tables with their sidecars, as `gguf-mixed plan` writes them."""
    made = folder / "planned"
    made.mkdir()
    model = seeds.gguf_model().to_bytes()
    (made / "model.gguf").write_bytes(model)
    plan = gguf_mixed_command("plan", "IN/model.gguf", "--recipe", "uniform-q4_k", "-o", "OUT/t.txt", "--json")
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):  # commands end the process
        plan(made, made)
    table, sidecar = (made / "t.txt").read_bytes(), (made / "t.txt.json").read_bytes()
    beside = {"model.gguf": model, "t.txt": table, "t.txt.json": sidecar}
    verify = [gguf_mixed_command("verify", "IN/model.gguf", "IN/t.txt"), gemma4q("doctor", "IN/model.gguf")]
    return {
        "override table": Family(300, 0, _of_bytes("t.txt", table, mangle, beside), verify),
        "sidecar": Family(
            300, 0, _of_bytes("t.txt.json", sidecar, mangle_json, beside), [*verify, refusing(readers.plan_of_model)]
        ),
    }


def _others() -> dict[str, Family]:
    fisher, model = Path("fisher.safetensors"), seeds.gguf_model().to_bytes()
    results = {"format": "gguf-mixed sweep 1", "inputs": {"model": {"name": "m", "sha256": "0"}}, "evaluation": None,
               "skipped": {}, "tiers": [{"name": "q4", "file_bytes": 1, "bpw": 4.5}]}  # fmt: skip
    replies = [{"format": "gemma4q gsm8k 1", "identity": {"questions": {"count": 1, "sha256": "0"}}},
               {"question": 0, "expected": "4", "text": "4", "finish_reason": "stop", "tokens": 1,
                "error": None}]  # fmt: skip
    journal = [readers.IDENTITY, {"name": "model.safetensors", "n_bytes": 4, "sha256": "0", "notes": {}}]

    def write_fisher(rng: Random, target: Path) -> None:
        seeds.write_fisher(target / fisher)
        (target / fisher).write_bytes(mangle_safetensors(rng, (target / fisher).read_bytes()))
        (target / "model.gguf").write_bytes(model)

    return {
        "divergences": Family(200, 0, _of_bytes("kld.csv", seeds.DIVERGENCES, mangle), [readers.DIVERGENCES]),
        "fisher": Family(200, 0, write_fisher, [refusing(readers.fisher)]),
        "sweep results": Family(200, 0, _of_bytes("results.json", _json(results), mangle_json),
        [refusing(readers.sweep_results)]),
        "questions": Family(200, 0, _of_lines("questions.jsonl", seeds.QUESTIONS), [readers.QUESTIONS]),
        "replies": Family(200, 0, _of_lines("results.jsonl", _lines(replies)), [readers.GSM8K_RESULTS]),
        "journal": Family(
            300, 0, _of_lines(".gemma4q-run.jsonl", _lines(journal), {"model.safetensors": b"abcd"}),
            [refusing(readers.journal)],
        ),
        "tile table": Family(
            300, 0, _of_bytes("sm_90.json", (CONFIGS / "sm_90.json").read_bytes(), mangle_json),
            [refusing(readers.tile_table, ValueError)],
        ),
    }  # fmt: skip


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _lines(values: Sequence[Any]) -> bytes:
    return b"".join(_json(value) + b"\n" for value in values)


def _damaged(
    folders: Sequence[Path], names: Sequence[str], damage: Callable[..., bytes]
) -> Callable[[Random, Path], None]:
    """One file of one of the checkpoints damaged, the others linked."""

    def write(rng: Random, target: Path) -> None:
        folder = rng.choice(folders)
        name = rng.choice([name for name in names if (folder / name).is_file()])
        content = (folder / name).read_bytes()
        changed = damage(rng, content, name) if damage in (_by_name, _mangle_text) else damage(rng, content)
        _copy(folder, target)
        (target / name).unlink()
        (target / name).write_bytes(changed)

    return write


def _by_name(rng: Random, content: bytes, name: str) -> bytes:
    return mangle_safetensors(rng, content) if name.endswith(".safetensors") else _mangle_text(rng, content, name)


_TEMPLATES = (
    "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}", "{{ 'a' * 10**10 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}", "{{" + "(" * 5000,
    "{{ " + "9" * 5000 + " }}",
    "{%" * 3000, "{% if x %}" * 3000 + "{% endif %}" * 3000, "{{ x" + "|upper" * 20000 + " }}",
    "{{ x" + ".x" * 20000 + " }}",
    "{{ " + "-" * 20000 + "1 }}", "{{ 1e999 }}", "\0", "{# " + "x" * 10**6, "{{ " + "not " * 20000 + "x }}",
)  # fmt: skip


def _mangle_text(rng: Random, content: bytes, name: str) -> bytes:
    if name.endswith(".jinja"):
        return rng.choice(_TEMPLATES).encode() if rng.random() < 0.5 else mangle(rng, content)
    return mangle_json(rng, content)


def _of_bytes(
    name: str, content: bytes, damage: Callable[[Random, bytes], bytes], beside: Mapping[str, bytes] | None = None
) -> Callable[[Random, Path], None]:
    def write(rng: Random, target: Path) -> None:
        for other, data in (beside or {}).items():
            (target / other).write_bytes(data)
        (target / name).write_bytes(damage(rng, content))

    return write


def _of_lines(name: str, content: bytes, beside: Mapping[str, bytes] | None = None) -> Callable[[Random, Path], None]:
    """JSON lines, one of them damaged."""

    def damage(rng: Random, text: bytes) -> bytes:
        if rng.random() < 0.3:
            return mangle(rng, text)
        lines = text.split(b"\n")[:-1]
        index = rng.randrange(len(lines))
        lines[index] = mangle_json(rng, lines[index])
        return b"\n".join(lines) + b"\n"

    return _of_bytes(name, content, damage, beside)


def _of_gguf(name: str, file: File, beside: Mapping[str, bytes] | None = None) -> Callable[[Random, Path], None]:
    return _of_bytes(name, b"", lambda rng, _: mangle_gguf(rng, file), beside)


def _copy(folder: Path, target: Path) -> None:
    """The checkpoint's files by hard links: what a reader changed in them would be seen."""
    shutil.copytree(folder, target, copy_function=os.link, dirs_exist_ok=True)
