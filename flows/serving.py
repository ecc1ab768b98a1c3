"""`olivepress serve`: the packaged model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import Json, print_json, stop
from serve import Settings
from stages.errors import UserError


def serve(
    package: Annotated[
        Path | None, typer.Argument(help="A package's folder.", show_default="models/package")
    ] = None,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    slots: Annotated[
        int, typer.Option(help="Answers that are written at once.", min=1)
    ] = Settings.slots,
    waiting: Annotated[
        int, typer.Option(help="Answers that may wait for a slot; beyond them: 429.", min=0)
    ] = Settings.waiting,
    context: Annotated[
        int, typer.Option(help="Tokens of prompt and answer, if the model takes them.", min=2)
    ] = Settings.context,
    adapters: Annotated[
        int, typer.Option(help="Adapters that stay in memory.", min=1)
    ] = Settings.adapters,
    as_json: Json = False,
) -> None:
    """Serve the package over HTTP: OpenAI's API, a page to try it, every adapter a model by name.

    Others than this machine can ask it only with a key: set OLIVEPRESS_API_KEY, and --host 0.0.0.0.
    """
    try:
        folder = package or _project_package()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected a package")
        from serve import server
        from serve.engine import Engine

        bound = server.listen(host, port)
        engine = Engine(folder, Settings(slots, waiting, context, adapters))
    except UserError as error:
        stop(str(error))
    name, number = bound.getsockname()[:2]
    shown = f"[{name}]" if ":" in name else name
    url = f"http://{shown}:{number}"

    def started() -> None:
        about: dict[str, Any] = {"url": url, "models": engine.models(), "context": engine.context}
        if as_json:
            print_json(about | {"slots": slots, "waiting": waiting})
            return
        typer.echo(f"{folder}: models {', '.join(engine.models())}; {engine.context} tokens")
        typer.echo(
            f"API   {url}/v1\nPage  {url}/\nCtrl-C ends it; what is being answered is finished."
        )

    server.run(engine, bound, started)


def _project_package() -> Path:
    """The package of the project that this is in."""
    from flows.console import without_gc

    with without_gc():
        from tasks import bridge
    from stages.stage import PACKAGE

    return bridge.find_root() / PACKAGE
