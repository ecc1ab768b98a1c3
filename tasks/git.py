"""Git's command line, with its errors in one line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from stages.errors import UserError

LIMIT_SECONDS = 120  # for a fetch over a slow line


def git(root: Path, *args: str, stdin: str | None = None, **env: str) -> str:
    """What a command prints.

    Args:
        root: a folder of the repository.
        args: of the command.
        stdin: what it reads.
        env: added to its environment.

    Raises:
        UserError: it failed; says how.
    """
    done = _run(root, args, stdin, env)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"git {args[0]}: {said[-1]}")
    return done.stdout.strip()


def succeeds(root: Path, *args: str) -> bool:
    """Whether a command ends with exit code 0."""
    return _run(root, args, None, {}).returncode == 0


def committed(root: Path, path: str) -> bytes | None:
    """A file as it is in the last commit; None if it is not there."""
    done = subprocess.run(
        ["git", "cat-file", "blob", f"HEAD:./{path}"],
        cwd=root,
        capture_output=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    return None if done.returncode else done.stdout


def branch(root: Path) -> str:
    """The branch that is checked out, or the commit where there is none."""
    name = _run(root, ("symbolic-ref", "--quiet", "HEAD"), None, {}).stdout
    return (name or _run(root, ("rev-parse", "HEAD"), None, {}).stdout).strip()


def _run(
    root: Path, args: tuple[str, ...], stdin: str | None, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", *args],
            cwd=root,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0", **env},
            input=stdin or "",
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"git {args[0]}: no end in {LIMIT_SECONDS} s; is the network there?"
        ) from None
