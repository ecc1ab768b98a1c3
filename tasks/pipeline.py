"""The stages of a project as DVC reads them. A part of `tasks.bridge`."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage

from stages.errors import UserError
from tasks import store

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
    with _said(), contextlib.closing(Repo(str(root), _wait_for_lock=True)) as repo:
        yield repo


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
    """Make DVC's errors the user's."""
    try:
        yield
    except DvcException as error:
        raise UserError(_words(error)) from error
    except RecursionError:
        raise UserError(f"one of {', '.join(FILES[:3])} is nested too deep") from None


def _words(error: BaseException) -> str:
    """The messages of an exception and what caused it, innermost last."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        if str(cause) and str(cause) not in parts:
            parts.append(str(cause))
        cause = cause.__cause__
    return ": ".join(parts)


def stages(repo: Repo) -> dict[str, PipelineStage]:
    """Every stage of dvc.yaml by name, as it is written there."""
    lock = Path(repo.root_dir) / "dvc.lock"
    try:
        found = store.patiently(lock, lambda: repo.index.stages)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # DVC lets these through
        raise UserError(f"one of {', '.join(FILES[:3])} is damaged: {error}") from None
    return {one.name: one for one in found if is_ours(one)}


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


@dataclass(frozen=True)
class Reading:
    """A project as DVC read it: to look at, not to change."""

    repo: Repo
    stages: dict[str, PipelineStage]
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
            repo = Repo(str(root), _wait_for_lock=True)
            _last[root] = Reading(repo, stages(repo), files)
        yield _last[root]
