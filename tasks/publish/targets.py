"""Whether a model is there already, and as which version it is added: the same for every target."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from stages.errors import UserError
from tasks.publish.content import Content

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

Told = Callable[[int], None]


class Target(Protocol):
    """Where models are kept by name and version."""

    where: str
    """Its name for a person, for instance `workspace W in RG`."""

    def versions(self, name: str) -> dict[str, str | None]:
        """Every version of a model, with the digest of its content, if it says one."""

    def add(self, content: Content, name: str, version: str, told: Told) -> None:
        """Bring the files there, compare what came, and register the version.

        `told` is given how many more bytes are there. Nothing is registered unless all are.
        """

    def address(self, name: str, version: str) -> str:
        """Where a person or a tool finds it: a URL or a path."""


@dataclass(frozen=True)
class Published:
    """What `publish` did."""

    status: Literal["published", "already there"]
    name: str
    version: str
    where: str
    address: str
    digest: str
    files: int
    bytes: int


def publish(
    content: Content, target: Target, name: str, version: str | None, told: Told
) -> Published:
    """Register a package, unless the target has it: equal digests are the same model.

    Args:
        version: None for the next one.

    Raises:
        UserError: a name that cannot be one; the version exists with other content.
    """
    for word, value in (("name", name), ("version", version or "1")):
        if not NAME.fullmatch(value):
            raise UserError(
                f"--{word} {value!r}: 1 to 64 letters, digits, dots, _ and -, not beginning with ."
            )
    there = target.versions(name)
    same = [known for known, digest in there.items() if digest == content.digest]
    chosen = version or (same[0] if same else next_version(there))
    if chosen in there and chosen not in same:
        raise UserError(
            f"{target.where}: {name} version {chosen} exists with other content: there "
            f"{there[chosen] or 'nothing says what it holds'}, here {content.digest}; take another "
            "--version, or leave it out for the next one"
        )
    if chosen not in there:
        target.add(content, name, chosen, told)
    return Published(
        status="already there" if chosen in there else "published",
        name=name,
        version=chosen,
        where=target.where,
        address=target.address(name, chosen),
        digest=content.digest,
        files=len(content.files),
        bytes=content.size,
    )


def next_version(there: dict[str, str | None]) -> str:
    """One more than the largest version that is a whole number."""
    return str(1 + max((int(version) for version in there if version.isdigit()), default=0))
