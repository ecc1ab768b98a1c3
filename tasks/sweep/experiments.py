"""Candidates as DVC experiments, so that `dvc exp show` lists them and `dvc exp apply` takes one.

An experiment is a commit whose parent is the one that it began at, under
refs/exps/SHA[:2]/SHA[2:]/NAME (https://dvc.org/doc/user-guide/experiment-management). DVC's own
`exp save` makes one of a folder whose outputs are all there; a candidate's may be on another
machine, so the commit is made here of what it sent: params.yaml, dvc.lock, the metrics' content.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import yaml

from stages.stage import replacing
from tasks.git import git
from tasks.pool.workspace import cache_of

WHO = {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "olivepress"), ("EMAIL", "olivepress@localhost"))
}


def save(root: Path, commit: str, name: str, sent: dict[str, Any]) -> str:
    """Record a candidate as an experiment on a commit, replacing one of the same name.

    Args:
        root: the clone.
        commit: that the sweep began at.
        name: of the experiment.
        sent: `params`, `lock` and `metrics`, as flows/candidate.py sends them.

    Returns:
        The commit of the experiment.

    Raises:
        UserError: git failed.
    """
    _keep_metrics(root, sent)
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git(root, "read-tree", commit, **index)
        for path, text in (("params.yaml", sent["params"]), ("dvc.lock", sent["lock"])):
            blob = git(root, "hash-object", "-w", "--stdin", stdin=text)
            git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", **index)
        tree = git(root, "write-tree", **index)
    message = f"dvc: commit experiment {name}"
    made = git(root, "commit-tree", tree, "-p", commit, "-m", message, **WHO)
    git(root, "update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/{name}", made)
    return made


def files(root: Path, commit: str, name: str | None) -> dict[str, str]:
    """The params.yaml and dvc.lock of an experiment; nothing for a candidate that is none.

    Raises:
        UserError: it is gone, as `dvc exp remove` took it away.
    """
    if not name:
        return {}
    ref = f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"
    return {path: git(root, "show", f"{ref}:{path}") + "\n" for path in ("params.yaml", "dvc.lock")}


def _keep_metrics(root: Path, sent: dict[str, Any]) -> None:
    """Put metrics into DVC's cache, where `dvc exp show` reads them, if they are what they say."""
    cache = cache_of(root) / "files/md5"
    entries = (yaml.safe_load(sent["lock"]) or {}).get("stages", {}).values()
    sums = {out["path"]: out.get("md5") for entry in entries for out in entry.get("outs", [])}
    for path, text in sent["metrics"].items():
        data = text.encode()
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        place = cache / md5[:2] / md5[2:]
        if sums.get(path) == md5 and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as temporary:
                temporary.write_bytes(data)
                temporary.chmod(0o444)  # as DVC's own
