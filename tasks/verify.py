"""Whether all bytes are those that were recorded: outputs, inputs, DVC's cache and its run-cache.

Nothing is believed that a mode, a time or a database says; each file is read, from the disk and not
from what the memory holds of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stages.errors import UserError
from tasks import integrity
from tasks.content import (
    OBJECT,
    Content,
    Progress,
    listing_hash,
    listing_of,
    object_path,
    objects,
    read,
)

Kind = Literal["output", "input", "object", "record", "lock"]
What = Literal["damaged", "truncated", "missing", "swapped", "changed", "extra", "unreadable"]


@dataclass(frozen=True)
class Finding:
    """A file that is not what was recorded."""

    path: str
    """In the project; absolute for a cache that is elsewhere."""
    kind: Kind
    """A file of the workspace that a stage made or that DVC keeps; another one that stages read; an
    object of the cache; a record of the run-cache; dvc.lock or a `.dvc` file."""
    what: What
    of: list[str]
    """The outputs that it is of, with what makes them: `models/base/config.json (fetch)`."""
    note: str = ""
    md5: str = ""
    """What it should have; of a listing with `.dir`; empty where that is not known."""


@dataclass
class Report:
    """What was read and what was found."""

    files: int = 0
    objects: int = 0
    records: int = 0
    size: int = 0
    """Bytes that were read."""
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    """Inputs that were edited since the last run, or are gone: `olivepress status` says more."""
    at_work: list[int] = field(default_factory=list)
    """Processes that were at work in the project: what they write may be among what was found."""

    @property
    def sound(self) -> bool:
        return not self.findings


@dataclass
class Look:
    """One look at everything; `tasks.repair` needs what the report leaves out."""

    root: Path
    records: integrity.Records
    held: dict[Path, Content]
    listings: dict[str, dict[str, str]]
    """Of folders, by hash with `.dir`: name in the folder -> MD5. Those that can be had."""
    names: dict[str, list[str]]
    """Of contents, by hash: what they are, `models/base/config.json (fetch)`."""
    sizes: dict[str, int]
    """Of contents and folders, by hash."""
    report: Report

    def found(
        self,
        kind: Kind,
        path: str,
        what: What,
        *,
        of: Iterable[str | None] = (),
        note: str = "",
        md5: str = "",
    ) -> None:
        theirs = [name for name in of if name]
        self.report.findings.append(Finding(path, kind, what, theirs, note, md5))


def check(root: Path, on_progress: Progress = lambda done, total, note: None) -> Report:
    """Read everything that is recorded, and say what is not as recorded.

    Args:
        root: the project's folder.
        on_progress: called with bytes done, bytes in all and a note, from several threads.

    Raises:
        UserError: dvc.lock is missing; it or dvc.yaml is not valid.
    """
    return look(root, on_progress).report


def look(root: Path, on_progress: Progress = lambda done, total, note: None) -> Look:
    """As `check`, with what was read."""
    started = time.monotonic()
    if not (root / "dvc.lock").exists():
        raise UserError(f"{root / 'dvc.lock'} is not there: olivepress run writes it")
    records = integrity.records(root)
    files = {root / name for one in records.files for name in one.there}
    kept = set(objects(records.cache))
    held = read(files | kept, on_progress)
    report = Report(len(files), len(kept), len(records.runs))
    report.at_work = sorted(records.at_work)
    report.size = sum(content.size for content in held.values())
    now = Look(root, records, held, {}, {}, {}, report)
    _learn(now)
    for one in records.files:
        (_check_output if one.maker else _check_input)(now, one)
    _check_objects(now, kept)
    _check_records(now)
    _check_lock(now)
    report.seconds = time.monotonic() - started
    return now


def _learn(now: Look) -> None:
    """Fill in what contents there are: listings, names and sizes."""
    earlier = [
        (out["path"], "an earlier run", out["md5"])
        for run in now.records.runs
        if run.entry
        for out in run.entry["outs"]
        if "md5" in out
    ]
    now.sizes |= {one.md5: one.size for one in now.held.values() if not one.error}
    latest = [(one.path, one.maker, one.md5) for one in now.records.files]
    for path, maker, md5 in [*latest, *earlier]:
        name = f"{path} ({maker})" if maker else path
        _name(now, md5, name)
        if not md5.endswith(".dir"):
            continue
        for inner, its in (_listing(now, path, md5) or {}).items():
            _name(now, its, f"{path}/{inner} ({maker})" if maker else f"{path}/{inner}")
    for md5, files in now.listings.items():
        if all(its in now.sizes for its in files.values()):
            now.sizes[md5] = sum(now.sizes[its] for its in files.values())
    # Of what is not here: what is recorded, most of it of inputs that were edited.
    entries = [*now.records.lock.values(), *(run.entry for run in now.records.runs)]
    said = [(one["md5"], one["size"]) for entry in entries for one in _sized(entry)]
    for md5, size in [*said, *((one.md5, one.size) for one in now.records.files)]:
        if size is not None:
            now.sizes.setdefault(md5, size)


def _name(now: Look, md5: str, name: str) -> None:
    names = now.names.setdefault(md5, [])
    if not any(other.partition(" (")[0] == name.partition(" (")[0] for other in names):
        names.append(name)


def _listing(now: Look, path: str, md5: str) -> dict[str, str] | None:
    """The files of a folder: from the cache if its listing is sound, else from a sound folder."""
    if md5 not in now.listings:
        there = object_path(now.records.cache, md5)
        content = now.held.get(there)
        here = present(now, path)
        sound = content and f"{content.md5}.dir" == md5
        if sound and (files := listing_of(now.records.cache, md5)) is not None:
            now.listings[md5] = files
        elif listing_hash(here) == md5:
            now.listings[md5] = here
    return now.listings.get(md5)


def present(now: Look, path: str) -> dict[str, str]:
    """The files of an output or input that is a folder: name in it -> MD5 of what is there."""
    there = next((one.there for one in now.records.files if one.path == path), {})
    return {name.removeprefix(f"{path}/"): now.held[now.root / name].md5 for name in there}


def _check_output(now: Look, one: integrity.Recorded) -> None:
    if not one.md5.endswith(".dir"):
        expected = {one.path: one.md5}
    elif not one.there:
        expected = {one.path: one.md5}  # missing as a whole
    elif (files := _listing(now, one.path, one.md5)) is None:
        note = "some of it is not as recorded; which files cannot be told, as the listing is lost"
        return now.found("output", one.path, "changed", of=[one.maker], note=note, md5=one.md5)
    else:
        expected = {f"{one.path}/{name}": md5 for name, md5 in files.items()}
    for name, md5 in sorted(expected.items()):
        _compare(now, one, name, md5)
    extra = one.there.keys() - expected.keys()
    if extra and _is_data(one):
        return _edited(now, one)
    for name in sorted(extra):
        note = f"not a file that {one.maker} made"
        now.found("output", name, "extra", of=[one.maker], note=note)


def _compare(now: Look, one: integrity.Recorded, name: str, md5: str) -> None:
    maker, believed = one.maker or "", one.there.get(name)
    content = now.held.get(now.root / name) if name in one.there else None
    if content is None:
        return now.found("output", name, "missing", of=[maker], md5=md5)
    if content.md5 == md5:
        return None
    if _is_data(one) and believed != md5 and not content.error:
        return _edited(now, one)
    what, note = _differs(now, content, md5)
    if what == "damaged" and believed == md5:
        note = "the bytes were changed, the time and size were not"
    elif what == "damaged":
        what, note = "changed", note or "written to since it was made"
    return now.found("output", name, what, of=[maker], note=note, md5=md5)


def _is_data(one: integrity.Recorded) -> bool:
    """Whether it is of a `.dvc` file: people edit it, as they do other inputs."""
    return bool(one.maker and one.maker.endswith(".dvc"))


def _edited(now: Look, one: integrity.Recorded) -> None:
    if one.path not in now.report.stale:
        now.report.stale.append(one.path)


def _differs(now: Look, content: Content, md5: str) -> tuple[What, str]:
    """What happened to a content that should have another hash."""
    if content.error:
        return "unreadable", content.error
    if content.size and (others := now.names.get(content.md5)):
        return "swapped", f"has the content of {others[0]}"
    expected = now.sizes.get(md5)
    if expected is not None and content.size < expected:
        return "truncated", f"{content.size:,} of {expected:,} bytes"
    if expected is not None and content.size > expected:
        return "damaged", f"{content.size:,} bytes instead of {expected:,}"
    return "damaged", ""


def _check_input(now: Look, one: integrity.Recorded) -> None:
    """An input that nothing makes may be edited; not so when DVC takes it for unchanged."""
    unseen = False
    for name, believed in one.there.items():
        content = now.held[now.root / name]
        if content.error or (believed and content.md5 != believed):
            unseen = True
            note = content.error or "the bytes were changed, the time and size were not"
            what: What = "unreadable" if content.error else "damaged"
            now.found("input", name, what, note=note, md5=believed or "")
    if not unseen and _hash_of(now, one) != one.md5:
        now.report.stale.append(one.path)


def _hash_of(now: Look, one: integrity.Recorded) -> str:
    if one.path in one.there:
        return now.held[now.root / one.path].md5
    return listing_hash(present(now, one.path))


def _check_objects(now: Look, there: set[Path]) -> None:
    for path in sorted(there):
        content, name = now.held[path], path.parent.name + path.name
        if not OBJECT.fullmatch(name):
            now.found("object", _shown(now, path), "extra", note="no name of an object")
        elif content.error or content.md5 != name.removesuffix(".dir"):
            of = now.names.get(name, ["no run that is known"])
            what, note = _differs(now, content, name)
            now.found("object", _shown(now, path), what, of=of, note=note, md5=name)
        elif name.endswith(".dir") and listing_of(now.records.cache, name) is None:
            of = now.names.get(name, ["no run that is known"])
            note = "lists what is no file of a folder"
            now.found("object", _shown(now, path), "damaged", of=of, note=note, md5=name)
    kept = {one.md5: one.path for one in now.records.files if one.cached}
    needed = {its: kept[out] for out in kept for its in (out, *now.listings.get(out, {}).values())}
    for md5, path_of in needed.items():
        path = object_path(now.records.cache, md5)
        if path not in there:
            of = now.names.get(md5, [path_of])
            now.found("object", _shown(now, path), "missing", of=of, md5=md5)


def _check_records(now: Look) -> None:
    """Compare records with their names, with DVC's form, and with the sizes of what is here.

    Sizes are in no name.
    """
    for run in now.records.runs:
        shown = _shown(now, run.path)
        if not run.entry:
            now.found("record", shown, "damaged", note="not what its name says")
            continue
        wrong = _missized(now, run.entry)
        of = [str(out["path"]) for out in run.entry["outs"]]
        if wrong:
            note = f"says a wrong size of {', '.join(wrong)}"
            now.found("record", shown, "damaged", of=of, note=note)
        elif run.path.read_text("utf-8") != run.text:
            note = "not in the form that DVC writes"
            now.found("record", shown, "damaged", of=of, note=note)


def _check_lock(now: Look) -> None:
    """Compare the sizes that dvc.lock and `.dvc` files say with what is here."""
    found = {name: _missized(now, entry) for name, entry in now.records.lock.items()}
    if of := [name for name, wrong in found.items() if wrong]:
        wrong = sorted({path for paths in found.values() for path in paths})
        note = f"says a wrong size of {', '.join(wrong)}"
        now.found("lock", "dvc.lock", "damaged", of=of, note=note)
    for one in now.records.files:
        if one.maker and _is_data(one) and now.sizes.get(one.md5, one.size) != one.size is not None:
            note = f"says a wrong size: dvc commit {one.maker} writes it again"
            now.found("lock", one.maker, "damaged", note=note)


def _missized(now: Look, entry: dict[str, Any]) -> list[str]:
    """What an entry of dvc.lock or the run-cache says a wrong size of, or number of files."""
    lengths = {md5: len(files) for md5, files in now.listings.items()}
    return [
        one["path"]
        for one in _sized(entry)
        if now.sizes.get(one["md5"], one["size"]) != one["size"]
        or lengths.get(one["md5"], one.get("nfiles")) != one.get("nfiles")
    ]


def _sized(entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    both = [*entry.get("deps", []), *entry.get("outs", [])] if entry else []
    return [one for one in both if "md5" in one and "size" in one]


def _shown(now: Look, path: Path) -> str:
    return path.relative_to(now.root).as_posix() if path.is_relative_to(now.root) else str(path)
