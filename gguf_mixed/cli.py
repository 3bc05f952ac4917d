"""The `gguf-mixed` command: parses, calls the library, prints. One file a command under `commands/`."""

import sys

import typer

from gguf_mixed.commands import (
    compute_imatrix,
    divergence,
    fisher,
    imatrix,
    inspect,
    modelfile,
    plan,
    prune,
    quantize,
    sweep,
    verify,
    weigh_imatrix,
)
from gguf_mixed.errors import InputError
from gguf_mixed.tasks.options import with_address

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="gguf-mixed",
    help="Mixed GGUF quantization of Gemma 4: what llama-quantize would write, tensor by tensor. "
    "With --debug anywhere, bad input shows its traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect.command)
app.command("imatrix")(imatrix.command)
app.command("compute-imatrix")(compute_imatrix.command)
app.command("fisher")(fisher.command)
app.command("weigh-imatrix")(weigh_imatrix.command)
app.command("plan")(plan.command)
app.command("prune")(prune.command)
app.command("quantize")(quantize.command)
app.command("verify")(verify.command)
app.command("divergence")(divergence.command)
app.command("sweep")(sweep.command)
app.command("modelfile")(modelfile.command)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2; `--debug` anywhere shows the traceback."""
    arguments = with_address([argument for argument in sys.argv[1:] if argument != "--debug"])
    debug = "--debug" in sys.argv[1:]
    try:
        app(args=arguments, prog_name="gguf-mixed")
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:  # typer ends with this on Ctrl-C, without a word
            print("interrupted", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
