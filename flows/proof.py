"""`olivepress sign` and `verify PACKAGE`: whose a package is, and that it is what it says."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from flows.console import Json, console, print_json, stop, without_gc
from stages.errors import UserError, on_one_line
from stages.stage import PACKAGE

STYLES = {"ok": "green", "not checked": "yellow", "failed": "bold red"}
Folder = Annotated[
    Path | None, typer.Argument(metavar="[PACKAGE]", show_default=PACKAGE.as_posix())
]


def sign(
    package: Folder = None,
    *,
    key: Annotated[
        Path | None,
        typer.Option(envvar="OLIVEPRESS_SIGNING_KEY", help="A private key, in PEM."),
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign by an identity, through sigstore.dev.")
    ] = False,
    trust_config: Annotated[
        Path | None,
        typer.Option(help="Through another Sigstore: its addresses and keys, in JSON."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign a package with a key, or by an identity; olivepress publish sends the signature along.

    To make a key, and the public one that others check with:

      openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes256 -out key.pem

      openssl pkey -in key.pem -pubout -out key.pub

    The password of key.pem is read from OLIVEPRESS_SIGNING_PASSWORD. Keep both out of the project.
    """
    try:
        if bool(key) == sigstore:
            raise UserError("give either --key KEY or --sigstore")
        if trust_config and key:
            raise UserError("--trust-config goes with --sigstore")
        key, trust_config = key and key.absolute(), trust_config and trust_config.absolute()
        root, folder = _places(package, project=True)
        with without_gc():
            from tasks import signing

        place = signing.sign(folder, key, root, trust_config)
    except UserError as error:
        stop(str(error))
    if as_json:
        print_json({"package": str(folder), "signature": str(place)})
    else:
        typer.echo(f"signed: {place}")


def check(
    package: Path,
    *,
    key: Path | None,
    identity: str,
    issuer: str,
    trust_config: Path | None,
    signature: Path | None,
    signed: bool,
    project: bool,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Say what was found of a package, and leave with 1 if it is not sound."""
    with Console(stderr=True).status("reading") as status:
        try:
            key, signature = key and key.absolute(), signature and signature.absolute()
            trust_config = trust_config and trust_config.absolute()
            root, folder = _places(package, project)
            with without_gc():
                from tasks.origin import verify_package
                from tasks.signing import Trusted

            findings = verify_package(
                folder,
                root=root,
                trusted=Trusted(key, identity, issuer, trust_config),
                signature=signature,
                signed=signed,
                again=rebuild,
                told=lambda done, total, name: status.update(
                    Text(f"reading {100 * done // max(total, 1)}% {name}")
                ),
                on_line=_shown_on(status),
            )
        except UserError as error:
            stop(str(error))
        except KeyboardInterrupt:
            stop("stopped; nothing was changed", 130)
    _show(folder, findings, as_json)


def _places(package: Path | None, project: bool) -> tuple[Path | None, Path]:
    """The project, if it is wanted and one is at hand, in which to be; and the package.

    Raises:
        UserError: there is no such folder.
    """
    from tasks import bridge

    asked = Path.cwd() / package if package else None
    root = None
    if project or not asked:
        try:
            root = bridge.find_root()
        except UserError:
            if not asked:
                raise
    if root:
        os.chdir(root)
    folder = asked or Path(str(root)) / PACKAGE
    if not folder.is_dir():
        raise UserError(f"{package or PACKAGE}: no such folder")
    return root, folder


def _shown_on(status: Any) -> Any:
    """Show a stage's line, at most four times a second."""
    last = 0.0

    def show(line: str) -> None:
        nonlocal last
        if line and time.monotonic() > last + 0.25:
            last = time.monotonic()
            status.update(Text(f"making it again: {on_one_line(line[:80])}"))

    return show


def _show(folder: Path, findings: list[Any], as_json: bool) -> None:
    sound = not any(finding.verdict == "failed" for finding in findings)
    if as_json:
        print_json(
            {"package": str(folder), "sound": sound, "findings": [asdict(f) for f in findings]}
        )
    else:
        for finding in findings:
            said = Text(f"{finding.verdict:<12}", STYLES[finding.verdict])
            said.append(f"{finding.check:<10} {finding.path}: {finding.message}", "default")
            console.print(said)
        typer.echo(f"{folder}: {'sound' if sound else 'not sound'}")
    if not sound:
        raise typer.Exit(1)
