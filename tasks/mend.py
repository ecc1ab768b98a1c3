"""What is damaged, from sound copies: in the workspace, in the cache, in Git, in the DVC remote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.stage import replacing
from tasks import bridge, git, integrity, remote
from tasks.content import Content, Progress, listing, listing_of, md5_of, object_path, read
from tasks.verify import Finding, Look

UNWRITTEN = "could not be written: is the disk full?"


@dataclass(frozen=True)
class Done:
    """What was done about a finding."""

    path: str
    how: str
    mended: bool


@dataclass
class Work:
    now: Look
    aside: Path
    on_progress: Progress
    on_line: Callable[[str], None]
    done: list[Done] = field(default_factory=list)
    sound: dict[str, Path] = field(default_factory=dict)
    """Files that hold a content, by its hash."""
    moved: dict[str, Path] = field(default_factory=dict)
    """Where damaged files were put that nobody wrote, by path: for nothing once they are mended."""

    @property
    def cache(self) -> Path:
        return self.now.records.cache

    def say(self, path: str, how: str, mended: bool = True) -> None:
        self.done.append(Done(path, how, mended))

    def set_aside(self, name: str, path: Path, *, keep: bool = False) -> str:
        """Move a file out of the way, for good if somebody may have written it; say where to."""
        parts = Path(name.lstrip("/")).parts  # of what is outside of the project, some are ".."
        target = self.aside.joinpath(*("__" if part == ".." else part for part in parts))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
        if not keep:
            self.moved[name] = target
        content = self.now.held.get(path)
        if content and self.sound.get(content.md5) == path:
            self.sound[content.md5] = target
        return target.relative_to(self.now.root).as_posix()


def restore_input(work: Work, found: Finding) -> None:
    """A file that nobody makes can only be in Git."""
    content = git.committed(work.now.root, found.path)
    if content is None or md5_of(content) != found.md5:
        how = "no sound copy is in the last commit: put it back, or touch it if the change is yours"
        return work.say(found.path, how, mended=False)
    path = work.now.root / found.path
    aside = partial(work.set_aside, found.path, path)
    if not _write(path, content, path.stat().st_mode, aside):
        return work.say(found.path, UNWRITTEN, mended=False)
    return work.say(found.path, "restored from the last commit")


def mend_objects(work: Work) -> dict[str, str]:
    """Bring back objects of the cache from sound files here, then from the remote.

    Returns:
        Those that are in neither, by hash, with the path of their finding.
    """
    found = [one for one in work.now.report.findings if one.kind == "object"]
    paths = {one.md5: one.path for one in found if one.md5}
    for one in found:
        if one.what != "missing":
            where = work.set_aside(one.path, work.now.root / one.path, keep=not one.md5)
            if not one.md5:
                work.say(one.path, f"moved to {where}")
    for md5 in list(paths):
        if _from_here(work, md5):
            work.say(paths.pop(md5), "put back from a sound copy here")
    records = any(one.kind == "record" for one in work.now.report.findings)
    outs = {one.md5 for one in damaged_outputs(work)} & work.now.listings.keys() if paths else set()
    if (paths or records) and _fetch(work, paths.keys() | outs, records):
        for md5 in list(paths):
            if _add_if_sound(work, md5):
                work.say(paths.pop(md5), "fetched from the remote")
    kept = {one.md5 for one in work.now.records.files if one.cached}
    kept |= {md5 for out in kept for md5 in work.now.listings.get(out, {}).values()}
    for md5 in paths.keys() - kept:
        work.say(paths.pop(md5), "of an earlier run: removed; what needs it computes it")
    return paths


def _from_here(work: Work, md5: str) -> bool:
    """Write an object from a file that holds its content; of a listing, from what it lists."""
    target = object_path(work.cache, md5)
    if md5.endswith(".dir"):
        files = work.now.listings.get(md5)
        content = listing(files) if files else None
        if content is None or f"{md5_of(content)}.dir" != md5:
            return False
        if not _write(target, content, 0o444):  # as DVC leaves its objects
            return False
    elif md5 not in work.sound or not _copy(work.sound[md5], target, md5):
        return False
    target.chmod(0o444)
    work.sound[md5] = target
    return True


def _copy(source: Path, target: Path, md5: str, ready: Callable[[], Any] = lambda: None) -> bool:
    """Copy a file whole or not at all; whether what was written has the hash.

    Args:
        ready: called when the copy is there, before it takes its place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target, ready) as temporary:
            shutil.copyfile(source, temporary)
            if _content(temporary).md5 != md5:
                raise OSError(f"{source} is not what it was")
            if target.exists():
                temporary.chmod(target.stat().st_mode)
        return True
    except OSError:
        return False


def _write(
    target: Path, content: bytes, mode: int, ready: Callable[[], Any] = lambda: None
) -> bool:
    """Write a file whole or not at all; `ready` as for `_copy`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target, ready) as temporary:
            temporary.write_bytes(content)
            temporary.chmod(mode)
        return True
    except OSError:
        return False


def _content(path: Path) -> Content:
    return read([path], lambda done, total, note: None)[path]


def _fetch(work: Work, names: set[str], records: bool) -> bool:
    config, _ = bridge.settings(work.now.root)
    if not config["core"].get("remote"):
        return False
    try:
        remote.fetch_objects(work.now.root, names, records)
        return True
    except UserError as error:
        work.say("remote", str(error), mended=False)
        return False


def _add_if_sound(work: Work, md5: str) -> bool:
    """Note an object that was fetched, or that a stage made, if it is there and is what it says."""
    path = object_path(work.cache, md5)
    if _content(path).md5 != md5.removesuffix(".dir"):
        return False
    if md5.endswith(".dir"):
        files = listing_of(work.cache, md5)
        if files is None:
            return False
        work.now.listings[md5] = files
    work.sound[md5] = path
    return True


def mend_lock(work: Work) -> None:
    """Put the sizes right that dvc.lock says."""
    found = [one for one in work.now.report.findings if one.kind == "lock"]
    if any(one.path == "dvc.lock" for one in found):
        integrity.change_lock(work.now.root, partial(_resize, work))
        work.say("dvc.lock", "written again with the sizes of what is here")


def mend_records(work: Work) -> None:
    """Write records of the run-cache again that dvc.lock has, or that say a wrong size."""
    bad = {one.path for one in work.now.report.findings if one.kind == "record"}
    if not bad:
        return
    entries = {integrity.run_name(made.entry): made.entry for made in bridge.made(work.now.root)}
    for run in work.now.records.runs:
        name = next((name for name in bad if work.now.root / name == run.path), None)
        if name is None:
            continue
        if integrity.run_record(run.path).entry != run.entry:
            work.say(name, "fetched from the remote")
            continue
        entry = entries.get((run.path.parent.name, run.path.name)) or run.entry
        aside = partial(work.set_aside, name, run.path)
        if entry:
            _resize(work, entry)
            text = integrity.record_text(entry).encode()
            done = _write(run.path, text, run.path.stat().st_mode, aside)
            work.say(name, "written again" if done else UNWRITTEN, mended=done)
        else:
            aside()
            work.say(name, "of an earlier run: removed; what it named is computed if asked for")


def _resize(work: Work, entry: dict[str, Any]) -> None:
    """Have a record say the sizes that its contents have."""
    for one in [*entry.get("deps", []), *entry.get("outs", [])]:
        if one.get("md5") in work.now.sizes:
            one["size"] = work.now.sizes[one["md5"]]
        if one.get("md5") in work.now.listings:
            one["nfiles"] = len(work.now.listings[one["md5"]])


def damaged_outputs(work: Work) -> list[integrity.Recorded]:
    """The outputs and tracked data of which something was found."""
    bad = {one.path for one in work.now.report.findings if one.kind == "output"}
    return [
        one
        for one in work.now.records.files
        if one.maker and any(path == one.path or path.startswith(f"{one.path}/") for path in bad)
    ]


def restore_output(work: Work, one: integrity.Recorded) -> bool:
    """Put the files of an output back that are not as recorded; whether all could be."""
    root, files = work.now.root, {one.path: one.md5}
    if one.md5.endswith(".dir"):
        listed = work.now.listings.get(one.md5)
        if listed is None:
            return False
        files = {f"{one.path}/{name}": md5 for name, md5 in listed.items()}
    bad = {found.path for found in work.now.report.findings if found.kind == "output"}
    extra = one.there.keys() - files.keys()
    if one.path not in bad:  # else it is not known which of its files are
        files = {name: md5 for name, md5 in files.items() if name in bad}
        extra &= bad
    wrong = {
        name: md5
        for name, md5 in files.items()
        if name not in one.there or work.now.held[root / name].md5 != md5
    }
    if not all(has(work, md5) for md5 in wrong.values()):
        return False
    for name, md5 in wrong.items():
        aside = partial(_clear, work, name, keep=one.there.get(name) != md5)
        if not _copy(object_path(work.cache, md5), root / name, md5, aside):
            return False
        work.say(name, "restored from the cache")
    for name in extra:
        work.say(name, f"moved to {work.set_aside(name, root / name, keep=True)}")
    return True


def _clear(work: Work, name: str, keep: bool) -> None:
    if (work.now.root / name).exists():
        work.set_aside(name, work.now.root / name, keep=keep)


def has(work: Work, md5: str) -> bool:
    """Whether the cache holds a content, soundly."""
    path = object_path(work.cache, md5)
    return work.sound.get(md5) == path or (path.exists() and _add_if_sound(work, md5))
