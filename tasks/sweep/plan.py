"""Before the first candidate: the commit, what differs from it, and what a machine must have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stages import params
from stages.errors import UserError
from tasks import overrides
from tasks.git import git, succeeds
from tasks.pool.machine import Has, needs_of
from tasks.sweep.figures import check_adapters
from tasks.sweep.results import Result
from tasks.sweep.spec import Range, Spec

OWN = {"params.yaml", "dvc.lock"}  # which a candidate brings itself


def begin(root: Path, spec: Spec) -> Result:
    """An empty result, once it is sure that candidates can be told apart from the commit.

    Raises:
        UserError: the folder is no Git repository, has changes that other machines will not see, or
            lacks a key or adapter that the sweep names.
    """
    commit = _commit(root)
    base = dict(_differences(root))
    values = params.load(root / "params.yaml")
    check_adapters([*spec.objectives, *(x.figure for x in spec.parsed_limits())],
                   list(values.adapters))  # fmt: skip
    for key, choices in spec.space.items():
        for value in [choices.low, choices.high] if isinstance(choices, Range) else choices:
            _check_value(root, key, value)
    for path in _inputs(values):
        if not _is_kept(root, path):
            raise UserError(
                f"{path} is not in Git, so other machines do not have it: git add it, or dvc add "
                "and commit its .dvc file"
            )
    return Result(spec, commit, base)


def _check_value(root: Path, key: str, value: Any) -> None:
    section = key.partition(".")[0]
    if section in ("run", "azure", "compute"):
        raise UserError(f"space.{key}: changes where and how a stage runs, and no result")
    overrides.preview(root, {key: value})


def _commit(root: Path) -> str:
    if not succeeds(root, "rev-parse", "--verify", "--quiet", "HEAD"):
        raise UserError(f"{root}: a sweep needs a Git commit to start from")
    lines = git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    changed = [line.split(maxsplit=1)[1] for line in lines]
    others = [path for path in changed if path not in OWN]
    if others:
        raise UserError(
            f"{', '.join(others[:3])}{', …' if len(others) > 3 else ''}: changed since the last "
            "commit, which is what candidates run: commit first"
        )
    return git(root, "rev-parse", "HEAD")


def _differences(root: Path) -> Iterator[tuple[str, Any]]:
    """What params.yaml says otherwise than the commit, by dotted key."""
    there = yaml.safe_load(git(root, "show", "HEAD:./params.yaml")) or {}
    here = yaml.safe_load((root / "params.yaml").read_text("utf-8")) or {}
    yield from _changed(there, here, "")


def _changed(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield prefix, new
        return
    gone = [key for key in old if key not in new]
    if gone:
        raise UserError(
            f"params.yaml: {prefix}{'.' if prefix else ''}{gone[0]} was taken out since the last "
            "commit: commit first"
        )
    for key, value in new.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in old:
            yield name, value
        else:
            yield from _changed(old[key], value, name)


def _inputs(values: params.Params) -> list[str]:
    """Files that params.yaml names."""
    found = [adapter.data for adapter in values.adapters.values()]
    found += [values.quantize.calibration_data, values.evaluate.text]
    if values.base.source == "builtin":
        found.append(values.base.path)
    return [path for path in found if not Path(path).is_absolute()]


def _is_kept(root: Path, path: str) -> bool:
    """Whether Git or DVC has a file, or a stage makes it."""
    kept = git(root, "ls-files", path, f"{path}.dvc")
    return bool(kept) or path.startswith("data/prepared/")


def needs(root: Path, spec: Spec, changes: dict[str, Any]) -> Has:
    """What a machine must have to take a candidate."""
    found = needs_of(root, overrides.preview(root, changes))
    own = spec.needs
    return Has(
        gpus=found.gpus if own.gpu is None else int(own.gpu),
        memory_gb=own.memory_gb or found.memory_gb,
        disk_gb=own.disk_gb or found.disk_gb,
    )
