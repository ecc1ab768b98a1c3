"""Bytes against records: what a stage reads, what DVC keeps. A part of `tasks.bridge`.

DVC takes a file whose time, size and inode are those of its database for unchanged, and an object
of its cache whose mode is 0444 for sound. Here the bytes are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvc.dependency.param import ParamsDependency
from dvc.dvcfile import Lockfile
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo, lock_repo
from dvc.stage import PipelineStage
from dvc.stage.cache import StageCache, _get_cache_hash
from dvc.utils.serialize import dumps_yaml, loads_yaml, modify_yaml
from dvc_data.hashfile.build import build
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.tree import Tree
from ruamel.yaml import YAMLError

from stages.errors import UserError
from tasks import locks, run_cache, store
from tasks.pipeline import opened, stages


class Damaged(DvcException):
    """Inputs of a stage whose bytes changed while their time and size did not."""

    def __init__(self, files: list[str]) -> None:
        super().__init__(f"damaged: {', '.join(files)}")
        self.files = files


def check_inputs(stage: PipelineStage) -> None:
    """Read every input of a stage that is about to run.

    Raises:
        Damaged: files are not what DVC would record as read.
    """
    files: set[str] = set()
    for dep in stage.deps:
        if not isinstance(dep, ParamsDependency) and dep.protocol == "local" and dep.exists:
            files |= _changed_unseen(dep)
    if files:
        raise Damaged(sorted(files))


def _changed_unseen(dep: Output) -> set[str]:
    """Files of an input whose bytes are others than DVC's database says; paths in the project."""
    real = _hashes(dep, store.unmemoized(dep))
    # After the reading: who writes meanwhile changes the time.
    believed = _hashes(dep, dep.local_cache)
    wrong = {name for name in believed.keys() & real if believed[name] != real[name]}
    if wrong:
        again = _hashes(dep, store.unmemoized(dep))
        wrong = {name for name in wrong if again.get(name) != believed[name]}
    return wrong


def _hashes(dep: Output, db: HashFileDB) -> dict[str, str]:
    _, _, found = build(db, dep.fs_path, dep.fs, dep.hash_name, dry_run=True, ignore=dep.dvcignore)
    if not isinstance(found, Tree):
        return {dep.def_path: str(found.hash_info.value)}
    return {"/".join((dep.def_path, *key)): str(info.value) for key, _, info in found if info}


def doubt(root: Path, files: Iterable[str]) -> None:
    """Have DVC read files again that it takes for unchanged."""
    for name in files:
        os.utime(root / name)


def restore_data(repo: Repo, stage: Any, files: list[str]) -> None:
    """Bring back data of a `.dvc` file from the cache.

    Raises:
        UserError: the cache has no sound copy.
    """
    for out in stage.outs:
        if store.drop_bad_objects(out) or out.changed_cache():
            raise UserError(
                f"{', '.join(files)}: damaged, and the cache has no sound copy: "
                "olivepress verify --repair"
            )
        doubt(Path(repo.root_dir), files)  # not before: it would pass for an edit
        repo.checkout(targets=[out.fs_path], force=True)


def keep(stage: PipelineStage) -> list[str]:
    """Have the cache hold what a stage last made, before DVC removes that from the workspace.

    Bad objects are removed; what is then missing is put there again from sound outputs.

    Returns:
        What was damaged or put there, in words.
    """
    said = []
    for out in stage.outs:
        if not out.hash_info or not out.use_cache:
            continue
        word = "damaged" if store.drop_bad_objects(out) else "missing"
        if out.changed_cache() and store.as_recorded(out):
            out.commit(relink=False)
            said.append(f"{out} was {word} in the cache, and is sound here")
        elif word == "damaged":
            said.append(f"{out} is damaged in the cache")
    return said


def _commit(out: Output, *args: Any, **kwargs: Any) -> None:
    """Take the place of DVC's `Output.commit`, which never writes an object again that is there.

    A bad one of the same name stayed, and took the place of the file that a stage had just written.
    """
    if out.use_cache:
        store.drop_bad_objects(out)
    _dvc_commit(out, *args, **kwargs)


_dvc_commit = Output.commit
Output.commit = _commit  # type: ignore[method-assign]


@dataclass(frozen=True)
class RunRecord:
    """A record of the run-cache: runs/??/KEY/VALUE."""

    path: Path
    entry: dict[str, Any] | None
    """As a stage in dvc.lock; None when it is not what its name says."""
    text: str = ""
    """As DVC writes it."""


def run_record(path: Path) -> RunRecord:
    """Read a record of the run-cache and compare it with its two names.

    The one is the hash of command, inputs and parameters, the other of these and the outputs. Sizes
    are in neither.
    """
    try:
        entry = loads_yaml(path.read_text("utf-8"))
        key = _get_cache_hash({**entry, "outs": list(entry["outs"])}, key=True)
        if (key, _get_cache_hash(entry)) == (path.parent.name, path.name):
            return RunRecord(path, entry, dumps_yaml(entry))
    except (OSError, YAMLError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return RunRecord(path, None)


def _load_record(cache: StageCache, key: str, value: str | None) -> Any:
    """Take the place of DVC's `StageCache._load_cache`, which believes what it can parse."""
    if value is None:  # a folder without records, with which DVC fails
        return None
    path = Path(cache._get_cache_path(key, value))
    if path.exists() and not run_record(path).entry:
        path.unlink(missing_ok=True)
    return _dvc_load_record(cache, key, value)


_dvc_load_record = StageCache._load_cache
StageCache._load_cache = _load_record  # type: ignore[method-assign]


@dataclass(frozen=True)
class Recorded:
    """An output, tracked data or another input, as dvc.lock or a `.dvc` file records it."""

    path: str
    maker: str | None
    """DVC's name of what makes it: `quantize`, `data/rows.jsonl.dvc`; None for nothing."""
    md5: str
    """Of a file; of a folder, of its listing with `.dir` after it."""
    size: int | None
    cached: bool
    there: dict[str, str | None] = field(default_factory=dict)
    """Its files that are here, by path in the project: the MD5 that DVC takes for granted."""


def _all_recorded(repo: Repo, ours: Iterable[PipelineStage]) -> list[Recorded]:
    """All that is recorded: outputs of stages and tracked data, then what else stages read."""
    outs = [out for out in repo.index.outs if out.protocol == "local" and out.hash_info]
    found = [_recorded(repo, out, out.stage.addressing) for out in outs]
    made = [out.fs_path for out in repo.index.outs]
    inputs: dict[str, Recorded] = {}
    for dep in (dep for stage in ours for dep in stage.deps):
        if isinstance(dep, ParamsDependency) or dep.protocol != "local" or not dep.hash_info:
            continue
        if dep.def_path not in inputs and not any(dep.fs.overlaps(dep.fs_path, o) for o in made):
            inputs[dep.def_path] = _recorded(repo, dep, None)
    return found + list(inputs.values())


def _recorded(repo: Repo, out: Output, maker: str | None) -> Recorded:
    root = Path(repo.root_dir)
    if Path(out.fs_path).is_dir():
        files = list(repo.dvcignore.find(out.fs, out.fs_path))
    else:
        files = [out.fs_path] if Path(out.fs_path).is_file() else []
    known = [path for path in files if path.encode("utf-8", "ignore") == os.fsencode(path)]
    infos = {path: out.fs.info(path) for path in known}
    believed = {path: info for path, _, info in repo.state.get_many(known, out.fs, infos)}
    there = {
        Path(os.path.relpath(path, root)).as_posix(): info.value if info else None
        for path, info in (dict.fromkeys(files) | believed).items()
    }
    path = Path(os.path.relpath(out.fs_path, root)).as_posix()
    cached = bool(maker and out.use_cache)
    return Recorded(path, maker, str(out.hash_info.value), out.meta.size, cached, there)


@dataclass(frozen=True)
class Records:
    """What a project's records say: dvc.lock, `.dvc` files and the run-cache."""

    cache: Path
    """DVC's: files/md5/??/* and runs/??/*/*."""
    tmp: Path
    """DVC's folder for what is no part of the project."""
    files: list[Recorded]
    runs: list[RunRecord]
    lock: dict[str, Any]
    """The stages of dvc.lock, by name."""
    at_work: set[int]
    """Process ids of runs and `dvc` commands that hold parts of the project now."""


def records(root: Path) -> Records:
    """What should be in the workspace and in the cache.

    Raises:
        UserError: dvc.yaml or dvc.lock is not valid.
    """
    with opened(root) as repo:
        cache = Path(repo.cache.local_cache_dir)
        return Records(
            cache,
            Path(repo.tmp_dir),
            _all_recorded(repo, stages(repo).values()),
            [run_record(path) for path in run_cache.records(cache)],
            Lockfile(repo, str(root / "dvc.lock")).load().get("stages", {}),
            locks.at_work(Path(repo.tmp_dir)),
        )


def change_lock(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change each stage of dvc.lock in place."""
    path = root / "dvc.lock"
    with opened(root) as repo, lock_repo(repo), modify_yaml(path) as lock:
        for entry in lock["stages"].values():
            change(entry)


def run_name(entry: dict[str, Any]) -> tuple[str, str]:
    """The two names of a record of the run-cache, of an entry of dvc.lock: KEY and VALUE."""
    return _get_cache_hash(dict(entry), key=True), _get_cache_hash(entry)


def record_text(entry: dict[str, Any]) -> str:
    """An entry of dvc.lock as DVC writes it to the run-cache."""
    return str(dumps_yaml(entry))
