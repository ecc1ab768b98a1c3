"""Outputs of earlier runs that the run-cache knows, named so that `dvc push` can send them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from stages.errors import UserError
from stages.reading import yaml_file
from tasks.content import OBJECT, listing_of, object_path

RECORD_BYTES = 8 << 20  # a record names some hundred files and parameters


@contextmanager
def earlier(root: Path, cache: Path, here: bool) -> Iterator[Path | None]:
    """A folder with a `.dvc` file for each output of an earlier run of this pipeline's commands.

    Args:
        here: those whose objects are in the cache, to be sent; else those that are not.
    """
    now = yaml.safe_load((root / "dvc.lock").read_text())["stages"].values()
    commands = [entry["cmd"] for entry in now]
    ours = [record for record in _read(records(cache)) if record["cmd"] in commands]
    hashes = _hashes(ours) - _hashes(now)
    names = sorted(name for name in hashes if cached(cache, name) == here)
    with named(root, names) as folder:
        yield folder if names else None


@contextmanager
def named(root: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder that shares this project's `.dvc`, with a `.dvc` file for each object."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / ".dvc").symlink_to(root.resolve() / ".dvc")
        for number, name in enumerate(names):
            out = {"md5": name, "hash": "md5", "path": str(number)}
            (folder / f"{number}.dvc").write_text(yaml.safe_dump({"outs": [out]}))
        yield folder


def outputs(cache: Path, key: str) -> set[str]:
    """The objects that the runs of a stage with this key made; empty when there was none."""
    return _hashes(_read(records(cache, key)))


def _read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The records that can be read; a damaged one is `tasks.integrity`'s to name."""
    for path in paths:
        with suppress(UserError):
            record = yaml_file(path, RECORD_BYTES)
            if isinstance(record, dict) and "cmd" in record:
                yield record


def records(cache: Path, key: str = "*") -> list[Path]:
    """The run-cache: runs/??/KEY/VALUE, each in the format of a stage in dvc.lock.

    https://dvc.org/doc/user-guide/project-structure/internal-files
    """
    return list(cache.glob(f"runs/??/{key}/*"))


def _hashes(entries: Any) -> set[str]:
    lists = [entry.get("outs") for entry in entries]
    outs = [out for one in lists if isinstance(one, list) for out in one if isinstance(out, dict)]
    return {out["md5"] for out in outs if OBJECT.fullmatch(str(out.get("md5")))}


def contents(cache: Path, name: str) -> set[str] | None:
    """An object and, of a folder, all that it lists; None when the listing is damaged or absent."""
    if not name.endswith(".dir"):
        return {name}
    files = listing_of(cache, name)
    return None if files is None else {name, *files.values()}


def cached(cache: Path, name: str) -> bool:
    """Whether the cache holds an object, of a folder with all its files."""
    names = contents(cache, name)
    return names is not None and all(object_path(cache, one).exists() for one in names)
