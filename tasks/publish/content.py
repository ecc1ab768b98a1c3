"""What is published: the package's files, their digest, and what a registry is told of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages import params
from stages.card import base_of, origin
from stages.errors import UserError
from stages.gates import check_gates
from stages.package import volatile
from stages.stage import METRICS, PACKAGE, read_json
from stages.sums import SIGNATURE, SUMS, sha256, verify
from tasks import bridge, signing

PREFIX = "olivepress."
DIGEST = f"{PREFIX}content"
FIGURES = ("base", "quantized", "onnx_off", "onnx_on", "agreement", "text_perplexity", "size_mb")


@dataclass(frozen=True)
class Content:
    """A package, and what a registry keeps beside it."""

    folder: Path
    files: dict[str, Path]
    """Name in the package -> path."""
    digest: str
    """SHA-256 of the sums of all files but the volatile ones, in hex: equal models are equal."""
    sums: str
    """SHA-256 of the sums of all files, in hex, the signature among them: equal bytes are equal."""
    description: str
    tags: dict[str, str]
    """May change from one publishing of the same model to the next."""
    properties: dict[str, str]
    """Follow from the package."""

    def check(self) -> None:
        """Raise a UserError if the files are no longer those that were read: before registering."""
        try:
            same = _digest(_all_sums(self.folder, verify(self.folder))) == self.sums
        except (UserError, OSError):
            same = False
        if not same:
            raise UserError(f"{PACKAGE} was changed meanwhile; nothing was registered: try again")

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.files.values())


def read(root: Path) -> Content:
    """The package of a project, fit to be published.

    Raises:
        UserError: there is none; it is not what params.yaml asks for; a gate is not met; a file was
            changed.
    """
    values = params.load(root / "params.yaml")
    folder = root / PACKAGE
    if not (folder / SUMS).exists():
        raise UserError(f"{PACKAGE} is not there yet; olivepress run makes it")
    need = bridge.status(root)["package"]
    if need.action != "unchanged":
        raise UserError(
            f"{PACKAGE} is not what params.yaml and data now ask for ({'; '.join(need.reasons)}); "
            "run olivepress run first"
        )
    metrics = {name: read_json(root / METRICS / f"{name}.json") for name in values.adapters}
    for adapter, figures in metrics.items():
        check_gates(figures, values.gates, adapter)
    try:
        sums = verify(folder)
    except UserError as error:
        raise UserError(f"{PACKAGE}: {error}; run olivepress run") from None
    digest = _digest({name: sums[name] for name in sums if not volatile(name)})
    lineage = read_json(folder / "lineage.json")
    files = {name: folder / name for name in [*sums, SUMS]}
    if signature := signing.of_package(folder):
        signing.check_belongs(signature, folder, sums)
        files[SIGNATURE] = signature
    return Content(
        folder=folder,
        files=files,
        digest=digest,
        sums=_digest(_all_sums(folder, sums)),
        description=f"{origin(base_of(values))} with {', '.join(sorted(values.adapters))}, "
        "for onnxruntime-genai, made by Olivepress",
        tags=_tags(lineage),
        properties=_properties(root, values, metrics, lineage, digest),
    )


def _all_sums(folder: Path, sums: dict[str, str]) -> dict[str, str]:
    signature = signing.of_package(folder)
    return sums | ({SIGNATURE: sha256(signature)} if signature else {})


def _digest(sums: dict[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _tags(lineage: dict[str, Any]) -> dict[str, str]:
    tags = {
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": os.environ.get("OLIVEPRESS_RUN_ID"),
        "made_in_run": lineage["package"]["record"].get("run_id"),
    }
    return {name: value for name, value in tags.items() if value}


def _properties(
    root: Path,
    values: params.Params,
    metrics: dict[str, dict],
    lineage: dict[str, Any],
    digest: str,
) -> dict[str, str]:
    base = read_json(root / PACKAGE / "olivepress.json")["base"]
    record = lineage["package"]["record"]
    found = {
        DIGEST: digest,
        f"{PREFIX}git_commit": record.get("git_commit"),
        f"{PREFIX}git_dirty": str(record.get("git_dirty")).lower(),
        f"{PREFIX}base": f"{base['source']}:{base['id']}",
        f"{PREFIX}base_revision": base["revision"],
        f"{PREFIX}base_content": base["content"],
        f"{PREFIX}adapters": ",".join(sorted(values.adapters)),
    }
    for made in bridge.made(root):  # MLflow takes no @ in a key
        found[f"{PREFIX}stage.{made.stage.replace('@', '.')}"] = made.key
    for adapter, figures in metrics.items():
        for name, value in _figures(figures):
            found[f"{PREFIX}metric.{adapter}.{name}"] = f"{value:g}"
    return {name: value for name, value in sorted(found.items()) if value}


def _figures(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for part in FIGURES:
        for key, value in (metrics.get(part) or {}).items():
            if isinstance(value, int | float):
                yield f"{part}.{key}", value
