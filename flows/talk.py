"""Questions to the packaged model: `olivepress generate` and `olivepress chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import Json, in_project, print_json
from stages.errors import UserError

Adapter = Annotated[
    str | None,
    typer.Option(help="An adapter's name, none, or an .onnx_adapter file.", show_default=False),
]
Length = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    adapter: Adapter = None,
    max_new_tokens: Length = 128,
    as_json: Json = False,
) -> None:
    """Answer one prompt with the packaged model, token by token. Default: its only adapter."""
    file = adapter_file(adapter)
    with in_project():
        session = open_session(file)
        name = choose(session.adapters, file.stem if file else adapter)
        pieces = []
        for piece in session.stream(prompt, name, max_new_tokens=max_new_tokens):
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
        if as_json:
            print_json({"prompt": prompt, "adapter": name, "answer": "".join(pieces)})
        else:
            print()


def chat(adapter: Adapter = None, max_new_tokens: Length = 128) -> None:
    """Talk with the packaged model line by line; /adapter NAME switches, /adapter none, /quit."""
    file = adapter_file(adapter)
    with in_project():
        session = open_session(file)
        name = choose(session.adapters, file.stem if file else adapter)
        prompts = sys.stdin.isatty()
        while True:
            try:
                line = input(f"{name or 'none'}> " if prompts else "").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if line == "/quit":
                break
            if line.startswith("/adapter"):
                name = _switch(session.adapters, line.removeprefix("/adapter").strip(), name)
            elif line.startswith("/"):
                typer.echo("commands: /adapter NAME, /adapter none, /quit", err=True)
            elif line:
                for piece in session.stream(line, name, max_new_tokens=max_new_tokens):
                    print(piece, end="", flush=True)
                print()


def _switch(adapters: list[str], wanted: str, now: str | None) -> str | None:
    try:
        name = choose(adapters, wanted or None)
    except UserError as error:
        typer.echo(str(error), err=True)
        return now
    typer.echo(f"adapter: {name or 'none'}", err=True)
    return name


def adapter_file(adapter: str | None) -> Path | None:
    """The file that --adapter means, if it means one."""
    return Path.cwd() / adapter if adapter and adapter.endswith(".onnx_adapter") else None


def open_session(file: Path | None = None) -> Any:
    """The package, with its adapters and perhaps one from elsewhere.

    Raises:
        UserError: there is no package, or no such file.
    """
    from stages.generation import Session, adapters_of
    from stages.stage import PACKAGE

    if not (PACKAGE / "genai_config.json").exists():
        raise UserError(f"{PACKAGE} is not there yet; olivepress run makes it")
    if file is None:
        return Session(PACKAGE)
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    return Session(PACKAGE, {**adapters_of(PACKAGE), file.stem: file})


def choose(adapters: list[str], wanted: str | None) -> str | None:
    """The adapter to use: the one named, or the only one there is."""
    if wanted == "none":
        return None
    if wanted is None and len(adapters) == 1:
        return adapters[0]
    if wanted not in adapters:
        known = ", ".join([*adapters, "none"])
        raise UserError(f"--adapter {wanted or ''}: choose one of {known}".replace("  ", " "))
    return wanted
