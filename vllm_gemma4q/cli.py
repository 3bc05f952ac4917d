"""The `gemma4q` command: parses, calls the library, prints. One file a command under `commands/`.

Only the command that is run is imported: together they bring in all of torch, scipy and gguf.
"""

import sys
from importlib import import_module

import typer

from gguf_mixed.tasks.options import with_address
from vllm_gemma4q.errors import InputError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# In the order of `--help`. Each is a module with a function `command`, or with an `app` of several.
COMMANDS = (
    "doctor", "calibrate", "quantize", "prune", "restore", "evaluate", "sweep", "compare", "card", "report", "vram",
    "tune", "bench",
)  # fmt: skip


def application(names: tuple[str, ...] = COMMANDS) -> typer.Typer:
    """The command with those of its subcommands."""
    app = typer.Typer(
        name="gemma4q",
        help="Quantize, prove and serve Gemma 4. With --debug anywhere, bad input shows its traceback.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name in names:
        module = import_module(f"vllm_gemma4q.commands.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(module.command)
    app.callback()(_commands)
    return app


def _commands() -> None:
    """Keep `gemma4q COMMAND` even with a single command."""


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2; `--debug` anywhere shows the traceback."""
    arguments = with_address([argument for argument in sys.argv[1:] if argument != "--debug"])
    debug = "--debug" in sys.argv[1:]
    try:
        named = tuple(arguments[:1]) if arguments[:1] and arguments[0] in COMMANDS else COMMANDS
        application(named)(args=arguments, prog_name="gemma4q")
    except InputError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:  # typer ends with this on Ctrl-C, without a word
            print("interrupted: run the same command again to resume", file=sys.stderr)
        raise
