"""SHA256SUMS of a package, as sha256sum writes it, and reading a folder that nobody vouches for.

What is read here may have been made to do harm: names are checked before they are used, no link is
followed, nothing but regular files is opened, and no file is read beyond the size it had when it
was listed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from stages.errors import UserError, on_one_line
from stages.reading import CONTROL

SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"  # a signature is of the sums, so no sum of it can be among them
BLOCK = 1 << 20
MOST_FILES = 10_000  # a package has some 20
MOST_BYTES = 4 << 20  # of a file that is read as a whole: sums, lineage, card, BOM, signature
LINE = re.compile(r"([0-9a-f]{64})  (.+)")

Told = Callable[[int, int, str], None]
"""Bytes done, bytes in all, name of the file."""


@dataclass(frozen=True)
class Digest:
    """Of a file, in hex."""

    sha256: str
    md5: str
    size: int


@dataclass
class Checked:
    """What a folder holds, and what is wrong with it."""

    files: dict[str, Digest] = field(default_factory=dict)
    """Of the files that SHA256SUMS lists, and of itself, as they are."""
    problems: dict[str, str] = field(default_factory=dict)
    """Name -> what is wrong."""
    plain: bool = False
    """Whether the folder holds regular files alone, no more of them and no larger than can be."""


def write(folder: Path, sums: dict[str, str]) -> None:
    """Write SHA256SUMS: name -> SHA-256 in hex."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> dict[str, str]:
    """Check each file of a package against its sum; name -> SHA-256, in hex.

    Raises:
        UserError: names of the files that are missing, more, or not what was written.
    """
    found = check(folder)
    if found.problems:
        raise UserError(
            f"not what was written: {', '.join(map(on_one_line, sorted(found.problems)))}"
        )
    return {name: digest.sha256 for name, digest in found.files.items() if name != SUMS}


def check(folder: Path, told: Told = lambda done, total, name: None) -> Checked:
    """Read every file of a package once and compare it with SHA256SUMS."""
    found = Checked()
    try:
        sizes = dict(_listed(folder, found.problems))
        found.plain = not found.problems and sum(sizes.values()) <= shutil.disk_usage(folder).total
        wanted = read(folder)
    except UserError as error:
        found.problems[SUMS] = str(error)
        return found
    for name in wanted.keys() - sizes.keys() - found.problems.keys():
        found.problems[name] = "is missing"
    for name in sizes.keys() - wanted.keys() - {SUMS, SIGNATURE}:
        found.problems[name] = f"is not in {SUMS}"
    here = sorted((wanted.keys() | {SUMS}) & sizes.keys())
    done, total = 0, sum(sizes[name] for name in here)
    if total > shutil.disk_usage(folder).total:
        found.problems[max(here, key=sizes.__getitem__)] = "claims more bytes than the disk has"
        return found
    for name in here:
        told(done, total, name)
        try:
            found.files[name] = digest(folder / name, sizes[name])
        except OSError as error:
            found.problems[name] = f"cannot be read: {error.strerror}"
            continue
        done += sizes[name]
        if name != SUMS and found.files[name].sha256 != wanted[name]:
            found.problems[name] = f"is not what {SUMS} says: its SHA-256 is another"
    return found


def digest(path: Path, size: int | None = None) -> Digest:
    """Both sums of a file in one reading.

    Args:
        size: what it has to have, in bytes; no more is read.

    Raises:
        OSError: it cannot be read, or has another size.
    """
    sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with opened(path) as file:
        left = size = os.fstat(file.fileno()).st_size if size is None else size
        while left and (block := file.read(min(BLOCK, left))):
            sha.update(block)
            md5.update(block)
            left -= len(block)
        if left or file.read(1):
            raise OSError(0, "its size changes")
    return Digest(sha.hexdigest(), md5.hexdigest(), size)


def opened(path: Path, *, links: bool = False) -> BinaryIO:
    """A regular file, open for reading; never a pipe or a device, on which one may wait.

    Args:
        links: whether links are followed.
    """
    descriptor = os.open(path, os.O_RDONLY | (0 if links else os.O_NOFOLLOW) | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path) -> bytes:
    """A file that is small in any package.

    Raises:
        UserError: it is missing, no regular file, or larger than MOST_BYTES.
    """
    try:
        with opened(path) as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"is larger than {MOST_BYTES >> 20} MB")
    return content


def read(folder: Path) -> dict[str, str]:
    """What SHA256SUMS says: name -> SHA-256 in hex.

    Raises:
        UserError: it cannot be read; a line is not of its form, or names what no package has.
    """
    try:
        lines = read_small(folder / SUMS).decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError("is not UTF-8") from None
    if lines.pop():
        raise UserError(f"its last line, {len(lines) + 1}, is cut off")
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = LINE.fullmatch(line)
        if not match:
            raise UserError(f"line {number} is no sum and name: {on_one_line(line[:100])}")
        digest, name = match.groups()
        if not within(name) or name in sums or name in (SUMS, SIGNATURE):
            raise UserError(f"line {number} names what no package has: {on_one_line(name[:100])}")
        sums[name] = digest
    return sums


def within(name: str) -> bool:
    """Whether a name is that of a file in a package: it can be printed, and is inside."""
    return name.isprintable() and inside(name)


def inside(name: str) -> bool:
    """Whether a path is that of something in a folder, written in the one plain way."""
    path = PurePosixPath(name)
    plain = not CONTROL.search(name) and "\\" not in name and path.as_posix() == name
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _listed(folder: Path, problems: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Name and size of each regular file below a folder; what else is there is a problem.

    Raises:
        UserError: the folder cannot be read, or has more than MOST_FILES.
    """
    todo, count = [folder], 0
    while todo:
        here = todo.pop()
        try:
            with os.scandir(here) as found:
                entries = list(islice(found, MOST_FILES + 1 - count))
            modes = [(entry, entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            raise UserError(f"{on_one_line(str(here))} cannot be read: {error.strerror}") from None
        count += len(entries)
        if count > MOST_FILES:
            raise UserError(f"the folder has more than {MOST_FILES} files")
        for entry, about in modes:
            name = Path(entry.path).relative_to(folder).as_posix()
            if stat.S_ISDIR(about.st_mode):
                todo.append(Path(entry.path))
            elif stat.S_ISREG(about.st_mode):
                yield name, about.st_size
            else:
                link = stat.S_ISLNK(about.st_mode)
                problems[name] = "is a symbolic link" if link else "is not a regular file"
