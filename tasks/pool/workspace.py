"""A folder of its own for each candidate: a Git worktree that shares the clone's DVC cache."""

from __future__ import annotations

import configparser
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from stages.errors import UserError
from tasks.dvc_command import Dvc
from tasks.git import git, succeeds

FOLDER = Path(".dvc/tmp/candidates")  # where neither Git nor DVC looks
LIMIT_SECONDS = 12 * 3600.0


@contextlib.contextmanager
def workspace(root: Path, commit: str, name: str) -> Iterator[Path]:
    """The project at a commit, with the data that `.dvc` files name; removed at the end.

    Args:
        root: the clone.
        commit: 40 hex digits; fetched from the clone's own remote if it is not here.
        name: of the folder.

    Raises:
        UserError: the clone does not have the commit, or its data.
    """
    _have(root, commit)
    folder = root / FOLDER / name
    remove(root, folder)
    git(root, "worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        _share_cache(root, folder)
        _bring_data(root, folder)
        yield folder
    finally:
        remove(root, folder)


def _have(root: Path, commit: str) -> None:
    known = ("cat-file", "-e", f"{commit}^{{commit}}")
    if succeeds(root, *known):
        return
    succeeds(root, "fetch", "--quiet", "--all")
    if not succeeds(root, *known):
        raise UserError(
            f"{root} has no commit {commit[:12]}, and git fetch brings none: push it to where this "
            "clone was made from"
        )


def cache_of(root: Path) -> Path:
    """The clone's DVC cache: `cache.dir` is relative to the file that says it."""
    for name in (".dvc/config.local", ".dvc/config"):
        if place := _config(root / name).get("cache", "dir", fallback=None):
            return (root / ".dvc" / place).resolve()
    return root / ".dvc/cache"


def remote_of(root: Path) -> str | None:
    """The name of DVC's default remote, None if there is none: machines then share no bytes."""
    for name in (".dvc/config.local", ".dvc/config"):
        if remote := _config(root / name).get("core", "remote", fallback=None):
            return remote
    return None


def _config(path: Path) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None, strict=False)
    config.read(path)
    return config


def _share_cache(root: Path, folder: Path) -> None:
    """Give the folder the clone's own DVC settings, and its cache."""
    local = _config(root / ".dvc/config.local")
    local.read_dict({"cache": {"dir": str(cache_of(root))}})
    with (folder / ".dvc/config.local").open("w") as file:
        local.write(file)


def _bring_data(root: Path, folder: Path) -> None:
    """Put in place what `dvc add` keeps, from the cache, or from the default remote."""
    files = git(folder, "ls-files", "*.dvc").split()
    if not files:
        return
    dvc = Dvc(folder, "dvc", LIMIT_SECONDS, LIMIT_SECONDS, lambda done, total, note: None)
    dvc.do("checkout", "--allow-missing", *files)
    if any(not (folder / name).with_suffix("").exists() for name in files):
        dvc.do("pull", *files)


def remove(root: Path, folder: Path) -> None:
    """Remove a workspace, also one that a killed process left."""
    shutil.rmtree(folder, ignore_errors=True)
    succeeds(root, "worktree", "prune")
