"""What DVC keeps, kept true: dvc.lock whole at any moment, outputs with the bytes it recorded.

A part of `tasks.bridge`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from dvc.dvcfile import Lockfile, ProjectFile
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo, lock_repo
from dvc.stage.cache import StageCache, _get_cache_hash, _get_stage_hash
from dvc.utils.serialize import _common, _yaml
from dvc_data.hashfile.build import build
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_data.hashfile.hash import file_md5
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree
from dvc_objects.db import ObjectDB
from dvc_objects.errors import ObjectFormatError

from stages.errors import on_one_line
from stages.stage import remove, replacing
from stages.sums import inside
from tasks.content import files_of, kept

T = TypeVar("T")
TRIES = 20  # a tenth of a second apart: DVC takes some hundredths to write dvc.lock
HASH = re.compile(r"[\w-]*(\.dir)?")  # or its first digits
RECORD = re.compile(r"[0-9a-f]{64}")  # the name of one in DVC's run-cache
LEFTOVER = re.compile(r"\..+\.tmp-(\d+)")  # as stages.stage.replacing names them


def _dump_whole(path: Any, *args: Any, **kwargs: Any) -> None:
    """Take the place of DVC's `_dump_data`: write a sibling and rename it.

    DVC writes dvc.lock in place, so one who reads it meanwhile sees a part of it.
    """
    with replacing(Path(os.path.realpath(path))) as temporary:
        _dvc_dump(str(temporary), *args, **kwargs)


def replace(path: Path, content: bytes) -> None:
    """Write a file as a whole: who reads it meanwhile sees the one before or this one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _one_at_a_time(schema: Callable[[T], T]) -> Callable[[T], T]:
    """Validate dvc.yaml in one thread at a time.

    DVC's schema for stages compiles its parts anew at each call, in place, so that another thread
    finds some of them empty and a valid file "not valid".
    """
    alone = threading.Lock()

    def validate(data: T) -> T:
        with alone:
            return schema(data)

    return validate


ProjectFile.SCHEMA = staticmethod(_one_at_a_time(ProjectFile.SCHEMA))  # type: ignore[assignment]
_dvc_dump = _common._dump_data
_common._dump_data = _yaml._dump_data = _dump_whole


def _newest_whole(cache: StageCache, stage: Any) -> dict[str, Any] | None:
    """Take the place of `StageCache._load`: the newest record of a run whose name is its hash.

    DVC takes the newest name in a folder, and fails for good where there is none, or one that was
    not finished: a full disk or a kill leaves either.
    """
    key = _get_stage_hash(stage)
    records = [
        path
        for path in Path(cache._get_cache_dir(key or "")).glob("*")
        if key and RECORD.fullmatch(path.name)
    ]
    records.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in records:
        record: dict[str, Any] | None = cache._load_cache(key, path.name)
        if record and _get_cache_hash(record) == path.name:
            return record
        with contextlib.suppress(OSError):  # or it would stay: what is there is not written again
            path.unlink()
    return None


StageCache._load = _newest_whole


class Unsafe(ObjectFormatError, DvcException):
    """What DVC would make a path of is none of its own: a name in a listing, or a hash."""


def _files_inside(cls: type[Tree], lst: Any, hash_name: str | None = None) -> Tree:
    """Take the place of `Tree.from_list`, which believes any name: DVC would write to it."""
    try:
        files_of(lst)
    except ValueError as error:
        raise Unsafe(f"the listing of a folder is not sound: {error}") from None
    return _dvc_from_list(lst, hash_name=hash_name)


_dvc_from_list = Tree.from_list
Tree.from_list = classmethod(_files_inside)  # type: ignore[assignment,arg-type]


def _inside(path_of: Callable[[Any, str], str]) -> Callable[[Any, str], str]:
    """`oid_to_path`, which believes any hash: DVC reads what is there, and removes it if it is not
    what the hash says."""

    def oid_to_path(db: Any, oid: str) -> str:
        if not HASH.fullmatch(oid):
            raise Unsafe(f"no hash: {on_one_line(oid)}")
        return path_of(db, oid)

    return oid_to_path


for _db in (ObjectDB, LocalHashFileDB):
    _db.oid_to_path = _inside(_db.oid_to_path)  # type: ignore[method-assign]


def patiently(lock: Path, read: Callable[[], T]) -> T:
    """What `read` gives; tried again while a `dvc` command is in the middle of writing `lock`.

    A file that stays as it is for TRIES is broken, not being written.
    """
    seen, tries = stamp(lock), 0
    while True:
        try:
            return read()
        except DvcException as error:
            if lock.name not in str(error) or tries == TRIES:
                raise
            time.sleep(0.1)
            before, seen = seen, stamp(lock)
            tries = tries + 1 if seen == before else 0


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def unmemoized(out: Output) -> LocalHashFileDB:
    """The cache of an output without DVC's database of hashes, which a restore fills unread."""
    cache = out.local_cache  # `cache` is not for files outside of the project
    return LocalHashFileDB(cache.fs, cache.path)


def as_recorded(out: Output) -> bool:
    """Whether an output holds the bytes that dvc.lock records; every byte of it is read."""
    if not out.exists:
        return False
    _, _, found = build(
        unmemoized(out), out.fs_path, out.fs, out.hash_name, dry_run=True, ignore=out.dvcignore
    )
    return bool(found.hash_info == out.hash_info)


def drop_bad_objects(out: Output) -> bool:
    """Remove the objects of an output from the cache whose bytes are not those of their name.

    DVC trusts every object of mode 0444, and never writes one again that is there.

    Returns:
        Whether there was one.
    """
    if not out.hash_info:
        return False
    bad = False
    objects = [out.hash_info.value]
    tree = out.get_obj()  # None when the listing of a folder cannot be read
    if isinstance(tree, Tree):
        objects += [info.value for _, _, info in tree if info]
    for name in objects:
        try:
            HashFileDB.check(unmemoized(out), name)  # LocalHashFileDB's own looks at the mode
        except FileNotFoundError:
            continue
        except ObjectFormatError:
            bad = True
    return bad


def changed_files(out: Output) -> list[str]:
    """An output, or the files in it, that are no longer what dvc.lock records."""
    if not out.workspace_status():
        return []
    recorded = listing(out) if out.exists and out.isdir() else None
    if recorded is None:
        return [out.def_path]
    folder = Path(out.fs_path)
    found = {
        path.relative_to(folder).as_posix(): file_md5(str(path))
        for path in folder.rglob("*")
        if path.is_file()
    }
    names = {name for name in recorded.keys() | found if recorded.get(name) != found.get(name)}
    return [f"{out.def_path}/{name}" for name in sorted(names)]


def listing(out: Output) -> dict[str, str] | None:
    """Files of an output that is a folder, with the MD5s that DVC recorded; None if not known."""
    tree = out.get_obj()
    if not isinstance(tree, Tree):
        return None
    return {"/".join(key): info.value for key, _, info in tree if info}


def folder_md5(files: dict[str, str]) -> str:
    """What DVC records of a folder with these files: name -> MD5 in hex."""
    tree = Tree()
    for name, md5 in files.items():
        tree.add(tuple(name.split("/")), None, HashInfo("md5", md5))
    tree.digest()
    return str(tree.oid)


def remove_gone(repo: Repo, stages: Iterable[str]) -> list[str]:
    """Remove the outputs of stages that dvc.lock records and dvc.yaml no longer has.

    They would be part of every input that is a whole folder. Left alone are what Git tracks, what a
    stage of now makes, and what the cache does not keep: an edit, or what dvc.lock names and no
    stage made.

    Returns:
        The paths that were removed.
    """
    root = Path(repo.root_dir)
    lock = Lockfile(repo, str(root / "dvc.lock"))
    entries = patiently(Path(lock.path), lock.load).get("stages", {})
    gone = {name: entry for name, entry in entries.items() if name not in set(stages)}
    cache = Path(repo.cache.local_cache_dir)
    removed = []
    with lock_repo(repo) if gone else contextlib.nullcontext():
        for name, entry in gone.items():
            for out in entry.get("outs", []):
                free = _is_free(repo, out["path"])
                if free and kept(cache, root / out["path"], str(out.get("md5"))):
                    remove(root / out["path"])
                    removed.append(out["path"])
            lock.remove_stage(SimpleNamespace(name=name))
    return removed


def _is_free(repo: Repo, name: str) -> bool:
    """Whether a path exists, nothing of now makes it or a part of it, and Git does not track it.

    What is outside of the project, or of Git or DVC themselves, is not free.
    """
    root = Path(repo.root_dir).resolve()
    path, real = Path(repo.root_dir) / name, os.path.relpath((root / name).resolve(), root)
    if not inside(name) or not inside(real) or {".git", ".dvc"} & set(Path(real).parts):
        return False
    made = [Path(out.fs_path) for out in repo.index.outs]
    overlaps = any(path.is_relative_to(out) or out.is_relative_to(path) for out in made)
    return path.exists() and not overlaps and not repo.scm.is_tracked(str(path))


def remove_leftovers(repo: Repo) -> list[str]:
    """Remove the unfinished outputs of processes that were killed; return their paths."""
    root = Path(repo.root_dir)
    folders = {root, *(Path(out.fs_path).parent for out in repo.index.outs)}
    removed = []
    for path in (path for folder in folders if folder.is_dir() for path in folder.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match and not alive(int(match[1])):
            remove(path)
            removed.append(path.relative_to(root).as_posix())
    return removed


def alive(pid: int) -> bool:
    """Whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
