"""Move what the pipeline made to and from a DVC remote: outputs, data and the run-cache.

DVC's command line does the work. Two things are added to it:

- Every object is checked by its hash when it arrives (the remote's option `verify`), as DVC trusts
  what is in its cache.
- DVC moves all records of the run-cache, but only the outputs that dvc.lock names now. Those of
  earlier parameters are moved by `.dvc` files in a folder that shares this project's `.dvc`.
"""

from __future__ import annotations

import configparser
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import UserError
from tasks import bridge
from tasks.dvc_command import Dvc, NoAnswer, Progress, explain
from tasks.run_cache import cached, earlier, named, outputs, records

LIMIT_SECONDS = 12 * 3600.0
PROBE_SECONDS = 30.0  # DVC takes 90 to 165 s to find that nothing answers
QUIET_SECONDS = 180.0  # as long as the storage clients try again by themselves
SCOPE = "https://storage.azure.com/.default"
MACHINE_CONFIG = "/etc/xdg/dvc"  # https://dvc.org/doc/user-guide/project-structure/configuration
MOVED = re.compile(r"(\d+) files? (?:pushed|fetched)")
NO_REMOTE = (
    "no remote is configured: dvc remote add --default store azure://CONTAINER/FOLDER && "
    "dvc remote modify store account_name ACCOUNT && az login (docs/remotes.md has others)"
)


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


def push(root: Path, stages: list[str] | None = None, **limits: Any) -> Moved:
    """Send what the remote does not have yet.

    Args:
        root: the project's folder.
        stages: send their outputs of now; None for all stages, data, and outputs of earlier runs.
        limits: as `_connected`.

    Raises:
        UserError: as `_connected`; DVC's own failures, in one line.
    """
    lock = None if stages else "olivepress run writes it"
    with _connected(root, lock, **limits) as (dvc, moved, _):
        send = ("push", "--remote", moved.remote)
        cache = Path(dvc.do("cache", "dir")[-1])
        moved.files -= len(records(cache))  # which DVC counts when it sends them
        _count(moved, dvc.do(*send, "--run-cache", *(stages or [])))
        if not stages:
            with earlier(root, cache, here=True) as folder:
                if folder:
                    _count(moved, dvc.do(*send, cwd=folder))
    return moved


def pull(root: Path, stages: list[str] | None = None, **limits: Any) -> Moved:
    """Fetch what is not here, check it by hash, and put in place what dvc.lock records.

    Args:
        root: the project's folder.
        stages: what they read and make; None for all stages, data, and outputs of earlier runs.
        limits: as `_connected`.

    Raises:
        UserError: as `push`; the remote is empty; a file that would be replaced is in no cache.
    """
    lock = None if stages else "who pushed commits it"
    with _connected(root, lock, **limits) as (dvc, moved, empty):
        if empty:
            raise UserError(
                f"{dvc.where}: nothing is there, or no such container: push to it first"
            )
        targets = _with_inputs(dvc, stages) if stages else []
        fetch = ("fetch", "--verbose", "--remote", moved.remote)
        _count(moved, dvc.do(*fetch, "--run-cache", *targets, absent_ok=True))
        if not stages:
            cache = Path(dvc.do("cache", "dir")[-1])
            with earlier(root, cache, here=False) as folder:
                if folder:
                    _count(moved, dvc.do(*fetch, cwd=folder, absent_ok=True))
        dvc.do("checkout", "--allow-missing", *targets)
    gone = {path for path in dvc.damaged if not path.exists()}
    moved.damaged = sorted("/".join(path.parts[-4:]) for path in gone)  # files/md5/ab/cdef…
    missing = _missing(root)
    moved.missing = {name: missing[name] for name in targets or missing if name in missing}
    return moved


def fetch_run(root: Path, key: str, **limits: Any) -> bool:
    """Fetch the outputs of the stage with this key to the cache; whether the remote has them.

    Raises:
        UserError: as `_connected`; DVC's own failures, in one line.
    """
    with _connected(root, None, **limits) as (dvc, moved, empty):
        if empty:
            return False
        cache = Path(dvc.do("cache", "dir")[-1])
        fetch = ("fetch", "--verbose", "--remote", moved.remote)
        with named(root, []) as folder:
            dvc.do(*fetch, "--run-cache", cwd=folder)
        names = outputs(cache, key)
        if names:
            with named(root, names) as folder:
                dvc.do(*fetch, cwd=folder, absent_ok=True)
        return bool(names) and all(cached(cache, name) for name in names)


@contextmanager
def _connected(
    root: Path,
    who_writes_lock: str | None,
    *,
    remote: str | None = None,
    limit_seconds: float = LIMIT_SECONDS,
    probe_seconds: float = PROBE_SECONDS,
    quiet_seconds: float = QUIET_SECONDS,
    on_progress: Progress = lambda done, total, note: None,
) -> Iterator[tuple[Dvc, Moved, bool]]:
    """DVC for a remote that answers, a record to fill in, and whether the remote is empty.

    Args:
        who_writes_lock: for the error when dvc.lock is missing; None if it is not needed.
        remote: its name; None for DVC's default remote.
        limit_seconds: for all of it.
        probe_seconds: for the remote's first answer.
        quiet_seconds: something must move in that time.
        on_progress: called with files done, files in all, and a note.

    Raises:
        UserError: dvc.lock is missing; no such remote; it does not answer or refuses; out of time.
    """
    started = time.monotonic()
    if who_writes_lock and not (root / "dvc.lock").exists():
        raise UserError(f"{root / 'dvc.lock'} is not there: {who_writes_lock}")
    dvc = Dvc(root, "dvc", limit_seconds, quiet_seconds, on_progress)
    name, url = _choose(dvc.do("remote", "list"), remote)
    dvc.where = f"remote {name} ({url})"
    moved = Moved(name, url)
    with tempfile.TemporaryDirectory() as folder:
        dvc.env = {"DVC_SYSTEM_CONFIG_DIR": folder}
        _configure(Path(folder) / "config", name)
        try:
            code, said = dvc.run("ls-url", f"remote://{name}", within=probe_seconds)
        except NoAnswer:
            _check_sign_in(dvc, name, url)
            raise
        empty = bool(code) and "does not exist" in " ".join(said)
        if code and not empty:
            raise UserError(f"{dvc.where}: {explain(said)}")
        yield dvc, moved, empty
    moved.seconds = time.monotonic() - started


def _check_sign_in(dvc: Dvc, name: str, url: str) -> None:
    """For an Azure remote without a key: raise a UserError if that is why it did not answer.

    The storage client takes over a minute for a sign-in that fails at once, as it tries again.
    """
    keys = re.compile(rf"remote\.{re.escape(name)}\.(connection_string|account_key|sas_token)=")
    if not url.startswith("azure:") or any(map(keys.match, dvc.do("config", "--list"))):
        return
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import DefaultAzureCredential

    from stages.azure import SIGN_IN, TIMEOUTS

    logging.getLogger("azure.identity").setLevel(logging.CRITICAL)
    try:
        DefaultAzureCredential(process_timeout=10, **TIMEOUTS, retry_total=0).get_token(SCOPE)
    except ClientAuthenticationError:
        raise UserError(f"{dvc.where}: {SIGN_IN}") from None


def _choose(lines: list[str], wanted: str | None) -> tuple[str, str]:
    """Name and address of a remote, from the lines of `dvc remote list`."""
    remotes = {line.split()[0]: line for line in lines}
    name = wanted or next((n for n, line in remotes.items() if line.endswith("(default)")), None)
    if name in remotes:
        return name, remotes[name].removesuffix("(default)").split(maxsplit=1)[1].strip()
    if not remotes:
        raise UserError(NO_REMOTE)
    names = ", ".join(remotes)
    if name:
        raise UserError(f"no remote is called {name}; choose one of {names}")
    raise UserError(f"no remote is the default: dvc remote default NAME, or --remote with {names}")


def _configure(path: Path, remote: str) -> None:
    """Write a machine's DVC configuration, which all others overrule: what is there, and ours."""
    config = configparser.ConfigParser(interpolation=None, strict=False)
    config.read(Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR", MACHINE_CONFIG)) / "config")
    ours = {
        "core": "no_scm",
        f"'remote \"{remote}\"'": "verify",
    }  # the folder of `earlier` has no Git
    for section, option in ours.items():
        config.read_dict({section: {option: "true"}})
    with path.open("w") as file:
        config.write(file)


def _count(moved: Moved, said: list[str]) -> None:
    moved.files += sum(int(found[1]) for line in said if (found := MOVED.search(line)))


def _with_inputs(dvc: Dvc, stages: list[str]) -> list[str]:
    """Stages, and those and the `.dvc` files whose outputs they read."""
    edges = [re.findall(r'"([^"]+)"', line) for line in dvc.do("dag", "--dot") if "->" in line]
    return sorted({*stages, *(up for up, down in edges if down in stages)})


def _missing(root: Path) -> dict[str, list[str]]:
    """Stages that were run somewhere and whose outputs are not here, with why."""
    words = (" missing", " not cached")
    found = {
        name: [reason for reason in need.reasons if reason.endswith(words)]
        for name, need in bridge.status(root).items()
    }
    return {name: reasons for name, reasons in found.items() if reasons}
