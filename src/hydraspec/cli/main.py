"""Entry point. Commands import torch only once they run, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from hydraspec import __version__
from hydraspec.cli import bench, chat, demo, generate, info, regenerate, train
from hydraspec.errors import HydraspecError

app = typer.Typer(
    name="hydraspec",
    help="Decode several tokens a step with draft heads, and say exactly what the base model would have said.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hydraspec {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Shared options."""


app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("train")(train.train_heads)
app.command("regenerate")(regenerate.regenerate_data)
app.command("bench")(bench.bench)
app.command("info")(info.info)


def run() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except HydraspecError as error:
        sys.stderr.write(f"hydraspec: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            sys.stderr.write("\nhydraspec: stopped\n")
        raise
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a folder that may not be written
        sys.stderr.write(f"hydraspec: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    run()
