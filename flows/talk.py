"""Questions to the packaged model: `olivepress generate` and `olivepress chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from flows.console import Json, in_project, print_json
from stages.errors import UserError

Adapter = Annotated[
    str | None, typer.Option(help="An adapter's name, or none.", show_default=False)
]
Length = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    adapter: Adapter = None,
    max_new_tokens: Length = 128,
    as_json: Json = False,
) -> None:
    """Answer one prompt with the packaged model, token by token. Default: its only adapter."""
    with in_project():
        session = open_session()
        name = choose(session.adapters, adapter)
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
    with in_project():
        session = open_session()
        name = choose(session.adapters, adapter)
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


def open_session() -> Any:
    from stages.generation import Session
    from stages.stage import PACKAGE

    if not (PACKAGE / "genai_config.json").exists():
        raise UserError(f"{PACKAGE} is not there yet; olivepress run makes it")
    return Session(PACKAGE)


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
