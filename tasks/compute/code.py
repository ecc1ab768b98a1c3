"""What is sent to the node: the files that Git tracks, as they are now, and the way to the data."""

from __future__ import annotations

import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.redact import without_secrets
from tasks import bridge

ALWAYS = [".dvc/config", "params.yaml", "dvc.yaml", "dvc.lock"]
NEVER = {".gitignore", ".amlignore"}  # the SDK would obey them, and Git itself is not there
# Of a remote's options, those that say where it is. Keys and passwords stay here.
PLAIN = {"url", "account_name", "endpointurl", "region"}
SECRET = re.compile(
    r"(?im)^\s*(connection_string|(?!ask_)\w*(key|token|secret|password|passphrase))\s*="
)
GIT_SECONDS = 60


def check(root: Path, stage: str, files: list[str]) -> None:
    """Raise a UserError if the node would lack a file that the stage reads, or get a secret."""
    unknown = _git(root, "ls-files", "--others", "-z", "--", *files) if files else []
    if unknown:
        raise UserError(
            f"{unknown[0]}: {stage} reads it, and neither Git nor DVC keeps it, so a cluster has "
            "it not: git add it, or dvc add it"
        )
    text = (root / ".dvc/config").read_text()
    found = SECRET.search(text)
    if found or without_secrets(text) != text:
        raise UserError(
            f".dvc/config: {found[1] if found else 'a password'} is a secret in a file that Git "
            "keeps: move it to the file that Git ignores, with dvc remote modify --local"
        )


def gather(root: Path, folder: Path) -> None:
    """Copy what the node needs to `folder`.

    Raises:
        UserError: as `bridge.settings`; an address holds a password.
    """
    for name in {*_git(root, "ls-files", "-z"), *ALWAYS}:
        path = root / name
        if path.is_file() and path.name not in NEVER:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    with (folder / ".dvc/config.local").open("w") as file:
        _config(bridge.settings(root)[0]).write(file)


def _config(here: dict[str, Any]) -> ConfigParser:
    """DVC's settings for a node: no Git, and the address of each remote."""
    config = ConfigParser(interpolation=None)
    config["core"] = {"no_scm": "true"}
    if default := here["core"].get("remote"):
        config["core"]["remote"] = default
    for name, remote in here["remote"].items():
        plain = {option: str(remote[option]) for option in sorted(PLAIN & set(remote))}
        for option, value in plain.items():
            if without_secrets(value) != value:
                raise UserError(f"remote.{name}: its {option} holds a password, which stays here")
        config[f"'remote \"{name}\"'"] = plain
    return config


def _git(root: Path, *args: str) -> list[str]:
    """What git lists.

    Raises:
        UserError: the project is in no Git repository.
    """
    done = subprocess.run(
        ["git", *args], cwd=root, capture_output=True, text=True, timeout=GIT_SECONDS, check=False
    )
    if done.returncode:
        raise UserError(f"what Git tracks is sent to the cluster, but {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name]
