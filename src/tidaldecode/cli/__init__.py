"""The command line: parses, wires parts together and prints; the work is done elsewhere.

Every fault of the input ends as one line on stderr and exit code 2; Ctrl-C ends with 130.
"""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

import typer

from tidaldecode.cli import bench
from tidaldecode.cli import eval as evaluation
from tidaldecode.cli.bench_lossless import lossless
from tidaldecode.cli.calibrate import calibrate
from tidaldecode.cli.demo import demo
from tidaldecode.cli.generate import generate
from tidaldecode.cli.info import info
from tidaldecode.cli.lm_eval import lm_eval
from tidaldecode.cli.prove import prove
from tidaldecode.errors import TidalError

app = typer.Typer(
    name="tidaldecode",
    help="TidalDecode: sparse-attention decoding for long contexts.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(demo)
app.command()(generate)
app.command()(info)
app.command()(calibrate)
app.command()(prove)
# All that follows is the harness's, --help too.
app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)(lm_eval)
app.add_typer(evaluation.app, name="eval")
bench.app.command()(lossless)
app.add_typer(bench.app, name="bench")

USAGE_ERROR = 2
INTERRUPTED = 130


def main() -> None:
    """Entry point of the ``tidaldecode`` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(arguments, standalone_mode=False, prog_name="tidaldecode")
    except TidalError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "tidaldecode"
        message = error.format_message()
        return _fail(f"{message} (see {command} --help)") if message else USAGE_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("tidaldecode: interrupted; nothing was left half-written", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as one line, without the place in our source that it comes from."""
    print(f"tidaldecode: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str) -> int:
    """Print one line and return the exit code that goes with it."""
    print(f"tidaldecode: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR
