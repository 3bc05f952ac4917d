"""`gemma4q doctor CKPT`"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gguf_mixed.commands.output import AsJson
from vllm_gemma4q.doctor import report
from vllm_gemma4q.doctor.diagnose import Verdict, diagnose, open_patient
from vllm_gemma4q.doctor.engines import EXLLAMAV3, LLAMA_CPP, VLLM, VLLM_STOCK, Device, Engine, parse_engine
from vllm_gemma4q.doctor.subject import Scheme, Subject
from vllm_gemma4q.errors import InputError

if TYPE_CHECKING:
    from gguf_mixed.tensors import Inventory

EXIT_FINDINGS = 1


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a .gguf file.")],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE",
            help="vllm==0.32.0 (with this plugin), vllm-stock==0.32.0, llama.cpp or exllamav3. Repeatable.  [default: "
            "vllm, or llama.cpp for a .gguf]",
        ),
    ] = None,
    ranks: Annotated[int, typer.Option("-tp", metavar="N", min=1, help="Tensor parallelism.")] = 1,
    expert_parallel: Annotated[bool, typer.Option("-ep", help="With expert parallelism.")] = False,
    device: Annotated[Device, typer.Option(help="Where the engine will run.")] = Device.GPU,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The checkpoint it was made from: compares chat template, tokenizer, processor and generation files.",
        ),
    ] = None,
    overrides: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of a .gguf: the table it was planned with.  [default: the one beside it]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Will it load, and what would be silently wrong? From headers: exit 0 loads, 1 fails or degrades, 2 unreadable."""
    patient = open_patient(checkpoint, base)
    is_gguf = not isinstance(patient, Subject)
    if overrides is not None and not is_gguf:
        raise InputError(f"--overrides {overrides}: expected a .gguf file, got {checkpoint}")
    table = overrides or (_planned(checkpoint) if is_gguf else None)
    names = engine or [LLAMA_CPP if is_gguf else VLLM]
    asked = [diagnose(patient, parse_engine(name, device, ranks, expert_parallel), table) for name in names]
    others = [] if engine else [diagnose(patient, one) for one in _others(patient, asked[0].engine)]
    if as_json:
        print(json.dumps(report.as_json(patient, asked, others)))
    else:
        print("\n".join(report.lines(patient, asked, others)))
    if any(one.verdict is not Verdict.LOADS for one in asked):
        raise typer.Exit(EXIT_FINDINGS)


def _planned(written: Path) -> Path | None:
    from vllm_gemma4q.doctor.checks.gguf import find_overrides

    return find_overrides(written)


def _others(patient: "Subject | Inventory", asked: Engine) -> Sequence[Engine]:
    """Engines that might load it too: the same ones differently equipped."""
    if not isinstance(patient, Subject):
        return []
    others = [parse_engine(VLLM_STOCK, asked.device, asked.ranks, asked.expert_parallel)]
    return [*others, parse_engine(EXLLAMAV3)] if patient.scheme is Scheme.EXL3 else others
