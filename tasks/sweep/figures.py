"""The figures that a sweep compares, where each comes from, and limits on them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError
from stages.measure import size_mb
from stages.stage import METRICS, ONNX, QUANTIZED, read_json

TEXT = METRICS / "quantized/text.json"
CONDITION = re.compile(r"\s*([\w.@-]+)\s*(<=|>=|≤|≥)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Figure:
    """Where a figure comes from.

    Args:
        stage: it is known when this one has ended; for several adapters, this one of each.
        worst: of several adapters, the one that counts: `max` or `min`.
        paths: in metrics/NAME.json, dotted; of two, the first over the second.
    """

    stage: str
    worst: str
    paths: tuple[str, ...] = ()


# Sizes in MB of 10^6 bytes, times in ms.
FIGURES = {
    "quantized_size_mb": Figure("quantize", "max"),
    "size_mb": Figure("export", "max"),
    "perplexity_ratio": Figure("measure", "max"),
    "perplexity": Figure("evaluate", "max", ("onnx_on.perplexity",)),
    "onnx_perplexity_ratio": Figure(
        "evaluate", "max", ("text_perplexity.onnx_off", "text_perplexity.quantized")
    ),
    "exact_answer_rate": Figure("evaluate", "min", ("onnx_on.exact_answer_rate",)),
    "top1_agreement": Figure("evaluate", "min", ("agreement.top1",)),
    "tokens_per_second": Figure("evaluate", "min", ("speed.adapter_on.tokens_per_second",)),
    "time_to_first_token_ms": Figure(
        "evaluate", "max", ("speed.adapter_on.time_to_first_token_ms",)
    ),
    "peak_rss_mb": Figure("evaluate", "max", ("speed.peak_rss_mb",)),
    "adapter_size_mb": Figure("evaluate", "max", ("size_mb.adapter",)),
}


def check_name(name: str) -> None:
    """Raise a ValueError for a name that is no figure, with the nearest one.

    Beside those of `FIGURES` stand `ADAPTER.KEY.KEY`, any number of metrics/ADAPTER.json.
    """
    if name not in FIGURES and name.count(".") == 0:
        near = difflib.get_close_matches(name, FIGURES, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(FIGURES)}"
        raise ValueError(f"{name}: no such figure; {hint}")


def stage_of(name: str) -> str:
    """The stage, or group of stages, after which a figure is known."""
    return FIGURES[name].stage if name in FIGURES else "evaluate"


@dataclass(frozen=True)
class Limit:
    """A condition on a figure, such as `size_mb <= 2500`."""

    figure: str
    at_most: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Raise a ValueError for what is no condition."""
        match = CONDITION.fullmatch(text)
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if not match or not math.isfinite(bound):
            raise ValueError(f"{text!r}: write it as FIGURE <= NUMBER or FIGURE >= NUMBER")
        check_name(match[1])
        return cls(match[1], match[2] in ("<=", "≤"), bound)

    def excess(self, value: float) -> float:
        """How far a value is beyond it; 0 or less when it is met."""
        return value - self.bound if self.at_most else self.bound - value

    def __str__(self) -> str:
        return f"{self.figure} {'≤' if self.at_most else '≥'} {self.bound:g}"


def broken(
    limits: list[Limit], figures: Mapping[str, float | None], at_end: bool = False
) -> list[str]:
    """What limits are not met, in words.

    A figure that is not there breaks none, as it may come; unless all stages have ended.
    """
    found = []
    for limit in limits:
        value = figures.get(limit.figure)
        if value is None and at_end:
            found.append(f"{limit.figure} was not measured")
        if value is not None and not limit.excess(value) <= 0:  # nan meets none
            found.append(f"{limit.figure} is {value:.4g}, wanted {str(limit).split(' ', 1)[1]}")
    return found


def read(root: Path, done: set[str], adapters: list[str]) -> dict[str, float | None]:
    """The figures that are known.

    Args:
        root: the folder that the stages work in.
        done: the stages that have ended; files of others are of some earlier time.
        adapters: the names in params.yaml.

    Returns:
        Numbers by name; nan for one that is no finite number, None for one that could not be
        measured, such as the speed of a model for another machine.
    """
    found: dict[str, float | None] = {}
    if "quantize" in done:
        found["quantized_size_mb"] = size_mb(root / QUANTIZED)
    if "export" in done:
        found["size_mb"] = size_mb(root / ONNX)
    if "measure" in done:
        text = read_json(root / TEXT)["text_perplexity"]
        found["perplexity_ratio"] = _ratio([text["quantized"], text["base"]])
    metrics = {
        name: read_json(root / METRICS / f"{name}.json")
        for name in adapters
        if f"evaluate@{name}" in done
    }
    if len(metrics) < len(adapters) or not adapters:
        return found
    for name, figure in FIGURES.items():
        if figure.paths:
            found[name] = _worst(figure, list(metrics.values()))
    return found | {
        f"{adapter}.{path}": value
        for adapter, values in metrics.items()
        for path, value in _numbers(values)
    }


def _worst(figure: Figure, metrics: list[dict[str, Any]]) -> float | None:
    """Of several adapters; None if one was not measured, nan if one is no finite number."""
    values = []
    for values_of_one in metrics:
        parts = [path.split(".") for path in figure.paths]
        if any(values_of_one.get(part[0]) is None for part in parts):
            return None
        values.append(_ratio([_at(values_of_one, part) for part in parts]))
    if any(map(math.isnan, values)):
        return math.nan
    return max(values) if figure.worst == "max" else min(values)


def _at(values: Any, path: list[str]) -> Any:
    for key in path:
        values = (values or {}).get(key)
    return values


def _ratio(values: list[float | None]) -> float:
    """The one, or the first over the second; in the files null is what is not finite."""
    if any(value is None for value in values):
        return math.nan
    first, *second = (float(value) for value in values if value is not None)
    return first / second[0] if second else first


def _numbers(values: Any, prefix: str = "") -> list[tuple[str, float]]:
    if isinstance(values, dict):
        parts = [_numbers(value, f"{prefix}.{key}") for key, value in values.items()]
        return [pair for part in parts for pair in part]
    if isinstance(values, int | float) and not isinstance(values, bool):
        return [(prefix.lstrip("."), float(values))]
    if values is None and prefix.count(".") > 1:  # a whole part is null when it was not measured
        return [(prefix.lstrip("."), math.nan)]
    return []


def need_first(limits: list[Limit]) -> set[str]:
    """The stages that `finetune` should wait for, as a limit is on what they give."""
    return {stage_of(limit.figure) for limit in limits} - {"evaluate"}


def check_adapters(names: list[str], adapters: list[str]) -> None:
    """Raise a UserError for `NAME.path` figures of an adapter that is not in params.yaml."""
    for name in names:
        adapter = name.partition(".")[0]
        if name not in FIGURES and adapter not in adapters:
            raise UserError(f"{name}: params.yaml has no adapter {adapter}")
