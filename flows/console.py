"""What the commands share: the project's folder, JSON, and how a command ends."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from stages.errors import UserError, lack

console = Console(highlight=False, soft_wrap=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def in_project() -> Iterator[Path]:
    """Work in the project's folder; a user's mistake or a full disk is one line."""
    with without_gc():
        from tasks import bridge

    try:
        root = bridge.find_root()
        os.chdir(root)
        yield root
    except UserError as error:
        stop(str(error))
    except OSError as error:
        if said := lack(error):
            stop(said)
        raise


@contextmanager
def without_gc() -> Iterator[None]:
    """For imports and short work: a quarter of their time goes into collecting what they keep.

    What is there at the end is taken for kept: no later collection looks at it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_prefect(verbose: bool) -> None:
    """Settings for the process of one command; logs still reach the server."""
    os.environ.setdefault(
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if verbose else "CRITICAL"
    )
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def stop(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"olivepress: {message}", err=True)
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo(text.encode("utf-8", "backslashreplace"))  # of a file's name that is not UTF-8
