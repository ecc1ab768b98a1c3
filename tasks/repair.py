"""Bring back what `tasks.verify` found damaged: from here, from the DVC remote, or by computing it.

Nothing is removed before a sound copy is in its place. What is damaged is moved to
`.dvc/tmp/damaged`; it stays there if it could not be brought back, or if somebody may have written
it on purpose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from stages import params
from stages.errors import UserError
from tasks import bridge, integrity
from tasks.content import Progress
from tasks.mend import (
    Done,
    Work,
    damaged_outputs,
    has,
    mend_lock,
    mend_objects,
    mend_records,
    restore_input,
    restore_output,
)
from tasks.turn import alone
from tasks.verify import Report, check, look


@dataclass
class Repair:
    """What was found, what was done about it, and what a second look found."""

    before: Report
    done: list[Done]
    after: Report


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
        UserError: as `tasks.verify.check`; a run, a pull or a `dvc` command is at work here.
    """
    with alone(root, "a repair"):
        return _repair(root, on_progress, on_line)


def _repair(root: Path, on_progress: Progress, on_line: Callable[[str], None]) -> Repair:
    now = look(root, on_progress)
    aside = now.records.tmp / "damaged" / time.strftime("%Y%m%d-%H%M%S")
    work = Work(now, aside, on_progress, on_line)
    if now.report.sound:
        return Repair(now.report, [], now.report)
    work.sound = {content.md5: path for path, content in now.held.items() if not content.error}
    for found in now.report.findings:
        if found.kind == "input":
            restore_input(work, found)
    lost = mend_objects(work)
    mend_lock(work)
    mend_records(work)
    failed = {one.path: one for one in damaged_outputs(work) if not restore_output(work, one)}
    for stage, wanted in _lost_stages(work, lost, failed).items():
        _make_again(work, stage, wanted, failed)
    left = [path for md5, path in lost.items() if not has(work, md5)]
    for path in [*failed, *left]:
        work.say(path, "no sound copy of it is here or in a remote", mended=False)
    return Repair(now.report, work.done, _after(work))


def _after(work: Work) -> Report:
    """A second look; what was damaged and is mended is removed for good."""
    after = check(work.now.root, work.on_progress)
    left = {found.path for found in after.findings}
    mended = {done.path for done in work.done if done.mended} - left
    for name, path in work.moved.items():
        if name in mended:
            path.unlink(missing_ok=True)
    for folder in sorted(work.aside.rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if work.aside.is_dir() and not any(work.aside.iterdir()):
        work.aside.rmdir()
    return after


def _lost_stages(
    work: Work, lost: Iterable[str], failed: dict[str, integrity.Recorded]
) -> dict[str, list[str]]:
    """Stages that have to run for what is lost, upstream first, with the hashes to get back."""
    needs: dict[str, list[str]] = {}
    for one in work.now.records.files:
        its = [one.md5, *work.now.listings.get(one.md5, {}).values()]
        if one.maker and (set(lost) & set(its) or one.path in failed):
            needs.setdefault(one.maker, []).extend(its)
    return {name: needs[name] for name in bridge.graph(work.now.root) if name in needs}


def _make_again(
    work: Work, stage: str, wanted: list[str], failed: dict[str, integrity.Recorded]
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
    same = all(has(work, md5) for md5 in wanted) and put_back()
    for path in theirs:
        failed.pop(path)
    how = (
        "the same bytes" if same else "other bytes; olivepress run brings up to date what reads it"
    )
    for path in theirs or [stage]:
        work.say(path, f"made again by {stage}: {how}")
