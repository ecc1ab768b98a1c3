"""sweep.yaml: what is varied, what is wanted, and what rules a candidate out."""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from stages.errors import UserError
from stages.params import Section
from stages.reading import Missing, yaml_file
from tasks.sweep.figures import Limit, check_name

MOST = 10_000  # candidates
LARGEST = 2**53
SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 wants a point in it
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Range(Section):
    """Numbers from `low` to `high`, both included. Whole ones when both, and `step`, are whole."""

    low: int | float
    high: int | float
    step: int | float | None = None
    """Between neighbours; needed by `grid`, unless the numbers are whole."""
    log: bool = False
    """Whether the logarithm is spread evenly, for learning rates and the like."""

    @property
    def whole(self) -> bool:
        return all(isinstance(one, int) for one in (self.low, self.high, self.step or 1))

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if max(abs(self.low), abs(self.high), self.step or 0) > LARGEST:
            raise ValueError(f"numbers beyond {LARGEST:,} are no longer one apart as floats")
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        if self.log and (self.low <= 0 or self.step):
            raise ValueError("log goes with low above 0 and without step")
        if self.step is not None and self.step <= 0:
            raise ValueError("step must be above 0")
        return self

    def values(self) -> list[int | float]:
        """All of them, for a grid; ValueError when they are more than a grid may have."""
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            raise ValueError("a grid needs a list, or a range with a step")
        steps = (self.high - self.low) / step  # infinite for a step that is nearly nothing
        if steps >= MOST:
            raise ValueError(f"more than {MOST:,} values; sample some")
        count = math.floor(steps + 1e-9) + 1
        return [round(self.low + number * step, 12) for number in range(count)]


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "range"


Choices = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]


class Needs(Section):
    """What a machine must have to take a candidate; null is what olivepress doctor estimates."""

    gpu: bool | None = None
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    disk_gb: Annotated[float, Field(gt=0)] | None = None


class Spec(Section):
    """A sweep, as sweep.yaml says it."""

    name: Annotated[str, Field(pattern=NAME)] = "sweep"
    """Of its folder, its DVC experiments and its runs."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """Which candidates: all combinations; any; or where earlier ones did well (Optuna's TPE)."""
    trials: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """How many candidates, for `random` and `tpe`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampler."""
    parallel: Annotated[int, Field(ge=1)] | None = None
    """Candidates waiting or running at once; null is all of them, or 4 for `tpe`."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Times that a candidate is begun again after its machine was lost."""
    space: Annotated[dict[str, Choices], Field(min_length=1)]
    """Dotted keys of params.yaml, each with a list or a range."""
    objectives: Annotated[dict[str, Literal["minimize", "maximize"]], Field(min_length=1)]
    """Figures that are wanted small or large, the first being the one that ranks."""
    limits: list[str] = Field(default_factory=list)
    """Conditions on figures, such as `size_mb <= 2500`; who breaks one is stopped."""
    needs: Needs = Needs()

    @field_validator("name")
    @classmethod
    def _fits_git(cls, value: str) -> str:
        if ".." in value or value.endswith("."):
            raise ValueError("name: Git takes no .. in a name, and no . at its end")
        return value

    @field_validator("objectives")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            check_name(name)
        return value

    @field_validator("limits")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        for text in value:
            Limit.parse(text)
        return value

    @field_validator("space")
    @classmethod
    def _not_empty(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, choices in value.items():
            if choices == []:
                raise ValueError(f"space.{key}: an empty list leaves nothing to choose")
            if isinstance(choices, list) and len(set(map(repr, choices))) < len(choices):
                raise ValueError(f"space.{key}: a value is there twice")
            if isinstance(choices, list) and any(isinstance(one, dict) for one in choices):
                raise ValueError(f"space.{key}: single values are wanted, not mappings")
        return value

    @model_validator(mode="after")
    def _fits_sampler(self) -> Spec:
        if self.sampler != "grid" and self.trials is None:
            raise ValueError(f"sampler {self.sampler} needs trials, the number of candidates")
        if self.sampler == "grid":
            if self.trials is not None:
                raise ValueError("sampler grid takes all combinations: trials does not go with it")
            count = math.prod(len(self.choices(key)) for key in self.space)
            if count > MOST:
                raise ValueError(f"a grid of {count:,} candidates; at most {MOST:,}: sample some")
        return self

    def choices(self, key: str) -> list[Any]:
        """The values of one key, for a grid."""
        found = self.space[key]
        try:
            return found if isinstance(found, list) else found.values()
        except ValueError as error:
            raise ValueError(f"space.{key}: {error}") from None

    def grid(self) -> list[dict[str, Any]]:
        """All combinations, the last key changing first."""
        keys = list(self.space)
        return [dict(zip(keys, one, strict=True)) for one in product(*map(self.choices, keys))]

    @property
    def size(self) -> int:
        """Number of candidates."""
        return self.trials or math.prod(len(self.choices(key)) for key in self.space)

    def parsed_limits(self) -> list[Limit]:
        return [Limit.parse(text) for text in self.limits]


def load(path: Path) -> Spec:
    """Read a sweep.yaml.

    Raises:
        UserError: it is not there, no YAML, or not valid; one line for each mistake.
    """
    try:
        values = yaml_file(path)
    except Missing:
        raise UserError(f"{path} is not there: docs/sweeps.md has one to begin with") from None
    return check(values, str(path))


def check(values: Any, where: str) -> Spec:
    """The same, validated.

    Raises:
        UserError: not valid; one line for each mistake, with `where`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: keys are wanted: space, objectives, limits, …")
    try:
        return Spec.model_validate(_plain(values))
    except ValidationError as error:
        # What is no number is told twice: it is no `int`, and it is no `float`.
        found = [one for one in error.errors() if "int" not in one["loc"][3:]]
        raise UserError("\n".join(f"{where}: {_line(one)}" for one in found)) from None


def _line(error: Any) -> str:
    """One mistake: where, and what is wanted."""
    parts = [str(part) for part in error["loc"] if part not in ("list", "range", "float")]
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "extra_forbidden":
        return f"{'.'.join(parts)}: unknown key"
    if error["type"] == "value_error" and len(parts) < 2:  # those of ranges do not say which
        return message
    if error["type"] == "model_type":
        return f"{'.'.join(parts)}: a list, or a range with low and high"
    return f"{'.'.join(parts)}: {message}"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """1e-4, which YAML 1.1 reads as text, as the number that it is, in ranges and lists."""
    space = values.get("space")
    if not isinstance(space, dict):
        return values
    return values | {"space": {key: _numbers(value) for key, value in space.items()}}


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, str) and SCIENTIFIC.fullmatch(value):
        return float(value)
    return value
