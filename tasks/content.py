"""Contents of files by their MD5, which is how DVC names them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stages.errors import on_one_line
from stages.reading import parsed
from stages.sums import inside, opened

Progress = Callable[[int, int, str], None]
CHUNK = 1 << 20
FILE = re.compile(r"[0-9a-f]{32}")
OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")  # its name in DVC's cache; another may be any path


@dataclass(frozen=True)
class Content:
    """What a file holds: its MD5 in hex and its bytes; or why it cannot be read."""

    md5: str
    size: int
    error: str = ""

    def names(self, path: Path) -> bool:
        """Whether an object of the cache that holds this has the right name."""
        return not self.error and (path.parent.name + path.name).removesuffix(".dir") == self.md5


def objects(cache: Path) -> Iterator[Path]:
    """All files among DVC's objects but those that it was writing when it was killed."""
    for parent, _, names in os.walk(cache / "files/md5"):
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def object_path(cache: Path, md5: str) -> Path:
    """Where DVC keeps a content.

    https://dvc.org/doc/user-guide/project-structure/internal-files
    """
    return cache / "files/md5" / md5[:2] / md5[2:]


def read(paths: Iterable[Path], on_progress: Progress) -> dict[Path, Content]:
    """Read files, one in each core at a time."""
    sizes = {path: _size(path) for path in sorted(paths)}
    total, done, alone = sum(sizes.values()), 0, threading.Lock()

    def count(path: Path, size: int) -> None:
        nonlocal done
        with alone:
            done += size
            on_progress(done, total, on_one_line(path.name))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(sizes, pool.map(lambda path: _read(path, count), sizes), strict=True))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, count: Callable[[Path, int], None]) -> Content:
    digest, size = hashlib.md5(usedforsecurity=False), 0
    try:
        with opened(path, links=True) as file:
            if hasattr(os, "posix_fadvise"):  # have the disk read, not the memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                count(path, len(chunk))
    except OSError as error:
        return Content("", size, error.strerror or str(error))
    return Content(digest.hexdigest(), size)


def listed(content: bytes) -> dict[str, str]:
    """What a folder's listing says: name in the folder -> MD5.

    Raises:
        ValueError: as `files_of`; it is no JSON.
    """
    return files_of(parsed(content))


def files_of(entries: Any) -> dict[str, str]:
    """The files of a folder's listing: name in the folder -> MD5.

    A listing may come from anyone, and each name and each MD5 in it becomes a path.

    Raises:
        ValueError: it is none, or has a name that no file in a folder has, or one twice.
    """
    if not isinstance(entries, list):
        raise ValueError("no listing of a folder")
    files: dict[str, str] = {}
    for entry in entries:
        match entry:
            case {"relpath": str(name), "md5": str(md5)} if inside(name) and FILE.fullmatch(md5):
                if name in files:
                    raise ValueError(f"{on_one_line(name)} is there twice")
                files[name] = md5
            case _:
                raise ValueError(f"no file of a folder: {on_one_line(str(entry)[:200])}")
    for name in files:
        if any(str(above) in files for above in PurePosixPath(name).parents):
            raise ValueError(f"{on_one_line(name)} is in a file")
    return files


def listing_of(cache: Path, md5: str) -> dict[str, str] | None:
    """The files of a folder that the cache has the listing of; None if it has not, or a bad one."""
    try:
        return listed(object_path(cache, md5).read_bytes())
    except (OSError, ValueError):
        return None


def kept(cache: Path, path: Path, md5: str) -> bool:
    """Whether a file or folder has a content and the cache has it too; every byte is read."""
    if not OBJECT.fullmatch(md5):
        return False
    files = {path: md5}
    if md5.endswith(".dir"):
        names = listing_of(cache, md5)
        files = {path / name: its for name, its in (names or {}).items()}
        here = {one for one in path.rglob("*") if one.is_symlink() or not one.is_dir()}
        if names is None or here != files.keys():
            return False
    copies = {object_path(cache, its): its for its in [md5, *files.values()]}
    held = read(files.keys() | copies.keys(), lambda done, total, note: None)
    wanted = {**files, **copies}
    return all(held[one].md5 == its.removesuffix(".dir") for one, its in wanted.items())


def listing(files: dict[str, str]) -> bytes:
    """A folder's listing as DVC writes it; its MD5, with `.dir`, is the folder's hash."""
    entries = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return json.dumps(entries, sort_keys=True).encode()


def listing_hash(files: dict[str, str]) -> str:
    """The hash of a folder with these files: name in it -> MD5."""
    return f"{md5_of(listing(files))}.dir"


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
