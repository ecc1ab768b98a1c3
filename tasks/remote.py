"""Move what the pipeline made to and from a DVC remote: outputs, data and the run-cache.

DVC's command line does the work. Three things are added to it:

- Every object is checked by its hash when it arrives (the remote's option `verify`), as DVC trusts
  what is in its cache.
- Every object is checked before it is sent.
- DVC moves all records of the run-cache, but only the outputs that dvc.lock names now. Those of
  earlier parameters are moved by `.dvc` files in a folder that shares this project's `.dvc`.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.redact import without_secrets
from tasks import bridge, integrity, verify
from tasks.content import object_path, objects, read
from tasks.dvc_command import Dvc, NoAnswer, Progress, explain, overrule
from tasks.run_cache import cached, contents, earlier, named, outputs, records

LIMIT_SECONDS = 12 * 3600.0
PROBE_SECONDS = 30.0  # DVC takes 90 to 165 s to find that nothing answers
QUIET_SECONDS = 180.0  # as long as the storage clients try again by themselves
SCOPE = "https://storage.azure.com/.default"
KEYS = {"connection_string", "account_key", "sas_token"}  # with which Azure asks for no sign-in
MOVED = re.compile(r"(\d+) files? (?:pushed|fetched)")
NO_REMOTE = (
    "no remote is configured: dvc remote add --default store azure://CONTAINER/FOLDER && "
    "dvc remote modify store account_name ACCOUNT && az login (docs/remotes.md has others)"
)


class DamagedHere(UserError):
    """What was to be sent is damaged; trying again does not help."""


@dataclass
class Moved:
    """What was moved.

    Args:
        files: objects, without the records of the run-cache, which DVC moves each time.
        missing: stages whose outputs the remote lacks, and which; `olivepress run` computes them.
        damaged: objects of the remote that were refused, as their bytes do not match their name.
    """

    remote: str
    url: str
    files: int = 0
    seconds: float = 0.0
    missing: dict[str, list[str]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


@dataclass
class Link:
    """A remote that answered.

    Args:
        dvc: its commands.
        cache: the folder of DVC's cache.
        empty: whether the remote holds nothing.
    """

    dvc: Dvc
    moved: Moved
    cache: Path
    empty: bool

    def move(self, verb: str, targets: list[str]) -> None:
        """Push or fetch, and count.

        Args:
            verb: `push`, or `fetch`, which may find some objects absent.
            targets: DVC's names of what is moved as it is now; none for all of it, with data, and
                outputs of earlier runs.
        """
        push = verb == "push"
        command = [*([verb] if push else [verb, "--verbose"]), "--remote", self.moved.remote]
        self._count(self.dvc.do(*command, "--run-cache", *targets, absent_ok=not push))
        if not targets:
            with earlier(self.dvc.root, self.cache, here=push) as folder:
                if folder:
                    self._count(self.dvc.do(*command, cwd=folder, absent_ok=not push))

    def _count(self, said: list[str]) -> None:
        self.moved.files += sum(int(found[1]) for line in said if (found := MOVED.search(line)))


def push(root: Path, stages: list[str] | None = None, **limits: Any) -> Moved:
    """Send what the remote does not have yet.

    Args:
        root: the project's folder.
        stages: send their outputs of now; None for all stages, data, and outputs of earlier runs.
        limits: as `_connected`.

    Raises:
        DamagedHere: what would be sent is not what its name says.
        UserError: as `_connected`; DVC's own failures, in one line.
    """
    with _connected(root, None if stages else "olivepress run writes it", **limits) as link:
        _check_sent(link, stages)
        link.moved.files -= len(records(link.cache))  # which DVC counts when it sends them
        link.move("push", stages or [])
    return link.moved


def _check_sent(link: Link, stages: list[str] | None) -> None:
    """Read what is to be sent: others trust it, and DVC sends what a mode calls sound.

    Args:
        stages: as `push`; of None, every object of the cache is read.

    Raises:
        DamagedHere: an object or a record of the run-cache is not what its name says.
    """
    root, cache = link.dvc.root, link.cache
    paths, kept = set(objects(cache)), records(cache)
    if stages:
        made = [one for one in bridge.made(root) if one.stage in stages]
        outs = {out["md5"] for one in made for out in one.entry["outs"] if "md5" in out}
        paths &= {
            object_path(cache, name) for out in outs for name in contents(cache, out) or {out}
        }
        kept = [path for one in made for path in records(cache, one.key or "-")]
    held = read(paths, link.dvc.on_progress)
    bad = [path for path, content in held.items() if not content.names(path)]
    bad += [path for path in kept if not integrity.run_record(path).entry]
    if bad:
        found = {found.path: found for found in verify.check(root).findings}
        named = {
            path: next((f for n, f in found.items() if root / n == path), None) for path in bad
        }
        words = [
            f"{path.name} ({', '.join(one.of) if one else '?'})" for path, one in named.items()
        ]
        raise DamagedHere(
            f"not sent, as the content does not match the name: {', '.join(words)}; "
            "olivepress verify --repair mends it"
        )


def _drop_bad_records(cache: Path, key: str = "*") -> list[Path]:
    """Remove records of the run-cache that arrived damaged; DVC has no hash of them to check."""
    bad = [path for path in records(cache, key) if not integrity.run_record(path).entry]
    for path in bad:
        path.unlink(missing_ok=True)
    return bad


def pull(root: Path, stages: list[str] | None = None, **limits: Any) -> Moved:
    """Fetch what is not here, check it by hash, and put in place what dvc.lock records.

    Args:
        root: the project's folder.
        stages: what they read and make; None for all stages, data, and outputs of earlier runs.
        limits: as `_connected`.

    Raises:
        UserError: as `push`; the remote is empty; a file that would be replaced is in no cache.
    """
    with _connected(root, None if stages else "who pushed commits it", **limits) as link:
        dvc, moved = link.dvc, link.moved
        if link.empty:
            raise UserError(
                f"{dvc.where}: nothing is there, or no such container: push to it first"
            )
        targets = sorted({*stages, *bridge.sources(root, stages)}) if stages else []
        link.move("fetch", targets)
        bad = _drop_bad_records(link.cache)
        dvc.do("checkout", "--allow-missing", *targets)
    gone = {path for path in [*dvc.damaged, *bad] if not path.exists()}
    moved.damaged = sorted("/".join(path.parts[-4:]) for path in gone)  # files/md5/ab/cdef…
    missing = _missing(root)
    moved.missing = {name: missing[name] for name in targets or missing if name in missing}
    return moved


def check(root: Path, remote: str) -> None:
    """Raise a UserError, as `_connected`, unless a remote answers and lets this machine in."""
    with _connected(root, None, remote=remote):
        pass


def fetch_run(root: Path, key: str, **limits: Any) -> bool:
    """Fetch the outputs of the stage with this key to the cache; whether the remote has them.

    Raises:
        UserError: as `_connected`; DVC's own failures, in one line.
    """
    with _connected(root, None, **limits) as link:
        if link.empty:
            return False
        fetch = ("fetch", "--verbose", "--remote", link.moved.remote)
        with named(root, []) as folder:
            link.dvc.do(*fetch, "--run-cache", cwd=folder)
        _drop_bad_records(link.cache, key)
        names = outputs(link.cache, key)
        if names:
            with named(root, names) as folder:
                link.dvc.do(*fetch, cwd=folder, absent_ok=True)
        return bool(names) and all(cached(link.cache, name) for name in names)


def fetch_objects(root: Path, names: set[str], records: bool, **limits: Any) -> None:
    """Fetch contents to the cache, of folders with all their files; what is absent stays so.

    Args:
        root: the project's folder.
        names: their hashes.
        records: whether to fetch the run-cache too.
        limits: as `_connected`.

    Raises:
        UserError: as `_connected`; DVC's own failures, in one line.
    """
    with _connected(root, None, **limits) as link, named(root, sorted(names)) as folder:
        if not link.empty:
            fetch = ["fetch", "--verbose", "--remote", link.moved.remote]
            link.dvc.do(*fetch, *(["--run-cache"] * records), cwd=folder, absent_ok=True)


@contextmanager
def _connected(
    root: Path,
    who_writes_lock: str | None,
    *,
    remote: str | None = None,
    limit_seconds: float = LIMIT_SECONDS,
    probe_seconds: float | None = PROBE_SECONDS,
    quiet_seconds: float = QUIET_SECONDS,
    on_progress: Progress = lambda done, total, note: None,
) -> Iterator[Link]:
    """A remote that answers, with a record to fill in.

    Args:
        who_writes_lock: for the error when dvc.lock is missing; None if it is not needed.
        remote: its name; None for DVC's default remote.
        limit_seconds: for all of it.
        probe_seconds: for the remote's first answer; None for one that has just answered.
        quiet_seconds: something must move in that time.
        on_progress: called with files done, files in all, and a note.

    Raises:
        UserError: dvc.lock is missing; no such remote; it does not answer or refuses; out of time.
    """
    started = time.monotonic()
    if who_writes_lock and not (root / "dvc.lock").exists():
        raise UserError(f"{root / 'dvc.lock'} is not there: {who_writes_lock}")
    config, cache = bridge.settings(root)
    name = _choose(list(config["remote"]), remote or config["core"].get("remote"))
    options = config["remote"][name]
    moved = Moved(name, without_secrets(str(options["url"])))
    where = f"remote {name} ({moved.url})"
    with tempfile.TemporaryDirectory() as folder:
        overrule(Path(folder) / "config", name)
        env = {"DVC_SYSTEM_CONFIG_DIR": folder}
        dvc = Dvc(root, where, limit_seconds, quiet_seconds, on_progress, env)
        empty = probe_seconds is not None and _is_empty(dvc, name, options, probe_seconds)
        yield Link(dvc, moved, cache, empty)
    moved.seconds = time.monotonic() - started


def _is_empty(dvc: Dvc, name: str, options: dict[str, Any], seconds: float) -> bool:
    """Whether nothing was ever pushed to a remote.

    Raises:
        UserError: it does not answer in time, or refuses.
    """
    try:
        code, said = dvc.run("ls-url", f"remote://{name}", within=seconds)
    except NoAnswer:
        if str(options["url"]).startswith("azure:") and not KEYS & set(options):
            _check_sign_in(dvc.where)
        raise
    empty = bool(code) and "does not exist" in " ".join(said)
    if code and not empty:
        raise UserError(f"{dvc.where}: {explain(said)}")
    return empty


def _check_sign_in(where: str) -> None:
    """Raise a UserError if signing in to Azure fails, as that may be why it did not answer.

    The storage client takes over a minute for a sign-in that fails at once, as it tries again.
    """
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import DefaultAzureCredential

    from stages.azure import SIGN_IN, TIMEOUTS

    logging.getLogger("azure.identity").setLevel(logging.CRITICAL)
    try:
        DefaultAzureCredential(process_timeout=10, **TIMEOUTS, retry_total=0).get_token(SCOPE)
    except ClientAuthenticationError:
        raise UserError(f"{where}: {SIGN_IN}") from None


def _choose(names: list[str], wanted: str | None) -> str:
    """The name of a remote, of those that are configured."""
    if wanted in names:
        return wanted
    if not names:
        raise UserError(NO_REMOTE)
    there = ", ".join(names)
    if wanted:
        raise UserError(f"no remote is called {wanted}; choose one of {there}")
    raise UserError(f"no remote is the default: dvc remote default NAME, or --remote with {there}")


def _missing(root: Path) -> dict[str, list[str]]:
    """Stages that were run somewhere and whose outputs are not here, with why."""
    words = (" missing", " not cached")
    found = {
        name: [reason for reason in need.reasons if reason.endswith(words)]
        for name, need in bridge.status(root).items()
    }
    return {name: reasons for name, reasons in found.items() if reasons}
