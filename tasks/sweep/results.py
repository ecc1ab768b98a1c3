"""What a sweep found: its candidates, which of them are best, and its files."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.stage import new_output, read_json, write_json
from tasks.sweep.spec import NAME, Spec

FOLDER = Path("sweeps")  # sweeps/NAME/result.json and its pictures
WAITING, RUNNING, MET, OVER, FAILED = "waiting", "running", "met", "over a limit", "failed"


@dataclass
class Candidate:
    """One set of parameters and what came of it."""

    number: int
    overrides: dict[str, Any]
    """Values of the space, by dotted key of params.yaml."""
    state: str = WAITING
    """waiting, running, met (all limits), over a limit, or failed."""
    message: str = ""
    figures: dict[str, float | None] = field(default_factory=dict)
    """By the names of tasks/sweep/figures.py; null for what is no finite number."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """What was done with each: stage, state, reason, seconds, key."""
    machine: str | None = None
    run: str | None = None
    """Flow run id of the last try."""
    tries: int = 0
    seconds: float = 0.0
    """From when it was handed in to its end, waiting included."""
    experiment: str | None = None
    """Its name in `dvc exp show`."""

    @property
    def ended(self) -> bool:
        return self.state not in (WAITING, RUNNING)


@dataclass
class Result:
    """A sweep and its candidates."""

    spec: Spec
    commit: str
    base: dict[str, Any]
    """Parameters of params.yaml that differed from the commit's, which all candidates share."""
    params: dict[str, Any]
    """params.yaml as it was."""
    run: str
    """Flow run id of the sweep."""
    candidates: list[Candidate] = field(default_factory=list)

    def best(self) -> Candidate | None:
        """Of those that meet all limits, the first by the objectives in their order."""
        fit = [one for one in self.candidates if one.state == MET and self.losses(one)]
        return min(fit, key=lambda one: (self.losses(one), one.number), default=None)

    def losses(self, one: Candidate) -> tuple[float, ...] | None:
        """The objectives, each so that less is better; None if one is missing."""
        found = []
        for name, direction in self.spec.objectives.items():
            value = one.figures.get(name)
            if value is None:
                return None
            found.append(value if direction == "minimize" else -value)
        return tuple(found)

    def front(self) -> list[Candidate]:
        """Those that meet all limits and that no other of them beats in every objective."""
        fit = {one.number: self.losses(one) for one in self.candidates if one.state == MET}
        known = {number: losses for number, losses in fit.items() if losses is not None}
        front = {
            number
            for number, mine in known.items()
            if not any(dominates(other, mine) for other in known.values())
        }
        return [one for one in self.candidates if one.number in front]

    def executed(self) -> dict[str, int]:
        """How often each stage was computed, on all machines; what was restored is not counted."""
        counts: dict[str, int] = {}
        for one in self.candidates:
            for row in one.stages:
                counts[row["stage"]] = counts.get(row["stage"], 0) + (row["state"] == "Completed")
        return counts

    def as_json(self) -> dict[str, Any]:
        best = self.best()
        return {
            "name": self.spec.name,
            "commit": self.commit,
            "base": self.base,
            "run": self.run,
            "spec": self.spec.model_dump(mode="json"),
            "candidates": [asdict(one) for one in self.candidates],
            "best": best.number if best else None,
            "front": [one.number for one in self.front()],
            "executed": self.executed(),
        }


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether one is nowhere worse than the other and somewhere better."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def write(root: Path, result: Result) -> Path:
    """Write sweeps/NAME/result.json; return its folder."""
    folder = root / FOLDER / result.spec.name
    folder.mkdir(parents=True, exist_ok=True)
    with new_output(folder / "result.json") as path:
        write_json(path, result.as_json())
    return folder


def kept(root: Path, name: str, number: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sweep's result.json, and one of its candidates; the best one if no number is given.

    Raises:
        UserError: no such sweep or candidate, or none within the limits.
    """
    path = root / FOLDER / name / "result.json"
    if not re.fullmatch(NAME, name) or not path.exists():
        there = sorted(p.parent.name for p in (root / FOLDER).glob("*/result.json"))
        known = f"; there is {', '.join(there)}" if there else ""
        wanted = f"{FOLDER}/{name}/result.json"
        raise UserError(f"{wanted} is not there: olivepress sweep writes it{known}")
    result = read_json(path)
    number = result["best"] if number is None else number
    if number is None:
        raise UserError(f"sweep {name}: no candidate meets all limits; name one by its number")
    for one in result["candidates"]:
        if one["number"] == number:
            return result, one
    raise UserError(f"sweep {name}: no candidate {number}; it has {len(result['candidates'])}")
