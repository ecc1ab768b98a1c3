"""What made a file: command, inputs, parameters, versions, commit, run, when and how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.stage import LINEAGE, PACKAGE, read_json
from tasks import bridge


@dataclass(frozen=True)
class Origin:
    """How the outputs of a stage came to be."""

    stage: str
    command: str
    key: str | None
    params: dict[str, Any]
    inputs: dict[str, str]
    """Path to content hash (md5; of a folder, of its listing)."""
    outputs: dict[str, str]
    """Path to content hash."""
    upstream: list[str]
    """Stages that made inputs."""
    changed: list[str]
    """Files of the outputs that are missing, or are no longer what the stage made."""
    record: dict[str, Any]
    """Written by the stage: started, seconds, run_id, git_commit, git_dirty, platform, versions."""


def trace(root: Path, path: Path) -> list[Origin]:
    """The origin of `path` first, then of everything it was made from, nearest first.

    Raises:
        UserError: no stage made it.
    """
    origins = _origins(root)
    target = (Path.cwd() / path).resolve()
    if not target.is_relative_to(root.resolve()) or not target.exists():
        raise UserError(f"{path}: no such file in the project")
    name = target.relative_to(root.resolve()).as_posix()
    found = [o for o in origins.values() if any(_within(name, out) for out in o.outputs)]
    if not found:
        raise UserError(f"{path}: no stage made this; try an output, such as models/onnx")
    chain, todo = [], [found[0].stage]
    while todo:
        stage = todo.pop(0)
        if stage not in chain:
            chain.append(stage)
            todo += origins[stage].upstream
    return [origins[stage] for stage in chain]


def _origins(root: Path) -> dict[str, Origin]:
    """Every stage that has been run, by name."""
    origins: dict[str, Origin] = {}
    for made in bridge.made(root):
        inputs = {dep["path"]: dep.get("md5", "") for dep in made.entry.get("deps", [])}
        params = made.entry.get("params", {}).values()
        origins[made.stage] = Origin(
            stage=made.stage,
            command=made.entry["cmd"],
            key=made.key,
            params={key: value for values in params for key, value in values.items()},
            inputs=inputs,
            outputs={out["path"]: out.get("md5", "") for out in made.entry.get("outs", [])},
            upstream=[
                other.stage
                for other in reversed(origins.values())
                if any(_within(a, b) or _within(b, a) for a in inputs for b in other.outputs)
            ],
            changed=made.changed,
            record=_record(root, made.stage),
        )
    return origins


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _record(root: Path, stage: str) -> dict[str, Any]:
    """The stage's own record; empty when it is missing or was damaged by hand."""
    try:
        if stage == "package":  # it keeps its own record inside the package
            found = read_json(root / PACKAGE / "lineage.json")["package"]["record"]
        else:
            found = read_json(root / LINEAGE / f"{stage}.json")
    except (UserError, KeyError, TypeError):
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("versions", {}), dict)
    return found if whole else {}
