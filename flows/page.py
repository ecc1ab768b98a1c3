"""Pages that need no other file and no network: one style, two colour schemes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.pictures import PALETTE


def render(template: str, **values: Any) -> str:
    """A page of this folder's templates. All but the pictures is escaped: it is anyone's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now(UTC).isoformat(" ", "minutes").partition("+")[0]
    return environment.get_template(template).render(palette=PALETTE, written=written, **values)
