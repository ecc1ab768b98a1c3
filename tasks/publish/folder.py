"""A folder that keeps models by name and version: FOLDER/NAME/VERSION/{package, model.json}."""

from __future__ import annotations

from pathlib import Path

from stages.errors import UserError
from stages.fetch import check_space
from stages.package import copy
from stages.stage import new_output, read_json, write_json
from tasks.publish.content import DIGEST, Content
from tasks.publish.targets import Told

CARD = "model.json"


class Folder:
    """Needs no account and no server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)

    def versions(self, name: str) -> dict[str, str | None]:
        return {path.name: _digest(path) for path in (self.folder / name).glob("[!.]*")}

    def add(self, content: Content, name: str, version: str, told: Told) -> None:
        check_space(self.folder, content.size)
        path = self.folder / name / version
        with new_output(path) as out:
            for file, source in content.files.items():
                copy(source, out / "package" / file)
                told(source.stat().st_size)
            sizes = {f: (out / "package" / f).stat().st_size for f in content.files}
            if sizes != {f: source.stat().st_size for f, source in content.files.items()}:
                raise UserError(
                    f"{self.where}: the copy differs from the package; is the disk sound?"
                )
            card = {
                "name": name,
                "version": version,
                "type": "custom_model",
                "description": content.description,
                "tags": content.tags,
                "properties": content.properties,
            }
            write_json(out / CARD, card)
            content.check()
            if path.exists():
                raise UserError(f"{path}: was made by another meanwhile; try again")

    def address(self, name: str, version: str) -> str:
        return str(self.folder / name / version)


def _digest(version: Path) -> str | None:
    """What a version says it holds; None if it says nothing, or is not one of ours."""
    try:
        return read_json(version / CARD)["properties"].get(DIGEST)
    except (UserError, KeyError, AttributeError):
        return None
