"""`gemma4q calibrate SRC STATS --text FILE`"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from gguf_mixed.commands.output import AsJson
from gguf_mixed.tasks import Where, executor
from gguf_mixed.tasks import options as scale
from vllm_gemma4q.checkpoint import open_checkpoint
from vllm_gemma4q.commands.model import Device, Dtype, load_decoder
from vllm_gemma4q.commands.quantize import visible_devices
from vllm_gemma4q.sizes import parse_size


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="BF16 Gemma 4 checkpoint folder.")],
    target: Annotated[Path, typer.Argument(metavar="STATS", help="The statistics file to write (.safetensors).")],
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="UTF-8 text to calibrate on. Repeatable.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples of text.")] = 512,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample, at most.")] = 2048,
    raw: Annotated[bool, typer.Option("--raw", help="Plain text instead of the model's chat template.")] = False,
    hessians: Annotated[
        bool, typer.Option("--hessians", help="Also sum x x^T of every linear: gigabytes a layer.")
    ] = False,
    fisher: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also a backward pass; write its Fisher marginals, for gguf-mixed plan."),
    ] = None,
    fisher_samples: Annotated[int, typer.Option(min=1, help="Samples to differentiate, spread over all.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the labels that --fisher draws.")] = 0,
    activations_limit: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Activations kept in memory; more go to the work folder, and all with workers."
        ),
    ] = "4GiB",
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.CPU,
    dtype: Annotated[
        Dtype, typer.Option(help="What to compute in; auto: what the weights are stored in.")
    ] = Dtype.AUTO,
    work: Annotated[Path | None, typer.Option(metavar="DIR", help="Work folder; STATS.work where not given.")] = None,
    workers: scale.Workers = None,
    ray: scale.Ray = None,
    as_json: AsJson = False,
) -> None:
    """Run a model over text, one layer in memory at a time, and keep statistics. Run it again to resume."""
    if ray is not None:  # other machines have another working directory
        source, target, work = source.absolute(), target.absolute(), None if work is None else work.absolute()
    limit = parse_size(activations_limit)
    decoder = load_decoder(open_checkpoint(source), device, dtype)
    from vllm_gemma4q.calibration.calibrate import Calibration, calibrate
    from vllm_gemma4q.calibration.texts import load_samples

    cut = load_samples(source, text, samples, max_length, raw)
    passes = fisher_samples if fisher is not None else 0
    calibration = Calibration(decoder, cut, max_length, limit, hessians, passes, seed)
    folder = work or target.with_name(target.name + ".work")
    where = Where(workers, ray, visible_devices() if device is Device.CUDA else ())
    with (
        executor(where) as at_work,
        tqdm(total=calibration.n_steps, unit="token layer", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
    ):
        written = calibrate(calibration, target, folder, fisher, bar.update, at_work)
    report: dict[str, Any] = {"target": str(target), "written": written, **calibration.details()}
    if as_json:
        print(json.dumps(report))
    elif written:
        print(f"{target}: {report['samples']} samples, {report['tokens']:,} tokens, {report['framing']}")
    else:
        print(f"{target} is already complete: nothing to do.")
