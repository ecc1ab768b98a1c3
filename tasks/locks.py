"""DVC's locks, kept from outliving who holds them. A part of `tasks.bridge`."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dvc.rwlock
import psutil
import zc.lockfile
from dvc.lock import Lock, LockError, make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from voluptuous import Invalid
from zc.lockfile import SimpleLockFile

CLOCK_SECONDS = 2  # by which the start of a process may seem later than it was


def _lock(self: Lock) -> None:
    """Take the place of DVC's `_do_lock`, which writes the process's number into the locked file.

    Where the disk is full that fails with the lock held, and the next who wants it waits for good.
    """
    self._lock_failed = True
    try:
        self._lock = SimpleLockFile(self._lockfile)
    except zc.lockfile.LockError:
        raise LockError("another dvc command holds the lock of this project") from None
    self._lock_failed = False


@contextlib.contextmanager
def _edit_list(folder: str, fs: Any, hardlink: bool) -> Iterator[dict[str, Any]]:
    """Take the place of DVC's `_edit_rwlock`, which writes the list in place.

    Where the disk is full that leaves half of it, and every later stage is refused. Here the list
    stays as it was.
    """
    path = Path(folder, RWLOCK_FILE)
    with make_lock(str(path.with_name(RWLOCK_LOCK)), tmp_dir=folder, hardlink_lock=hardlink):
        held = _read(path) or dvc.rwlock.SCHEMA({})
        held = {"write": defaultdict(dict, held["write"]), "read": defaultdict(list, held["read"])}
        yield held
        _write(path, held)


def _read(path: Path) -> dict[str, Any] | None:
    """DVC's list; None where there is none, or half of one, of a `dvc` that was killed."""
    try:
        return dvc.rwlock.SCHEMA(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, Invalid):
        return None


def _write(path: Path, held: dict[str, Any]) -> None:
    """Not forced to the disk: after a power cut nobody is at work."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(held), "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


Lock._do_lock = _lock
dvc.rwlock._edit_rwlock = _edit_list


def remove_dead(repo: Repo) -> None:
    """Remove from DVC's list of who reads and writes what those whose process is gone.

    DVC drops an entry when no process has its number; after a restart of the machine or of a
    container another may have it.
    """
    folder = Path(repo.tmp_dir)
    path = folder / RWLOCK_FILE
    hardlink = repo.config["core"].get("hardlink_lock", False)
    guard = make_lock(
        str(folder / RWLOCK_LOCK), tmp_dir=repo.tmp_dir, hardlink_lock=hardlink, wait=True
    )
    with guard:
        if (held := _read(path)) is None:
            path.unlink(missing_ok=True)
            return
        written = path.stat().st_mtime
        for name, writer in list(held["write"].items()):
            if not _lives(writer, written):
                del held["write"][name]
        for name, readers in held["read"].items():
            held["read"][name] = [reader for reader in readers if _lives(reader, written)]
        _write(path, held)


def at_work(tmp: Path) -> set[int]:
    """Other processes that hold paths of the project: runs, `dvc` commands.

    Args:
        tmp: DVC's folder for what is no part of the project.
    """
    path = tmp / RWLOCK_FILE
    try:
        held = _read(path) or dvc.rwlock.SCHEMA({})
        written = path.stat().st_mtime
    except FileNotFoundError:  # this takes no lock, so the list may go at any moment
        return set()
    readers = [reader for readers in held["read"].values() for reader in readers]
    entries = [*held["write"].values(), *readers]
    return {who["pid"] for who in entries if _lives(who, written)} - {os.getpid()}


def _lives(who: dict[str, Any], written: float) -> bool:
    """Whether an entry of DVC's list is of a process that lives, and is the one it was.

    That is one with the same command line, which had begun when the list was written.
    """
    try:
        process = psutil.Process(who["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.create_time() > written + CLOCK_SECONDS:
            return False
        return _is_of(who["cmd"], " ".join(process.cmdline()))
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # another user's
        return True


def _is_of(argv: str, command_line: str) -> bool:
    """Whether a process with this sys.argv, which DVC notes, has this command line.

    Of `python -m NAME`, sys.argv has the path of the file instead.
    """
    file = re.fullmatch(r"(.+?)(/__main__)?\.py( .*)?", argv, re.DOTALL)
    as_module = file and f"{Path(file[1]).name}{file[3] or ''}"
    return argv in command_line or bool(as_module and command_line.endswith(as_module))
