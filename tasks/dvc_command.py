"""DVC's command line as a child process: its progress, its limits, and its errors in one line."""

from __future__ import annotations

import configparser
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stages.errors import UserError
from stages.stage import killed_with_parent
from tasks.command import Job
from tasks.pipeline import site_cache

MACHINE_CONFIG = "/etc/xdg/dvc"  # https://dvc.org/doc/user-guide/project-structure/configuration
DVC = [sys.executable, "-P", str(Path(__file__).with_name("checked_dvc.py"))]
Progress = Callable[[int, int, str], None]

SCREEN = re.compile(r"\x1b\[\w|^!$")  # what moves DVC's bars about
BAR = re.compile(r"(\d+)% ?[^|]*\|[^|]*\|")
OF_ALL = re.compile(r"(?:Push|Fetch)ing (?:to|from) .*?(\d+)/(\d+) ")
DAMAGED = re.compile(r"corrupted cache file '(.+)'")
ERROR = re.compile(r"\bERROR: (?:unexpected error - |configuration error - |config file error: )*")
ABSENT = re.compile(r"failed to transfer .*No such file|\d+ files? failed to download$")

# What the storage clients print, and what to do; the first that is found counts.
MEANINGS = [
    (r"No space left on device|Disk quota exceeded", "the disk is full: free some and try again"),
    (
        r"No such container|ContainerNotFound|NoSuchBucket",
        "the container or bucket is not there; Azure: az storage container create --name CONTAINER "
        "--account-name ACCOUNT --auth-mode login",
    ),
    (
        r"Authenticat|Authoriz|credential|Connection string|AccessKey|SignatureDoesNotMatch"
        r"|Access ?Denied|Forbidden|Permission denied for user|Host key is not trusted",
        "the credentials are not accepted: docs/remotes.md says which it takes (Azure: az login)",
    ),
    (
        r"Cannot connect|Connect call failed|Connection refused|Name or service not known"
        r"|getaddrinfo|timed out|Could not connect|Connection (lost|reset)|No route to host",
        "nothing answers there: check its address and the network",
    ),
    (r"requires '(dvc-\w+)' to be installed", "its client is missing: pip install {1}"),
    (
        r"unable to remove .* without a confirmation",
        "a file was changed here and is in no cache: move it away, or remove it",
    ),
]


class NoAnswer(UserError):
    """A remote did not answer in the time of its probe."""


@dataclass
class Dvc:
    """The commands of one job, which share its limits.

    Args:
        root: the project's folder.
        where: what an error begins with.
        limit_seconds: for all commands together.
        quiet_seconds: a command is killed after so long without a sign of progress.
        on_progress: called with files done, files in all, and a note.
        env: added to the environment.
    """

    root: Path
    where: str
    limit_seconds: float
    quiet_seconds: float
    on_progress: Progress
    env: dict[str, str] = field(default_factory=dict)
    damaged: list[Path] = field(default_factory=list)
    """Objects of the cache whose bytes were not those of their name; DVC has removed them."""
    _said: list[str] = field(default_factory=list)
    _of_all: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.limit_seconds

    def run(
        self, *args: str, cwd: Path | None = None, within: float = float("inf")
    ) -> tuple[int, list[str]]:
        """A command's exit code and what it says, without its progress.

        Raises:
            NoAnswer: `within` seconds were over.
            UserError: out of time; nothing happened for too long.
        """
        self._said, self._of_all = [], (0, 0)
        left = max(self._deadline - time.monotonic(), 0.1)
        job = Job(self._hear, min(left, within), {}, self.quiet_seconds)
        env = {"DVC_SITE_CACHE_DIR": site_cache(self.root), **os.environ, **self.env}
        env |= {"DVC_IGNORE_ISATTY": "1", "COLUMNS": "400"}
        code = job.run(
            [*DVC, "--wait-for-lock", *args],
            env,
            cwd=cwd or self.root,
            preexec_fn=killed_with_parent,
        )
        if not job.stopped:
            return code, self._said
        if "nothing happened" in job.stopped:
            raise UserError(f"{self.where}: stopped after {job.stopped}; the same command goes on")
        if within < left:
            raise NoAnswer(
                f"{self.where}: no answer within {within:g} s: check its address, the network and "
                "the login"
            )
        raise UserError(
            f"{self.where}: stopped after its time limit of {self.limit_seconds / 60:g} minutes; "
            "the same command goes on from there"
        )

    def do(self, *args: str, cwd: Path | None = None, absent_ok: bool = False) -> list[str]:
        """As `run`, for a command that must succeed; of fetches, objects may be absent.

        Raises:
            UserError: as `run`; why the command failed.
        """
        code, said = self.run(*args, cwd=cwd)
        wrong = [line for line in said if ERROR.search(line)]
        if absent_ok:
            wrong = [line for line in wrong if not ABSENT.search(line)]
        if wrong or (code and not absent_ok):
            raise UserError(f"{self.where}: {explain(said)}")
        return said

    def _hear(self, line: str) -> None:
        line = SCREEN.sub("", line).strip()
        if found := OF_ALL.search(line):
            self._of_all = int(found[1]), int(found[2])
        if bar := BAR.match(line):
            done, total = self._of_all
            if total:
                rest = "" if found or done == total else f", this one {bar[1]}%"
                self.on_progress(done, total, f"{done} of {total} files{rest}")
        elif found := DAMAGED.search(line):
            self.damaged.append(Path(found[1]))
        elif line:
            self._said.append(line)


def overrule(path: Path, remote: str) -> None:
    """Write a machine's DVC configuration, which all others overrule: what is there, and ours."""
    config = configparser.ConfigParser(interpolation=None, strict=False)
    config.read(Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR", MACHINE_CONFIG)) / "config")
    config.read_dict(
        {
            "core": {"no_scm": "true"},  # the folders of `tasks.run_cache` have no Git
            f"'remote \"{remote}\"'": {"verify": "true"},
        }
    )
    with path.open("w") as file:
        config.write(file)


def explain(said: list[str]) -> str:
    """Why a command failed, in one line: what it means if that is known, else DVC's last error."""
    text = "\n".join(said)
    for pattern, meaning in MEANINGS:
        if found := re.search(pattern, text):
            return meaning.replace("{1}", found[found.lastindex or 0])
    errors = [ERROR.split(line)[-1] for line in said if ERROR.search(line)]
    return errors[-1] if errors else said[-1] if said else "dvc failed and said nothing"
