"""DVC's locks, kept from outliving who holds them. A part of `tasks.bridge`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import zc.lockfile
from dvc.lock import Lock, LockError, make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from zc.lockfile import SimpleLockFile


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


Lock._do_lock = _lock


def remove_dead(repo: Repo) -> None:
    """Remove from DVC's list of who reads and writes what those whose process is gone.

    DVC drops an entry when no process has its number; after a restart of the machine or of a
    container another may have it. It writes the list in place, so that a kill may leave half of it.
    """
    folder = Path(repo.tmp_dir)
    path = folder / RWLOCK_FILE
    hardlink = repo.config["core"].get("hardlink_lock", False)
    guard = make_lock(
        str(folder / RWLOCK_LOCK), tmp_dir=repo.tmp_dir, hardlink_lock=hardlink, wait=True
    )
    with guard:
        try:
            held = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            path.unlink()
            return
        root = Path(repo.root_dir)
        for name, writer in list(held.get("write", {}).items()):
            if not lives(root, writer):
                del held["write"][name]
        for name, readers in list(held.get("read", {}).items()):
            held["read"][name] = [reader for reader in readers if lives(root, reader)]
        whole = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        whole.write_text(json.dumps(held), "utf-8")
        whole.replace(path)


def lives(root: Path, who: dict[str, Any]) -> bool:
    """Whether an entry of DVC's list is of a process that lives, and is the one it was.

    That is one in the project's folder, or with the same command line.
    """
    try:
        process = psutil.Process(who["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        inside = Path(process.cwd()).is_relative_to(root.resolve())
        return inside or who["cmd"] in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # another user's
        return True
