"""Before the first candidate: the commit, what differs from it, and what a machine must have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages import params
from stages.errors import UserError
from stages.reading import yaml_file, yaml_value
from tasks import overrides
from tasks.git import git, succeeds
from tasks.pool.machine import Has, needs_of
from tasks.sweep.figures import check_adapters
from tasks.sweep.results import Result
from tasks.sweep.spec import Range, Spec

OWN = {"params.yaml", "dvc.lock"}  # which a candidate brings itself


def begin(root: Path, spec: Spec, run: str) -> Result:
    """An empty result, once it is sure that all machines will see the same candidates.

    Args:
        root: the clone.
        spec: what is wanted.
        run: the flow run id of the sweep.

    Raises:
        UserError: the folder is no Git repository, has changes that other machines will not see, or
            lacks a key or adapter that the sweep names.
    """
    commit = _commit(root)
    base = dict(_differences(root))
    here = yaml_file(root / "params.yaml")
    adapters = list(params.check(here).adapters)
    check_adapters([*spec.objectives, *(one.figure for one in spec.parsed_limits())], adapters)
    for key, choices in spec.space.items():
        _check_key(here, spec, key, choices)
    _check_files(root, here, spec)
    return Result(spec, commit, base, here, run)


def _check_key(here: dict[str, Any], spec: Spec, key: str, choices: Any) -> None:
    """Refuse an unknown key, and values that no candidate can have."""
    section = key.partition(".")[0]
    if section in ("run", "azure", "compute"):
        raise UserError(f"space.{key}: changes where and how a stage runs, and no result")
    with_it = [other for other in spec.space if other.partition(".")[0] == section]
    values = [choices.low, choices.high] if isinstance(choices, Range) else choices
    for value in values:
        try:
            overrides.preview(here, {key: value})
        except UserError as error:  # may go with another value of a key beside it
            if len(with_it) == 1 or "unknown parameter" in str(error):
                raise


def _check_files(root: Path, here: dict[str, Any], spec: Spec) -> None:
    """Refuse a file that params.yaml, or a value of the sweep, names and Git does not have."""
    sets: list[dict[str, Any]] = [{}]
    lists = [(key, choices) for key, choices in spec.space.items() if isinstance(choices, list)]
    sets += [{key: value} for key, values in lists for value in values if isinstance(value, str)]
    names: set[str] = set()
    for one in sets:
        with suppress(UserError):  # such a value was looked at before
            names |= set(_inputs(overrides.preview(here, one)))
    for path in sorted(names):
        if Path(os.path.normpath(path)).parts[:1] == ("..",):
            raise UserError(
                f"{path} is outside of the project, and candidates run in folders of their own: "
                "write the whole path, which every machine needs to have"
            )
        if not _is_kept(root, path):
            raise UserError(
                f"{path} is not in Git, so other machines do not have it: git add it, or dvc add "
                "and commit its .dvc file"
            )


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
    there = yaml_value(git(root, "show", "HEAD:./params.yaml"), "params.yaml at HEAD") or {}
    here = yaml_file(root / "params.yaml") or {}
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
    found.append(values.base.path)  # dvc.yaml has it for every source
    return [path for path in found if not Path(path).is_absolute()]


def _is_kept(root: Path, path: str) -> bool:
    """Whether Git or DVC has a file, or a folder that it is in, or a stage makes it."""
    whole = [path, *(str(parent) for parent in Path(path).parents if parent != Path())]
    return path.startswith("data/prepared/") or bool(
        git(root, "--literal-pathspecs", "ls-files", "--", path, *(f"{one}.dvc" for one in whole))
    )


def needs(root: Path, result: Result, changes: dict[str, Any]) -> Has:
    """What a machine must have to take a candidate.

    Raises:
        UserError: its values do not go together.
    """
    found = needs_of(root, overrides.preview(result.params, changes))
    own = result.spec.needs
    return Has(
        gpus=found.gpus if own.gpu is None else int(own.gpu),
        memory_gb=own.memory_gb or found.memory_gb,
        disk_gb=own.disk_gb or found.disk_gb,
    )
