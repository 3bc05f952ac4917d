"""`gemma4q evaluate perplexity|divergence|gsm8k`: what a checkpoint is worth on the engine that serves it."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import typer

from gguf_mixed.atomic_file import refusals
from gguf_mixed.commands.output import AsJson
from gguf_mixed.temporary import removed_if_killed, temporary_folder
from vllm_gemma4q.commands import evaluate_gsm8k
from vllm_gemma4q.commands.evaluate_report import show
from vllm_gemma4q.commands.model import Device
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.engines.settings import EngineName, Settings, is_gguf
from vllm_gemma4q.evaluation.windows import Framing

if TYPE_CHECKING:  # transformers, which only these commands need
    from vllm_gemma4q.evaluation.measure import Protocol

app = typer.Typer(help="Measure checkpoints and GGUF files.", no_args_is_help=True)
app.command("gsm8k")(evaluate_gsm8k.command)


Models = Annotated[list[Path], typer.Argument(metavar="CKPT..", help="Checkpoint folders; .gguf files.")]
Text = Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text to predict. Repeatable.")]
Framings = Annotated[
    list[Framing] | None,
    typer.Option(
        help="raw: llama-perplexity's protocol; chat: half of each window as the model's answer. Both; with a GGUF raw."
    ),
]
Context = Annotated[int, typer.Option(min=3, help="Tokens of a window.")]
Chunks = Annotated[int | None, typer.Option(min=1, help="Windows of each framing; all by default.")]
EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="For checkpoint folders; transformers: unquantized ones, layer by layer."),
]
Ranks = Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="As for vllm serve.")]
EngineDtype = Annotated[str, typer.Option(metavar="DTYPE", help="As for vllm serve.")]
EngineDevice = Annotated[Device, typer.Option("--device", help="Where transformers computes.")]
LlamaFolder = Annotated[
    Path | None, typer.Option("--llama-cpp", metavar="DIR", help="Folder of llama-perplexity, which runs GGUF files.")
]
Log = Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what the engine prints.")]


@app.command("perplexity")
def perplexity_command(
    checkpoints: Models,
    text: Text,
    framing: Framings = None,
    context: Context = 512,
    chunks: Chunks = None,
    engine: EngineOption = EngineName.VLLM,
    ranks: Ranks = 1,
    dtype: EngineDtype = "auto",
    device: EngineDevice = Device.CPU,
    llama_cpp: LlamaFolder = None,
    log: Log = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity on a text, each checkpoint as its engine runs it."""
    settings = Settings(engine, dtype, ranks, device.value, llama_cpp)
    with engine_log(log) as output:
        protocol = load(checkpoints, text, framing, context, chunks, settings, output)
        identities = {path: _identity(path) for path in checkpoints}  # of all, before the first takes hours
        found = {str(path): {**identities[path], **protocol.run(path, output).to_json()} for path in checkpoints}
    show({"protocol": protocol.to_json(), "checkpoints": found}, as_json)


@app.command("divergence")
def divergence_command(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="What to compare with: a folder, a .gguf file.")
    ],
    checkpoints: Models,
    text: Text,
    framing: Framings = None,
    context: Context = 512,
    chunks: Chunks = None,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="Also REFERENCE's divergence from itself in float32, by transformers.")
    ] = False,
    engine: EngineOption = EngineName.VLLM,
    ranks: Ranks = 1,
    dtype: EngineDtype = "auto",
    device: EngineDevice = Device.CPU,
    llama_cpp: LlamaFolder = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where two files of distributions fit; a temporary folder.")
    ] = None,
    log: Log = None,
    as_json: AsJson = False,
) -> None:
    """Kullback-Leibler divergence from a reference over the whole vocabulary, and perplexity."""
    settings = Settings(engine, dtype, ranks, device.value, llama_cpp)
    with engine_log(log) as output, temporary_folder(place=work) as folder:
        protocol = load([reference, *checkpoints], text, framing, context, chunks, settings, output)
        protocol.check_room(reference, checkpoints, folder.parent, "another --work")
        files = folder / "reference", folder / "other"
        result = _diverge(protocol, reference, checkpoints, noise_floor, files, output)
    show(result, as_json)


def _diverge(
    protocol: "Protocol",
    reference: Path,
    checkpoints: Sequence[Path],
    noise_floor: bool,
    files: tuple[Path, Path],
    log: Path,
) -> dict[str, Any]:
    """Everything that the command prints. `files` are for the distributions of two models at a time."""
    from vllm_gemma4q.evaluation.measure import by_name
    from vllm_gemma4q.evaluation.noise import exact_engine

    exact = exact_engine(reference, protocol.settings) if noise_floor else None
    identities = {path: _identity(path) for path in (reference, *checkpoints)}  # of all, before the first takes hours
    base = protocol.run(reference, log, files[0])
    result: dict[str, Any] = {"protocol": protocol.to_json(), "reference": str(reference)}
    found = {str(reference): {**identities[reference], **base.to_json()}}
    if exact is not None:
        result["noise_floor"] = by_name(protocol.compare(base, protocol.run(reference, log, files[1], exact)))
    for path in checkpoints:
        other = protocol.run(path, log, files[1])
        found[str(path)] = {**identities[path], **other.to_json(protocol.compare(base, other))}
    return {**result, "checkpoints": found}


@contextmanager
def engine_log(given: Path | None) -> Iterator[Path]:
    """Where the engine prints to: a file of the user's, or one that a failure leaves if anything is in it.

    Raises:
        WriteError: it cannot be written.
    """
    if given is not None:
        with refusals(given):
            given.write_bytes(b"")
        yield given
        return
    path = Path(tempfile.gettempdir(), f"gemma4q-engine-{uuid4().hex[:12]}.log")
    with removed_if_killed(path):  # before it is there, so that it is never without
        with refusals(path):
            path.touch(mode=0o600, exist_ok=False)  # nobody else's, nor a link
        try:
            yield path
        except BaseException:
            if path.stat().st_size == 0:
                path.unlink()
            raise
        path.unlink()


def load(
    models: Sequence[Path],
    text: list[Path],
    framings: list[Framing] | None,
    context: int,
    chunks: int | None,
    settings: Settings,
    log: Path = Path(os.devnull),
) -> "Protocol":
    """What the options ask for. Raises InputError: see `load_protocol`; transformers is not installed."""
    try:
        from vllm_gemma4q.evaluation.measure import load_protocol
    except ImportError as error:
        raise InputError(f"{error.name}: not installed: pip install 'vllm-gemma4q[evaluate]'") from error
    return load_protocol(models, text, framings, context, chunks, settings, log)


def _identity(path: Path) -> dict[str, Any]:
    """Which model figures are of, whatever its folder is called."""
    if is_gguf(path):
        from gguf_mixed.identity import model_sha256, named
        from gguf_mixed.tensors import read_inventory

        return {"model": named(path, model_sha256(read_inventory(path)))}
    from vllm_gemma4q.calibration.identity import model_identity
    from vllm_gemma4q.checkpoint import open_checkpoint

    return {"model": model_identity(open_checkpoint(path))}
