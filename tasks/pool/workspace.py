"""A folder of its own for each candidate: a Git worktree that shares the clone's DVC cache."""

from __future__ import annotations

import configparser
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stages.errors import UserError
from tasks import bridge
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
        _share_settings(root, folder)
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
    """The clone's DVC cache."""
    return bridge.settings(root)[1]


def remote_of(root: Path) -> str | None:
    """The name of DVC's default remote, None if there is none: machines then share no bytes."""
    return bridge.settings(root)[0]["core"].get("remote")


def _share_settings(root: Path, folder: Path) -> None:
    """Give the folder the clone's own DVC settings, its cache, and remotes by their whole path."""
    settings, cache = bridge.settings(root)
    local = configparser.ConfigParser(interpolation=None, strict=False)
    local.read(root / ".dvc/config.local")
    ours = {"cache": {"dir": str(cache)}}
    for name, remote in settings["remote"].items():
        ours[f"'remote \"{name}\"'"] = {"url": str(remote["url"])}
    _write_settings(local, ours, folder)


def _write_settings(
    local: configparser.ConfigParser, more: dict[str, dict[str, str]], folder: Path
) -> None:
    local.read_dict(more)
    place = folder / ".dvc/config.local"
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        local.write(file)  # there may be keys in it


def have_own_cache(folder: Path) -> None:
    """Give a workspace an empty cache, so that nothing that was made before is restored."""
    local = configparser.ConfigParser(interpolation=None, strict=False)
    local.read(folder / ".dvc/config.local")
    _write_settings(local, {"cache": {"dir": str(folder / ".dvc/cache")}}, folder)


def _bring_data(root: Path, folder: Path) -> None:
    """Put in place what `dvc add` keeps, from the cache, or from the default remote."""
    files = git(folder, "ls-files", "-z", "*.dvc").split("\0")
    files = [name for name in files if name]
    if not files:
        return
    dvc = Dvc(folder, "dvc", LIMIT_SECONDS, LIMIT_SECONDS, lambda done, total, note: None)
    dvc.do("checkout", "--allow-missing", *files)
    if any(not (folder / name).with_suffix("").exists() for name in files):
        dvc.do("pull", *files)


def remove(root: Path, folder: Path) -> None:
    """Remove a workspace."""
    shutil.rmtree(folder, ignore_errors=True)
    succeeds(root, "worktree", "prune")
