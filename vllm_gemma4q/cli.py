"""The `gemma4q` command: parses, calls the library, prints. One file a command under `commands/`."""

import sys

import typer

from vllm_gemma4q.commands import bench, calibrate, card, doctor, evaluate, prune, quantize, restore, sweep, tune, vram
from vllm_gemma4q.errors import InputError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="gemma4q",
    help="Quantize, prove and serve Gemma 4.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("calibrate")(calibrate.command)
app.command("quantize")(quantize.command)
app.command("prune")(prune.command)
app.command("restore")(restore.command)
app.command("tune")(tune.command)
app.command("bench")(bench.command)
app.command("vram")(vram.command)
app.command("doctor")(doctor.command)
app.command("sweep")(sweep.command)
app.command("card")(card.command)
app.add_typer(evaluate.app, name="evaluate")


@app.callback()
def _commands() -> None:
    """Keep `gemma4q COMMAND` even while there is a single command."""


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2; `--debug` anywhere shows the traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="gemma4q")
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:  # typer ends with this on Ctrl-C, without a word
            print("interrupted: run the same command again to resume", file=sys.stderr)
        raise
