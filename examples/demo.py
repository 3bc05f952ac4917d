"""From a BF16 Gemma 4 to a served INT8 one and to a GGUF, and a report: what `make demo` runs.

    .venv/bin/python examples/demo.py [--model CHECKPOINT] [--part int8|gguf|all] [--output demo-output]

Without --model it takes the small trained Gemma 4 that comes with the repository. The parts are `demo_int8` and
`demo_gguf`; `report.json` in the output folder holds what each found, and is written after each.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
SMALL_MODEL = HERE / "small_gemma4" / "dense"
BAD_INPUT = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SMALL_MODEL, help="BF16 Gemma 4 checkpoint folder")
    parser.add_argument("--part", choices=("int8", "gguf", "all"), default="all")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--question", default="What is the capital of France?", help="what INT8 and BF16 are asked")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        print(f"error: {arguments.model}: not a folder", file=sys.stderr)
        return BAD_INPUT
    arguments.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict] = {}
    if arguments.part != "gguf" and not run_int8(arguments, report):
        return BAD_INPUT
    if arguments.part != "int8" and not run_gguf(arguments, report):
        return BAD_INPUT
    print(f"Report: {write(arguments.output, report)}; logs beside it")
    return 0


def run_int8(arguments: argparse.Namespace, report: dict[str, dict]) -> bool:
    """Whether the part could be done; if not, one line says why."""
    import demo_int8

    from vllm_gemma4q.errors import InputError

    try:
        report["int8"] = demo_int8.run(arguments.model, arguments.output, arguments.question)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    write(arguments.output, report)
    demo_int8.show(report["int8"])
    return True


def run_gguf(arguments: argparse.Namespace, report: dict[str, dict]) -> bool:
    """Whether the part could be done; if not, one line says why."""
    import demo_gguf

    try:
        report["gguf"] = demo_gguf.run(arguments.model, arguments.output)
    except demo_gguf.StepError as error:
        print(f"error: GGUF: {error}", file=sys.stderr)
        return False
    write(arguments.output, report)
    demo_gguf.show(report["gguf"])
    return True


def write(output: Path, report: dict[str, dict]) -> Path:
    """Write what is known so far."""
    path = output / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
