"""The report: what a run left, on one page that needs no other file and no network."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows import page, pictures
from flows.adapter import Section, base_pictures, section
from flows.pictures import Picture
from stages import params
from stages.card import base_of, origin
from stages.errors import UserError
from stages.gates import Gate
from stages.params import Params
from stages.stage import ADAPTERS, METRICS, ONNX, PACKAGE, QUANTIZED
from tasks import bridge, lineage

FOLDER = Path("report")
PAGE = "index.html"


@dataclass(frozen=True)
class Written:
    """What is on disk."""

    page: Path
    sections: list[Section]
    pictures: list[Picture]

    def as_json(self) -> dict[str, Any]:
        """Where all is, and the figures and gates of each adapter."""
        names = [f"{picture.about.name}.png" for picture in self.pictures]
        return {
            "page": str(self.page),
            "pictures": [str(self.page.parent / name) for name in names],
            "figures": {part.name: part.metrics for part in self.sections},
            "gates": {part.name: list(map(_as_json, part.gates)) for part in self.sections},
        }


def _as_json(gate: Gate) -> dict[str, Any]:
    """Null for a figure that is no finite number too."""
    finite = gate.figure is not None and math.isfinite(gate.figure)
    return asdict(gate) | {"figure": gate.figure if finite else None}


def write(root: Path, folder: Path) -> Written:
    """Write index.html and its pictures as PNG files into `folder`.

    Raises:
        UserError: there is nothing to report yet, or a file that a stage wrote was damaged.
    """
    settings = params.load(root / "params.yaml")
    sections = [section(root, name, settings.gates) for name in settings.adapters]
    common = base_pictures(root, sections)
    drawn = [*common, *(picture for part in sections for picture in part.pictures)]
    if not drawn and not any(part.metrics for part in sections):
        raise UserError(
            "nothing to report yet: no figures in metrics/ or plots/; `olivepress run` makes them"
        )
    text = render(root, settings, sections, common)
    folder.mkdir(parents=True, exist_ok=True)
    pictures.write(drawn, folder)
    (folder / PAGE).write_text(text, "utf-8")
    return Written(folder / PAGE, sections, drawn)


def render(root: Path, settings: Params, sections: list[Section], common: list[Picture]) -> str:
    """The page."""
    needs = bridge.status(root)
    origins = made(root, settings, list(needs))
    return page.render(
        "report.html",
        model=origin(base_of(settings)),
        settings=settings,
        sections=sections,
        common=common,
        stale={name: need.reasons for name, need in needs.items() if need.action != "unchanged"},
        origins=[(one, flat(one.params)) for one in origins],
        versions=versions(origins),
    )


def made(root: Path, settings: Params, order: list[str]) -> list[lineage.Origin]:
    """The origin of every stage that is behind an output on disk, in the order of the pipeline."""
    last = [root / PACKAGE, *(root / METRICS / f"{name}.json" for name in settings.adapters)]
    last += [root / ADAPTERS / f"{name}.onnx_adapter" for name in settings.adapters]
    found: dict[str, lineage.Origin] = {}
    for path in [*last, root / ONNX, root / QUANTIZED]:
        if len(found) < len(order):
            with suppress(UserError):  # not made yet, or by a stage that failed
                found = {o.stage: o for o in lineage.trace(root, path)} | found
    return sorted(found.values(), key=lambda one: order.index(one.stage))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The same with dotted keys instead of dictionaries inside."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def versions(origins: list[lineage.Origin]) -> dict[str, list[str]]:
    """Libraries and platform in one line each, with the stages that they are of."""
    found: dict[str, list[str]] = {}
    for one in origins:
        used = one.record.get("versions", {})
        text = ", ".join(f"{name} {version}" for name, version in used.items())
        if text:
            found.setdefault(f"{text} · {one.record.get('platform', '')}", []).append(one.stage)
    return found
