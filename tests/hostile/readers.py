"""The project's readers as hostile files meet them: commands through their real `main`, functions through this.

A reader takes the folder with the hostile files and the one it may write to, and returns an exit code. `refusing` turns
what a function raises for bad input into what a command makes of it.
"""

import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from gemma4q_kernels.int8_scaled_mm import tiles
from hostile.sandbox import REFUSED, Reader

import gguf_mixed.cli
import vllm_gemma4q.cli
from gguf_mixed.drop_map import read_drop_map
from gguf_mixed.error_cache import ErrorCache
from gguf_mixed.fisher import fisher_sensitivity, read_fisher
from gguf_mixed.overrides import read_overrides
from gguf_mixed.perplexity import read_base
from gguf_mixed.sensitivity import measured_table
from gguf_mixed.sidecar import check_model, read_sidecar
from gguf_mixed.statistics_file import is_statistics, read_as_imatrix
from gguf_mixed.sweep_results import open_results
from gguf_mixed.tensors import read_inventory
from vllm_gemma4q.architecture import parse_text_architecture
from vllm_gemma4q.calibration.identity import check_same_model
from vllm_gemma4q.calibration.statistics import read_statistics
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.checkpoint.header import read_header, read_json
from vllm_gemma4q.checkpoint.run import Run
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.questions import digest, read_questions
from vllm_gemma4q.evaluation.gsm8k.results import read_results

IDENTITY = {"scheme": "quark-int8", "plan": "0" * 64}


def preload() -> None:
    """Import every command before children are forked, or each of them would do it anew."""
    for name in vllm_gemma4q.cli.COMMANDS:
        import_module(f"vllm_gemma4q.commands.{name}")


def gemma4q(*arguments: str) -> Reader:
    """`gemma4q` with arguments, in which IN and OUT stand for the folders."""
    return _command("gemma4q", vllm_gemma4q.cli.main, arguments)


def gguf_mixed_command(*arguments: str) -> Reader:
    """`gguf-mixed` likewise."""
    return _command("gguf-mixed", gguf_mixed.cli.main, arguments)


def _command(name: str, main: Callable[[], None], arguments: tuple[str, ...]) -> Reader:
    def read(given: Path, target: Path) -> int:
        sys.argv = [name, *(word.replace("IN", str(given)).replace("OUT", str(target)) for word in arguments)]
        main()
        return 0

    return read


def refusing(function: Callable[[Path, Path], object], also: type[Exception] = InputError) -> Reader:
    """A function that raises InputError (kernels: ValueError) for bad input."""

    def read(given: Path, target: Path) -> int:
        try:
            function(given, target)
        except (InputError, also) as error:
            print(f"error: {error}", file=sys.stderr)
            return REFUSED
        return 0

    return read


def one(function: Callable[[Path], object], name: str, also: type[Exception] = InputError) -> Reader:
    """A function of one file."""
    return refusing(lambda given, _: function(given / name), also)


HEADER = one(read_header, "model.safetensors")
CHECKPOINT = refusing(lambda given, _: open_checkpoint(given))
JSON = one(read_json, "config.json")
ARCHITECTURE = refusing(lambda given, _: list(parse_text_architecture(read_json(given / "config.json")).shapes()))
INVENTORY = one(lambda path: list(read_inventory(path).tensors.values()), "model.gguf")
DROP_MAP = one(lambda path: read_drop_map(path, 8, 3, 2), "drop.json")
DIVERGENCES = one(measured_table, "kld.csv")
BASE_FILE = one(read_base, "base")
QUESTIONS = one(lambda path: digest(read_questions(path)), "questions.jsonl")
GSM8K_RESULTS = one(lambda path: read_results(path).check_complete(), "results.jsonl")


def fisher(given: Path, _: Path) -> None:
    """A Fisher file, asked about tensors that it has."""
    found = fisher_sensitivity(read_fisher(given / "fisher.safetensors"))
    model = read_inventory(given / "model.gguf")
    for tensor in model.tensors.values():
        found.of(tensor).check(tensor)


def statistics(given: Path, _: Path) -> None:
    """Everything that a statistics file holds."""
    found = read_statistics(given / "statistics")
    for module in found.modules:
        found.inputs(module)
        found.hessian(module)
        found.hessian_shape(module)
    for experts in found.experts:
        found.routing(experts)
    check_same_model(found, open_checkpoint(given / "model"))


def statistics_as_imatrix(given: Path, _: Path) -> None:
    """The same as an importance matrix."""
    if is_statistics(given / "statistics"):
        read_as_imatrix(given / "statistics")


def error_cache(given: Path, target: Path) -> None:
    """A cache, which is opened for writing: a copy of it."""
    path = target / "cache"
    path.write_bytes((given / "cache").read_bytes())
    try:
        ErrorCache(path).get("a", "d").get("Q4_K", 0.0)
    finally:
        path.unlink()


def sweep_results(given: Path, target: Path) -> None:
    """Results of a sweep to go on with, in a folder that is written, too."""
    inputs, evaluation = {"model": {"name": "m", "sha256": "0"}}, {"text": {"name": "t", "sha256": "0"}, "chunks": 1}
    path = target / "results.json"
    path.write_bytes((given / "results.json").read_bytes())
    try:
        assert open_results(target, inputs, evaluation).content["tiers"] is not None
    finally:
        path.unlink()


def plan_of_model(given: Path, _: Path) -> None:
    """What `gguf-mixed quantize` reads before it looks for a tool: a table and its sidecar, and of which model."""
    content = read_sidecar(given / "t.txt", read_overrides(given / "t.txt"))
    if content is not None:
        check_model(content, read_inventory(given / "model.gguf"))


def tile_table(given: Path, _: Path) -> None:
    """A tile table that a user tuned."""
    tiles.load(given / "sm_90.json").plan(17, 4096, 4096)


def journal(given: Path, target: Path) -> None:
    """A run that resumes by somebody's journal; one that is refused leaves no more than it found."""
    folder = target / "run"
    shutil.copytree(given, folder)
    try:
        with Run(folder, IDENTITY) as run:
            run.write_bytes("config.json", b"{}")
            run.complete()
    except InputError:
        assert {path.name for path in folder.iterdir()} <= {path.name for path in given.iterdir()}
        shutil.rmtree(folder)
        raise
