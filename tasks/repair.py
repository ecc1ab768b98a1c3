"""Bring back what `tasks.verify` found damaged: from here, from the DVC remote, or by computing it.

Nothing is removed before a sound copy is in its place. What is damaged is moved to
`.dvc/tmp/damaged`; it stays there if it could not be brought back, or if somebody may have written
it on purpose.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stages import params
from stages.errors import UserError
from tasks import bridge, git, integrity, remote
from tasks.content import Content, Progress, listing, md5_of, object_path, read
from tasks.verify import Finding, Look, Report, check, look


@dataclass(frozen=True)
class Done:
    """What was done about a finding."""

    path: str
    how: str
    mended: bool


@dataclass
class Repair:
    """What was found, what was done about it, and what a second look found."""

    before: Report
    done: list[Done]
    after: Report


@dataclass
class _Work:
    now: Look
    aside: Path
    on_progress: Progress
    on_line: Callable[[str], None]
    done: list[Done] = field(default_factory=list)
    sound: dict[str, Path] = field(default_factory=dict)
    """Files that hold a content, by its hash."""
    moved: dict[str, Path] = field(default_factory=dict)
    """Where damaged files were put, by the path of their finding."""

    @property
    def cache(self) -> Path:
        return self.now.records.cache

    def say(self, path: str, how: str, mended: bool = True) -> None:
        self.done.append(Done(path, how, mended))

    def set_aside(self, name: str, path: Path) -> str:
        """Move a file out of the way; where to, for a person."""
        target = self.aside / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
        self.moved[name] = target
        content = self.now.held.get(path)
        if content and self.sound.get(content.md5) == path:
            self.sound[content.md5] = target
        return target.relative_to(self.now.root).as_posix()


def repair(
    root: Path,
    on_progress: Progress = lambda done, total, note: None,
    on_line: Callable[[str], None] = lambda line: None,
) -> Repair:
    """Look, bring back what can be brought back, and look again.

    Args:
        root: the project's folder.
        on_progress: as `tasks.verify.check`.
        on_line: called with what stages print that are run for it.

    Raises:
        UserError: as `tasks.verify.check`; a run is at work here.
    """
    if busy := integrity.records(root).at_work:
        raise UserError(
            f"process {min(busy)} is at work in this project: repair it when that has ended"
        )
    now = look(root, on_progress)
    aside = now.records.tmp / "damaged" / time.strftime("%Y%m%d-%H%M%S")
    work = _Work(now, aside, on_progress, on_line)
    if now.report.sound:
        return Repair(now.report, [], now.report)
    work.sound = {content.md5: path for path, content in now.held.items() if not content.error}
    for found in now.report.findings:
        if found.kind == "input":
            _restore_input(work, found)
    lost = _mend_objects(work)
    _mend_records(work)
    failed = {one.path: one for one in _outputs(work) if not _restore(work, one)}
    for stage, wanted in _lost_stages(work, lost, failed).items():
        _make_again(work, stage, wanted, failed)
    for path, one in failed.items():
        work.say(path, f"no sound copy of it is here or in a remote ({one.maker})", mended=False)
    return Repair(now.report, work.done, _after(work))


def _after(work: _Work) -> Report:
    """A second look; what was damaged and is mended is removed for good."""
    after = check(work.now.root, work.on_progress)
    left = {found.path for found in after.findings}
    mended = {done.path for done in work.done if done.mended} - left
    mended -= {found.path for found in work.now.report.findings if _meant(work, found)}
    for name, path in work.moved.items():
        if name in mended:
            path.unlink(missing_ok=True)
    for folder in sorted(work.aside.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if work.aside.is_dir() and not any(work.aside.iterdir()):
        work.aside.rmdir()
    return after


def _meant(work: _Work, found: Finding) -> bool:
    """Whether somebody may have written it: DVC's database knows it with another time or size."""
    believed = {name: md5 for one in work.now.records.files for name, md5 in one.there.items()}
    wrote = found.kind == "output" and believed.get(found.path) != found.md5
    return wrote or found.what == "extra"


def _restore_input(work: _Work, found: Finding) -> None:
    """A file that nobody makes can only be in Git."""
    content = git.committed(work.now.root, found.path)
    if content is None or md5_of(content) != found.md5:
        how = "no sound copy is in the last commit: put it back, or touch it if the change is yours"
        return work.say(found.path, how, mended=False)
    mode = (work.now.root / found.path).stat().st_mode
    work.set_aside(found.path, work.now.root / found.path)
    (work.now.root / found.path).write_bytes(content)
    (work.now.root / found.path).chmod(mode)
    return work.say(found.path, "restored from the last commit")


def _mend_objects(work: _Work) -> set[str]:
    """Bring back objects of the cache from sound files here, then from the remote.

    Returns:
        The hashes of those that are in neither.
    """
    found = [one for one in work.now.report.findings if one.kind == "object"]
    paths = {one.md5: one.path for one in found if one.md5}
    for one in found:
        if one.what != "missing":
            where = work.set_aside(one.path, work.now.root / one.path)
            if not one.md5:
                work.say(one.path, f"moved to {where}")
    for md5 in list(paths):
        if _from_here(work, md5):
            work.say(paths.pop(md5), "put back from a sound copy here")
    lost = set(paths)
    records = any(one.kind == "record" for one in work.now.report.findings)
    needed = lost | {one.md5 for one in _outputs(work) if one.md5 in work.now.listings}
    if (lost or records) and _fetch(work, needed if lost else set(), records):
        for md5 in sorted(lost):
            if _add_if_sound(work, md5):
                work.say(paths[md5], "fetched from the remote")
                lost.discard(md5)
    kept = {one.md5 for one in work.now.records.files if one.cached}
    kept |= {md5 for out in kept for md5 in work.now.listings.get(out, {}).values()}
    for md5 in sorted(lost - kept):
        lost.discard(md5)
        work.say(paths[md5], "of no run that dvc.lock records: removed; what needs it computes it")
    return lost


def _from_here(work: _Work, md5: str) -> bool:
    """Write an object from a file that holds its content; of a listing, from what it lists."""
    target = object_path(work.cache, md5)
    if md5.endswith(".dir"):
        files = work.now.listings.get(md5)
        content = listing(files) if files else None
        if content is None or f"{md5_of(content)}.dir" != md5:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    elif md5 not in work.sound or not _copy(work.sound[md5], target, md5):
        return False
    target.chmod(0o444)  # as DVC leaves its objects
    work.sound[md5] = target
    return True


def _copy(source: Path, target: Path, md5: str, ready: Callable[[], Any] = lambda: None) -> bool:
    """Copy a file whole or not at all; whether what was written has the hash.

    Args:
        ready: called when the copy is there, before it takes its place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        shutil.copyfile(source, temporary)
        if _content(temporary).md5 != md5:
            return False
        if target.exists():
            temporary.chmod(target.stat().st_mode)
        ready()
        temporary.replace(target)
        return True
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _content(path: Path) -> Content:
    return read([path], lambda done, total, note: None)[path]


def _fetch(work: _Work, names: set[str], records: bool) -> bool:
    config, _ = bridge.settings(work.now.root)
    if not config["core"].get("remote"):
        return False
    try:
        remote.fetch_objects(work.now.root, names, records)
        return True
    except UserError as error:
        work.say("remote", str(error), mended=False)
        return False


def _add_if_sound(work: _Work, md5: str) -> bool:
    """Note an object that was fetched, or that a stage made, if it is there and is what it says."""
    path = object_path(work.cache, md5)
    if _content(path).md5 != md5.removesuffix(".dir"):
        return False
    work.sound[md5] = path
    if md5.endswith(".dir"):
        entries = json.loads(path.read_bytes())
        work.now.listings[md5] = {entry["relpath"]: entry["md5"] for entry in entries}
    return True


def _mend_records(work: _Work) -> None:
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
        entry = entries.get((run.path.parent.name, run.path.name)) or _resized(work, run.entry)
        work.set_aside(name, run.path)
        if entry:
            run.path.write_text(integrity.record_text(entry), "utf-8")
            work.say(name, "written again")
        else:
            work.say(name, "of an earlier run: removed; what it named is computed if asked for")


def _resized(work: _Work, entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """A record with the sizes that its contents have."""
    for one in [*entry.get("deps", []), *entry["outs"]] if entry else []:
        if one.get("md5") in work.now.sizes:
            one["size"] = work.now.sizes[one["md5"]]
        if one.get("md5") in work.now.listings:
            one["nfiles"] = len(work.now.listings[one["md5"]])
    return entry


def _outputs(work: _Work) -> list[integrity.Recorded]:
    """The outputs and tracked data of which something was found."""
    bad = {one.path for one in work.now.report.findings if one.kind == "output"}
    return [
        one
        for one in work.now.records.files
        if one.maker and any(path == one.path or path.startswith(f"{one.path}/") for path in bad)
    ]


def _restore(work: _Work, one: integrity.Recorded) -> bool:
    """Put the files of an output back that are not as recorded; whether all could be."""
    root, files = work.now.root, {one.path: one.md5}
    if one.md5.endswith(".dir"):
        listed = work.now.listings.get(one.md5)
        if listed is None:
            return False
        files = {f"{one.path}/{name}": md5 for name, md5 in listed.items()}
    wrong = {
        name: md5
        for name, md5 in files.items()
        if name not in one.there or work.now.held[root / name].md5 != md5
    }
    if not all(_has(work, md5) for md5 in wrong.values()):
        return False
    for name, md5 in wrong.items():
        aside = partial(_clear, work, name)
        if not _copy(object_path(work.cache, md5), root / name, md5, aside):
            return False
        work.say(name, "restored from the cache")
    for name in one.there.keys() - files.keys():
        work.say(name, f"moved to {work.set_aside(name, root / name)}")
    return True


def _clear(work: _Work, name: str) -> None:
    if (work.now.root / name).exists():
        work.set_aside(name, work.now.root / name)


def _has(work: _Work, md5: str) -> bool:
    """Whether the cache holds a content, soundly."""
    path = object_path(work.cache, md5)
    return work.sound.get(md5) == path or (path.exists() and _add_if_sound(work, md5))


def _lost_stages(
    work: _Work, lost: set[str], failed: dict[str, integrity.Recorded]
) -> dict[str, list[str]]:
    """Stages that have to run for what is lost, upstream first, with the hashes to get back."""
    needs: dict[str, list[str]] = {}
    for one in work.now.records.files:
        its = [one.md5, *work.now.listings.get(one.md5, {}).values()]
        if one.maker and (lost & set(its) or one.path in failed):
            needs.setdefault(one.maker, []).extend(its)
    return {name: needs[name] for name in bridge.graph(work.now.root) if name in needs}


def _make_again(
    work: _Work, stage: str, wanted: list[str], failed: dict[str, integrity.Recorded]
) -> None:
    """Run a stage whose outputs are nowhere sound; what comes out alike is as it was before."""
    root, settings = work.now.root, params.load(work.now.root / "params.yaml").run
    minutes = settings.time_limits.get(stage, settings.time_limit_minutes)
    theirs = [path for path, one in failed.items() if one.maker == stage]
    try:
        put_back = bridge.make_again(root, stage, work.on_line, minutes * 60)
    except (UserError, bridge.StageFailed) as error:
        work.say(stage, f"not made again: {error}", mended=False)
        return
    same = all(_has(work, md5) for md5 in wanted) and put_back()
    for path in theirs:
        failed.pop(path)
    how = (
        "the same bytes" if same else "other bytes; olivepress run brings up to date what reads it"
    )
    for path in theirs or [stage]:
        work.say(path, f"made again by {stage}: {how}")
