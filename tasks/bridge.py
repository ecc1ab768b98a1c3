"""The one module that talks to DVC: what a stage needs, making it so, and what made a file.

DVC decides what is stale and does the work; this module asks it stage by stage, and has it run
commands through `tasks.command`. Parts of it are `tasks.pipeline`, `tasks.need`, `tasks.store`,
`tasks.locks` and `tasks.integrity`. DVC also reads the working directory: be in the project's
folder. Only `dvc.api` and the command line are public in DVC, so every private name that is used is
imported in these six; tests/test_bridge.py, tests/test_store.py, tests/test_scarcity.py and
tests/test_rot.py pin them.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import dvc.stage.run
from dvc.exceptions import DvcException, NotDvcRepoError, ReproductionError
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.stage import PipelineStage
from dvc.stage.cache import _can_hash, _get_cache_hash, _get_stage_hash
from dvc.stage.exceptions import StageCmdFailedError
from dvc.stage.serialize import to_single_stage_lockfile

from stages.errors import UserError
from stages.stage import PACKAGE, killed_with_parent, of_time
from tasks import integrity, locks, pipeline, store
from tasks.command import Job, stopping
from tasks.need import (
    Action,
    Inputs,
    Need,
    check_files,
    inputs_changed,
    inputs_of,
    need_of,
    outdated,
    unchanged,
)
from tasks.pipeline import opened, read, stages
from tasks.pool import gpu

for _name in ("dvc", "dvc_data"):
    logging.getLogger(_name).setLevel(logging.ERROR)


MENDED = 20  # inputs of one stage that were damaged; then it is the disk or the memory


class StageFailed(Exception):
    """A stage ended with an error; the text is its own last words."""


@dataclass(frozen=True)
class Outcome:
    """What was done with a stage. `key` is DVC's stage key: 64 hex digits, None if it has none."""

    stage: str
    action: Action
    reasons: list[str]
    seconds: float
    key: str | None
    outs: list[str]
    where: str | None = None
    """The machine it ran on, if not this one."""


class Elsewhere(Protocol):
    """Another machine, for a stage that has to run."""

    ran_on: str | None
    """Its name, once the stage ran there."""

    def bring(self, key: str, inputs: Inputs) -> None:
        """Leave the record and the outputs of the stage with this key in DVC's cache.

        Raises:
            StageFailed: with the stage's last words, or why it could not run there.
        """


class Turn(Protocol):
    """One stage that has to run, and nobody else who runs it."""

    ran: bool
    """To be set once its command ran here."""


class Flight(Protocol):
    """Other machines that may want the same stage."""

    def turn(self, stage: str, key: str) -> contextlib.AbstractContextManager[Turn]:
        """Alone with the stage of this key; what another made of it is in DVC's cache on entry.

        Raises:
            UserError: that could not be found out, or what was made could not be shared.
        """


_here = threading.local()  # .job: what this thread does for .stage, a project and a name in it;
# .check: of what it reads
_mending = threading.RLock()  # two stages may read the same damaged file


def find_root(start: Path | None = None) -> Path:
    """The project's folder: the nearest one upwards that holds .dvc."""
    try:
        return Path(Repo.find_root(str(start or Path.cwd())))
    except NotDvcRepoError:
        raise UserError(
            f"{start or Path.cwd()} is not in a project: no folder upwards holds .dvc and dvc.yaml"
        ) from None


def graph(root: Path) -> dict[str, set[str]]:
    """Every stage of dvc.yaml with the stages it directly depends on, upstream first.

    Raises:
        UserError: dvc.yaml is not valid, or names a parameter that params.yaml lacks.
    """
    with opened(root) as repo:
        return pipeline.graph(repo)


def begin(root: Path) -> tuple[dict[str, set[str]], list[str]]:
    """The graph, for a run; and the paths that were removed, which earlier runs left behind.

    Removed are outputs of stages that dvc.yaml no longer has, such as those of an adapter that is
    no longer in params.yaml, and unfinished outputs of stages that were killed.

    Raises:
        UserError: as `graph`.
    """
    with read(root, anew=True) as now:
        locks.remove_dead(now.repo)
        order = pipeline.graph(now.repo)
        return order, [*store.remove_leftovers(now.repo), *store.remove_gone(now.repo, order)]


def settings(root: Path) -> tuple[dict[str, Any], Path]:
    """DVC's configuration, secrets included, and the folder of its cache.

    Raises:
        UserError: one of its files is not valid.
    """
    with opened(root) as repo:
        return repo.config, Path(repo.cache.local_cache_dir)


def sources(root: Path, names: list[str]) -> set[str]:
    """DVC's names of what makes the inputs of stages: other stages and `.dvc` files."""
    with opened(root) as repo:
        ours = stages(repo)
        wanted = [ours[name] for name in names if not name.endswith(".dvc")]
        return {made for stage in wanted for made in inputs_of(stage).made}


def status(root: Path) -> dict[str, Need]:
    """What each stage needs, upstream first. A stage below a stale one waits for it."""
    needs: dict[str, Need] = {}
    with opened(root) as repo:
        ours = stages(repo)
        for name, above in pipeline.graph(repo).items():
            need = need_of(ours[name])
            stale = [up for up in above if needs[up].action != "unchanged"]
            if need.action == "unchanged" and stale:
                need = Need("run", [f"waits for {', '.join(sorted(stale))}"])
            needs[name] = need
    return needs


def reproduce(
    root: Path,
    name: str,
    on_line: Callable[[str], None],
    limit_seconds: float,
    env: dict[str, str] | None = None,
    *,
    elsewhere: Elsewhere | None = None,
    flight: Flight | None = None,
) -> Outcome:
    """Bring one stage up to date: skip it, restore it from the cache, or run it.

    Args:
        root: the project's folder.
        name: the stage, for instance `finetune@travel`.
        on_line: called with each line the stage prints, from this thread.
        limit_seconds: the stage's process group is killed after this long.
        env: added to the environment of the stage.
        elsewhere: where it runs if it has to; None for this machine.
        flight: who else may want it; None if nobody does.

    Raises:
        StageFailed: with the stage's last words; its previous outputs are put back.
    """
    started = time.monotonic()
    job = _here.job = Job(on_line, limit_seconds, env or {}, turn=gpu.turn(name))
    _here.stage = root, name
    try:
        with job.at_work():
            with read(root) as now:
                if unchanged(now.stages[name]):
                    return _outcome(now.stages[name], "unchanged", [], started)
            with opened(root) as repo:
                before = _expected(stages(repo)[name])
                reasons = _bring_up_to_date(repo, name, job, elsewhere, flight)
                if job.process:
                    reasons = _otherwise(before, stages(repo)[name]) + reasons
                where = elsewhere.ran_on if elsewhere else None
                action: Action = (
                    "run" if job.process or where else "restore" if reasons else "unchanged"
                )
                return _outcome(stages(repo)[name], action, reasons, started, where)
    except UserError as error:
        _put_back(root, name)
        raise StageFailed(job.last_words(name) or f"{name}: {error}") from None
    finally:
        _here.job = _here.check = None


def _outcome(
    stage: PipelineStage,
    action: Action,
    reasons: list[str],
    started: float,
    where: str | None = None,
) -> Outcome:
    return Outcome(
        stage=stage.name,
        action=action,
        reasons=reasons,
        seconds=time.monotonic() - started,
        key=_get_stage_hash(stage) if stage.deps and stage.outs else None,
        outs=[str(out) for out in stage.outs],
        where=where,
    )


def _expected(stage: PipelineStage) -> dict[str, str]:
    """MD5 of outputs in dvc.lock, where a stage that is run would be given the same again."""
    if stage.name == "toolchain" or inputs_changed(stage):  # that one reads what is installed
        return {}
    return _lasting(stage)


def _otherwise(before: dict[str, str], stage: PipelineStage) -> list[str]:
    """Which outputs did not come out as they were expected to, in words."""
    now = _lasting(stage)
    others = [path for path in before if path in now and before[path] != now[path]]
    return [f"{path}: the same inputs now make other bytes" for path in others]


def _lasting(stage: PipelineStage) -> dict[str, str]:
    """MD5 of what dvc.lock records of a stage's outputs, but of those that say when or how fast."""
    return {
        out.def_path: str(out.hash_info.value)
        for out in stage.outs
        if out.hash_info and not of_time(out.def_path) and out.def_path != str(PACKAGE)
    }


def _bring_up_to_date(
    repo: Repo, name: str, job: Job, elsewhere: Elsewhere | None, flight: Flight | None
) -> list[str]:
    """Have DVC do what a stage needs; return why, which is nothing when it was up to date."""
    stage = stages(repo)[name]
    need = need_of(stage)
    if need.action == "unchanged":
        return []
    reasons = need.reasons
    if found := integrity.keep(stage):
        repo._reset()  # what it read of the cache is old
        stage = stages(repo)[name]
        if unchanged(stage):
            return found
        need = need_of(stage)
        reasons = [*found, *need.reasons]
    if need.action == "run":
        check_files(stage)
    key = _key_now(stage) if flight and need.action == "run" else None
    if not flight or not key:
        return _do(repo, name, job, elsewhere) + reasons
    with flight.turn(name, key) as turn:
        repo._reset()  # what it read of the cache is old
        unfit = _do(repo, name, job, elsewhere)
        turn.ran = bool(job.process)
    return unfit + reasons


def _key_now(stage: PipelineStage) -> str | None:
    """The key for what a stage's inputs are now."""
    stage.save_deps()
    return _get_stage_hash(stage) if _can_hash(stage) else None


def _do(repo: Repo, name: str, job: Job, elsewhere: Elsewhere | None) -> list[str]:
    """Restore a stage or run it; return what was damaged of what it restored or reads."""
    mended: list[str] = []
    while True:
        _here.check = partial(integrity.check_inputs, stages(repo)[name])
        try:
            return mended + _restore_or_run(repo, name, job, elsewhere)
        except DvcException as error:
            cause = error if isinstance(error, integrity.Damaged) else error.__cause__
            if not isinstance(cause, integrity.Damaged) or len(mended) > MENDED:
                raise
            mended += _mend(repo, name, job, cause.files)
            _here.job, _here.stage = job, (Path(repo.root_dir), name)


def _mend(repo: Repo, name: str, job: Job, files: list[str]) -> list[str]:
    """Make inputs of a stage sound again: what another stage made, and data that DVC keeps.

    Returns:
        What was damaged and how it was mended, in words.

    Raises:
        UserError: a file that nothing here can bring back.
    """
    root, said = Path(repo.root_dir), []
    with _mending:
        for maker in list(repo.index.graph.successors(stages(repo)[name])):
            outs = [Path(out.fs_path) for out in maker.outs]
            theirs = [f for f in files if any((root / f).is_relative_to(out) for out in outs)]
            if not theirs:
                continue
            files = [f for f in files if f not in theirs]
            how = "restored"
            if pipeline.is_ours(maker):
                integrity.doubt(root, theirs)
                inner = _here.job = Job(job.on_line, job.limit_seconds, job.env)
                _here.stage = root, maker.name
                inner.turn = gpu.turn(maker.name)
                _bring_up_to_date(repo, maker.name, inner, None, None)
                how = "made again" if inner.process else how
            else:
                integrity.restore_data(repo, maker, theirs)
            repo._reset()  # what it read of files is old
            said.append(f"{', '.join(theirs)} was damaged: {how}")
            job.on_line(said[-1])
    if files:
        raise UserError(
            f"{', '.join(files)}: damaged: the bytes were changed, the time and size were not; "
            "olivepress verify --repair, or touch it if the change is yours"
        )
    return said


def _restore_or_run(repo: Repo, name: str, job: Job, elsewhere: Elsewhere | None) -> list[str]:
    """Restore a stage or run it; return why what was restored could not be used.

    Raises:
        integrity.Damaged: as the error or its cause: what the stage reads is, and it was not run.
    """
    stage = stages(repo)[name]
    if elsewhere and need_of(stage).action == "run":
        _bring(repo, name, elsewhere)
    _reproduce(repo, name, job, force=outdated(stage))
    if job.process:
        return []
    unfit = _unfit(stages(repo)[name])
    if unfit:
        if elsewhere:
            _bring(repo, name, elsewhere)
        _reproduce(repo, name, job, force=not elsewhere)
    return unfit


def _reproduce(repo: Repo, name: str, job: Job, force: bool) -> None:
    """Have DVC do it; wait for a `dvc` command that is at work on the same files."""
    told = ""
    while True:
        try:
            repo.reproduce(targets=[name], single_item=True, force=force)
            return
        except ReproductionError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            if not isinstance(error.__cause__, LockError):
                raise
            who = re.search(r"\(PID \d+\): .*", str(error.__cause__))
            if (text := f"waits for {who[0] if who else 'another dvc command'}") != told:
                job.on_line(text)
                told = text
            if stopping.wait(1):
                raise UserError("stopped") from None
            locks.remove_dead(repo)
            repo._reset()  # what it read is old


def _bring(repo: Repo, name: str, elsewhere: Elsewhere) -> None:
    """Have a stage run elsewhere, so that DVC can restore it from its cache.

    Raises:
        UserError: DVC cannot, so it would run the stage here.
    """
    stage = stages(repo)[name]
    integrity.check_inputs(stage)
    key = _key_now(stage)
    if not key:
        raise UserError("only a stage with dependencies and outputs in the project can run there")
    elsewhere.bring(key, inputs_of(stage))
    repo._reset()  # what it read of dvc.lock and of files is old
    if need_of(stages(repo)[name]).action == "run":
        raise UserError("what it reads was changed here while it ran there; run it again")


def _unfit(stage: PipelineStage) -> list[str]:
    """Why outputs that DVC restored cannot be used; what is bad is removed from its cache."""
    if outdated(stage):
        return ["installed libraries changed"]
    bad = [out for out in stage.outs if not store.as_recorded(out)]
    for out in bad:
        store.drop_bad_objects(out)
        out.remove()
    return [f"{out} is damaged in the cache" for out in bad]


def _put_back(root: Path, name: str) -> None:
    """DVC removes a stage's outputs before it runs: bring back those that dvc.lock records.

    But for the metrics and plots of the stage that failed, which say why.
    """
    with contextlib.suppress(UserError, OSError), opened(root) as repo:
        for out in stages(repo)[name].outs:
            if not out.hash_info or (out.exists and (out.metric or out.plot)):
                continue
            repo.checkout(targets=[out.fs_path], force=True, allow_missing=True)
            if not store.as_recorded(out):
                store.drop_bad_objects(out)
                out.remove()


def make_again(
    root: Path, name: str, on_line: Callable[[str], None], limit_seconds: float
) -> Callable[[], bool]:
    """Run a stage for objects that are nowhere any more, as bytes may well come out the same.

    Returns:
        To be called when they did: it puts dvc.lock and all outputs back as they were, records of
        when and how fast included. Says whether it could.

    Raises:
        UserError: what the stage reads is no longer what dvc.lock records.
        StageFailed: as `reproduce`.
    """
    with opened(root) as repo:
        stage = stages(repo)[name]
        if changed := inputs_changed(stage) or (outdated(stage) and ["libraries changed"]):
            raise UserError(f"{name} would now make something else: {'; '.join(changed)}")
        paths = [out.fs_path for out in stage.outs]
        before = (root / "dvc.lock").read_bytes()
    reproduce(root, name, on_line, limit_seconds)

    def put_back() -> bool:
        with opened(root) as repo:
            after = (root / "dvc.lock").read_bytes()
            with lock_repo(repo):
                store.replace(root / "dvc.lock", before)
            repo._reset()
            try:
                repo.checkout(targets=paths, force=True)
                if all(store.as_recorded(out) for out in stages(repo)[name].outs):
                    return True
            except DvcException:
                pass
            store.replace(root / "dvc.lock", after)
            repo._reset()
            repo.checkout(targets=paths, force=True)
            return False

    return put_back


def _run_command(executable: str | None, cmd: str, **kwargs: Any) -> None:
    """Take the place of DVC's own `_run`: the same command, streamed, limited and stoppable."""
    job: Job | None = getattr(_here, "job", None)
    if job is None:
        return _dvc_run(executable, cmd, **kwargs)
    if check := getattr(_here, "check", None):
        check()
    plain = re.fullmatch(r"[\w@%+=:,./ -]+", cmd)  # needs no shell, which would hide how it ended
    argv = shlex.split(cmd) if plain else dvc.stage.run._make_cmd(executable, cmd)
    root, name = _here.stage
    before = pipeline.seen(root, name)
    if code := job.run(argv, **kwargs, preexec_fn=killed_with_parent):
        raise StageCmdFailedError(cmd, code)
    now = pipeline.seen(root, name)
    if changed := [what for what in before | now if before.get(what) != now.get(what)]:
        # DVC would record what was made as made of what is there now.
        shown = ", ".join(changed[:3]) + (", …" if changed[3:] else "")
        raise UserError(
            f"{shown} changed while it ran, so nothing was kept of it: run it again "
            "(was another branch checked out?)"
        )


_dvc_run = dvc.stage.run._run
dvc.stage.run._run = _run_command


@dataclass(frozen=True)
class Made:
    """What dvc.lock records of a stage that was run: cmd, deps, params and outs with hashes."""

    stage: str
    key: str | None
    entry: dict[str, Any]
    changed: list[str]
    """Files of its outputs that are no longer what dvc.lock records."""


def made(root: Path) -> list[Made]:
    """Every stage that has been run, upstream first."""
    with opened(root) as repo:
        ours = stages(repo)
        upstream_first = [ours[name] for name in pipeline.graph(repo)]
        return [
            Made(
                stage.name,
                _get_cache_hash(to_single_stage_lockfile(stage), key=True) if stage.deps else None,
                to_single_stage_lockfile(stage),
                [path for out in stage.outs for path in store.changed_files(out)],
            )
            for stage in upstream_first
            if stage.outs and all(out.hash_info for out in stage.outs)
        ]


def recorded(root: Path, path: str) -> tuple[str, dict[str, str] | None] | None:
    """What dvc.lock records of an output that is a folder; None if it records nothing.

    Returns:
        The MD5 of its listing, with `.dir`; and its files with theirs, None if the cache has not
        the listing.
    """
    with opened(root) as repo:
        outs = [out for stage in stages(repo).values() for out in stage.outs]
        out = next((out for out in outs if out.def_path == path and out.hash_info), None)
        return (str(out.hash_info.value), store.listing(out)) if out else None
