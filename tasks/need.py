"""What DVC would do with a stage, and why, in words. A part of `tasks.bridge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.stage import PipelineStage
from dvc.stage.serialize import to_single_stage_lockfile

from stages.errors import UserError
from stages.stage import TOOLCHAIN, read_json, versions

Action = Literal["unchanged", "restore", "run"]


@dataclass(frozen=True)
class Need:
    """What DVC would do with a stage, and why, in words."""

    action: Action
    reasons: list[str]


@dataclass(frozen=True)
class Inputs:
    """What a stage reads."""

    made: list[str]
    """DVC's names of what makes them: `quantize`, `data/rows.jsonl.dvc`."""
    files: list[str]
    """Paths that DVC does not keep."""


def inputs_of(stage: PipelineStage) -> Inputs:
    """What a stage reads, by who keeps it."""
    above = list(stage.repo.index.graph.successors(stage))
    made = [Path(out.fs_path) for up in above for out in up.outs]
    files = [
        dep.def_path
        for dep in stage.deps
        if not isinstance(dep, ParamsDependency)
        and not any(_overlap(Path(dep.fs_path), out) for out in made)
    ]
    return Inputs([up.addressing for up in above], files)


def check_files(stage: PipelineStage) -> None:
    """Check that what a stage reads, and no stage makes, is there.

    Raises:
        UserError: it is not; with the parameters that name it.
    """
    params = [dep.read_params() for dep in stage.deps if isinstance(dep, ParamsDependency)]
    for name in inputs_of(stage).files:
        if not (Path(stage.repo.root_dir) / name).exists():
            keys = [key for tree in params for key in _keys_of(name, tree)]
            raise UserError(": ".join([*keys[:1], name, "not found"]))


def _keys_of(value: str, tree: dict[str, Any], above: str = "") -> list[str]:
    """Dotted names of the parameters that have this value."""
    found = []
    for key, one in tree.items():
        if isinstance(one, dict):
            found += _keys_of(value, one, f"{above}{key}.")
        elif one == value:
            found.append(f"{above}{key}")
    return found


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def need_of(stage: PipelineStage) -> Need:
    """What a stage needs now; those it depends on must be done."""
    if outdated(stage):
        return Need("run", ["installed libraries changed"])
    reasons = _reasons(stage)
    if not reasons:
        return Need("unchanged", [])
    return Need("restore" if _restorable(stage) else "run", reasons)


def unchanged(stage: PipelineStage) -> bool:
    """Whether a stage needs nothing; as `need_of`, but the stage is left as it was read."""
    return not outdated(stage) and not _reasons(stage)


def outdated(stage: PipelineStage) -> bool:
    """Whether the toolchain stage recorded other versions than those installed."""
    path = Path(stage.repo.root_dir) / TOOLCHAIN
    return stage.name == "toolchain" and path.exists() and read_json(path) != versions()


def _reasons(stage: PipelineStage) -> list[str]:
    """Why a stage is not up to date, in words; empty when it is."""
    if not any(out.hash_info for out in stage.outs):
        return ["never run"]
    reasons = inputs_changed(stage)
    for out in stage.outs:
        reasons += [f"{path} {_OUT_WORDS.get(w, w)}" for path, w in out.status().items()]
    return reasons


def inputs_changed(stage: PipelineStage) -> list[str]:
    """What a stage that was run would now make something else from, in words."""
    reasons = ["command or outputs changed"] if stage.changed_stage() else []
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            reasons += _param_reasons(dep)
        else:
            reasons += [f"{path} {word}" for path, word in dep.status().items()]
    return reasons


_OUT_WORDS = {"deleted": "missing", "modified": "was changed since", "not in cache": "not cached"}


def _param_reasons(dep: ParamsDependency) -> list[str]:
    before: dict[str, Any] = dep.hash_info.value or {}
    now = dep.read_params()
    return [
        f"params {key} {_shown(before.get(key))} → {_shown(now.get(key))}"
        for key in dep.params
        if before.get(key) != now.get(key)
    ]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _restorable(stage: PipelineStage) -> bool:
    """Whether DVC's cache holds this stage's outputs for what its inputs are now."""
    store = stage.repo.stage_cache
    try:
        if not stage.changed_stage() and stage.deps_cached():
            entry = to_single_stage_lockfile(stage)
        else:
            stage.save_deps()
            entry = store._load(stage)
        return bool(entry) and store._create_stage(entry, wdir=stage.wdir).outs_cached()
    except DvcException:  # an input is missing
        return False
