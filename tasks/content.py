"""Contents of files by their MD5, which is how DVC names them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[int, int, str], None]
CHUNK = 1 << 20


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
            on_progress(done, total, path.name)

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
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # have the disk read, not the memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                count(path, len(chunk))
    except OSError as error:
        return Content("", size, error.strerror or str(error))
    return Content(digest.hexdigest(), size)


def listing(files: dict[str, str]) -> bytes:
    """A folder's listing as DVC writes it; its MD5, with `.dir`, is the folder's hash."""
    entries = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return json.dumps(entries, sort_keys=True).encode()


def listing_hash(files: dict[str, str]) -> str:
    """The hash of a folder with these files: name in it -> MD5."""
    return f"{md5_of(listing(files))}.dir"


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
