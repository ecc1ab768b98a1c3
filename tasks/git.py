"""Git's command line, with its errors in one line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from stages.errors import UserError


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


def _run(
    root: Path, args: tuple[str, ...], stdin: str | None, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *args],
        cwd=root,
        env={**os.environ, **env},
        input=stdin or "",
        capture_output=True,
        text=True,
        check=False,
    )
