"""The stages of a project as DVC reads them. A part of `tasks.bridge`."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.config import Config
from dvc.dependency.param import ParamsDependency
from dvc.env import DVC_SITE_CACHE_DIR
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage

from stages.errors import UserError, lack
from tasks import store

CHANGED = "any more: was it changed, or another branch checked out? Run it again"
FILES = [  # that say what the stages are
    *("dvc.yaml", "dvc.lock", "params.yaml"),
    *(".dvcignore", ".dvc/config", ".dvc/config.local"),
]
DEEPEST = 500


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Repo]:
    """A repo for the caller alone: one `Repo` breaks when threads use it at once.

    Raises:
        UserError: what DVC says is wrong, here or in the caller's use of it.
    """
    check_depth(root)
    with _said(), contextlib.closing(_repo(root)) as repo:
        yield repo


_opening = threading.Lock()


def _repo(root: Path) -> Repo:
    """A `Repo`; one at a time, as it sets the process's umask to 0 for a moment.

    A second thread would take that for the umask to go back to, and every file made from then on
    would be writable by all.
    """
    with _opening:
        place = {"core": {"site_cache_dir": site_cache(root)}}
        return Repo(str(root), config=place, _wait_for_lock=True)


def site_cache(root: Path) -> str:
    """Where DVC keeps its databases of hashes: where a person has it, else in the clone.

    By itself that is /var/tmp/dvc, and DVC makes a folder that is not there writable by all.
    """
    if asked := os.environ.get(DVC_SITE_CACHE_DIR):
        return asked
    with _said():
        config = Config(str(root / ".dvc"), validate=False)
        if asked := config.get("core", {}).get("site_cache_dir"):
            return asked
        folder = root / ".dvc/tmp/site"
        (folder / "repo").mkdir(parents=True, exist_ok=True)
        return str(folder)


def check_depth(root: Path) -> None:
    """Raise a UserError for a file that is nested deeper than any is: DVC's parser, which is C,
    runs out of stack at some 30,000 levels and takes the process with it."""
    for name in FILES[:3]:
        try:
            text = (root / name).read_bytes()
        except OSError:
            continue
        depth = most = 0
        for bracket in re.finditer(rb"[][{}]", text):
            depth += 1 if bracket[0] in b"[{" else -1
            most = max(most, depth)
        if most > DEEPEST or re.search(rb"(?:[-?] ){%d}" % DEEPEST, text):
            raise UserError(f"{root / name}: nested too deep")


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Make DVC's errors the user's, and those of a disk that it cannot write to."""
    try:
        yield
    except (DvcException, OSError) as error:
        if said := lack(error):
            raise UserError(said) from error
        if isinstance(error, OSError):
            raise
        raise UserError(_words(error)) from error
    except UnicodeEncodeError as error:
        name = os.fsencode(error.object)
        raise UserError(f"a file's name is not UTF-8: {str(name)[2:-1]}") from None
    except RecursionError:
        raise UserError(f"one of {', '.join(FILES[:3])} is nested too deep") from None


def _words(error: BaseException) -> str:
    """The messages of an exception and what caused it, innermost last."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        if (words := str(cause) or type(cause).__name__) not in parts:
            parts.append(words)
        cause = cause.__cause__
    return ": ".join(parts)


class Stages(dict[str, PipelineStage]):
    """Stages by name."""

    def __missing__(self, name: str) -> PipelineStage:
        raise UserError(f"dvc.yaml has no such stage {CHANGED}")


def stages(repo: Repo) -> Stages:
    """Every stage of dvc.yaml by name, as it is written there."""
    lock = Path(repo.root_dir) / "dvc.lock"
    try:
        found = store.patiently(lock, lambda: repo.index.stages)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # DVC lets these through
        raise UserError(f"one of {', '.join(FILES[:3])} is damaged: {error}") from None
    return Stages({one.name: one for one in found if is_ours(one)})


def is_ours(stage: Any) -> bool:
    """Whether a stage is of the project's dvc.yaml: not a `.dvc` file, not a nested pipeline."""
    return isinstance(stage, PipelineStage) and stage.path_in_repo == "dvc.yaml"


def graph(repo: Repo) -> dict[str, set[str]]:
    """Every stage with what it directly depends on, upstream first, else as in dvc.yaml.

    A dependency that follows from others (a → b → c, so a → c) is left out.
    """
    import networkx as nx  # 0.05 s, and many a command draws no graph

    known = stages(repo)
    whole = repo.index.graph  # edges point from a stage to what it depends on
    ours = whole.subgraph(known.values())
    direct: dict[str, set[str]] = {}
    reached: dict[str, set[str]] = {}  # from a stage, over any number of edges
    for stage in nx.dfs_postorder_nodes(ours):
        above = {up.name for up in ours.successors(stage)}
        further = set().union(*(reached[up] for up in above))
        direct[stage.name] = above - further
        reached[stage.name] = above | further
    return direct


def seen(root: Path, name: str) -> dict[str, Any]:
    """What a stage reads, as it is now: its command, parameters, and hashes of files by path.

    Of a file that DVC does not make, its stamp too: a branch may have been checked out, and back.

    Raises:
        UserError: as `opened`; there is no such stage any more.
    """
    with opened(root) as repo:
        stage = stages(repo)[name]
        stage.save_deps(allow_missing=True)
        found = {"the command": stage.cmd}
        outs = {Path(out.fs_path) for out in repo.index.outs}
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency):
                found |= {f"{dep.def_path} {key}": it for key, it in dep.read_params().items()}
            else:
                path = Path(dep.fs_path)
                of_dvc = not outs.isdisjoint((path, *path.parents))  # which may link it anew
                stamp = not of_dvc and path.is_file() and store.stamp(path)
                found[dep.def_path] = (dep.hash_info, stamp)
        return found


@dataclass(frozen=True)
class Reading:
    """A project as DVC read it: to look at, not to change."""

    repo: Repo
    stages: Stages
    files: list[tuple[int, int, int] | None]
    """What FILES were."""


_turn = threading.Lock()
_last: dict[Path, Reading] = {}  # one at most


@contextlib.contextmanager
def read(root: Path, anew: bool = False) -> Iterator[Reading]:
    """The stages as they are now; threads take turns.

    Unless `anew`, DVC's files are read again only when one of them has changed: with 1,000 stages
    that takes 0.8 s, and a look at one of them 1 ms.

    Raises:
        UserError: as `opened`.
    """
    with _turn, _said():
        files = [store.stamp(root / name) for name in FILES]
        if anew or root not in _last or _last[root].files != files:
            while _last:
                _last.popitem()[1].repo.close()
            check_depth(root)
            repo = _repo(root)
            _last[root] = Reading(repo, stages(repo), files)
        yield _last[root]
