"""The gates: figures that a model must reach, or the stage that measures them fails."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from stages.errors import UserError
from stages.params import Gates

# Which figure of the metrics a gate limits, or which over which; and where to look when it fails.
FIGURES: dict[str, tuple[list[str], str]] = {
    "max_quantized_perplexity_ratio": (
        ["text_perplexity.quantized", "text_perplexity.base"],
        "quantize",
    ),
    "max_onnx_perplexity_ratio": (
        ["text_perplexity.onnx_off", "text_perplexity.quantized"],
        "export (lm_head, accuracy_level)",
    ),
    "max_adapter_perplexity_ratio": (
        ["onnx_on.perplexity", "onnx_off.perplexity"],
        "finetune@{adapter}",
    ),
    "min_top1_agreement": (
        ["agreement.top1"],
        "export (lm_head, accuracy_level) or convert@{adapter}",
    ),
    "min_tokenizer_agreement": (
        ["agreement.tokenizer"],
        "tokenizer.json of the base model, which genai reads otherwise than transformers",
    ),
    "min_exact_answer_rate": (["onnx_on.exact_answer_rate"], "finetune@{adapter}"),
}
# Which stage checks them; publishing checks all.
OF_MEASURE = ["max_quantized_perplexity_ratio"]
OF_EVALUATE = [name for name in FIGURES if name not in OF_MEASURE]


@dataclass(frozen=True)
class Gate:
    """A limit of params.yaml beside what was measured."""

    name: str
    figure: float | None
    """None where it was not measured, nan where it is no finite number."""
    limit: float | None
    verdict: str
    """met, not met, not measured or off."""
    place: str
    """What to look at when it is not met."""


def judge(metrics: dict[str, Any], gates: Gates, adapter: str) -> list[Gate]:
    """Every gate with its figure and verdict, from an adapter's metrics.

    A figure that was not measured, or is no finite number, meets no gate.
    """
    found = []
    for name, (paths, place) in FIGURES.items():
        value, limit = _figure(metrics, paths), getattr(gates, name)
        least = name.startswith("min_")
        if limit is None:
            verdict = "off"
        elif value is None:
            verdict = "not measured"
        elif math.isfinite(value) and (value >= limit if least else value <= limit):
            verdict = "met"
        else:
            verdict = "not met"
        found.append(Gate(name, value, limit, verdict, place.format(adapter=adapter)))
    return found


def check_gates(
    metrics: dict[str, Any], gates: Gates, adapter: str = "", only: Collection[str] = FIGURES
) -> None:
    """Raise a UserError that names every gate of `only` that is not met, and where to look.

    `adapter` may be left out with OF_MEASURE, whose metrics are of no adapter.
    """
    failed = []
    for gate in judge(metrics, gates, adapter):
        if gate.name not in only:
            continue
        if gate.verdict == "not measured":
            failed.append(
                f"gates.{gate.name}: not measured: {metrics['not_measured']}; run evaluate where "
                "it does, or set the gate to null"
            )
        elif gate.verdict == "not met" and gate.figure is not None:
            shown = f"{gate.figure:.4f}" if math.isfinite(gate.figure) else "no finite number"
            side = "least" if gate.name.startswith("min_") else "most"
            failed.append(
                f"gates.{gate.name}: {shown}, and at {side} {gate.limit} is wanted; "
                f"look at {gate.place}"
            )
    if failed:
        raise UserError("\n".join(failed))


def _figure(metrics: dict[str, Any], paths: list[str]) -> float | None:
    """The one figure, or the first over the second; nan unless all are finite."""
    values = [_value(metrics, *path.split(".")) for path in paths]
    if any(value is None for value in values):
        return None
    if not all(map(math.isfinite, values)):  # over an infinite one the ratio would be 0
        return math.nan
    return values[0] / values[1] if len(values) == 2 else values[0]


def _value(metrics: dict[str, Any], part: str, key: str) -> Any:
    """A number; in a file, null stands for one that is not finite, or was not measured."""
    value = (metrics.get(part) or {}).get(key)
    if value is not None:
        return value
    missing = metrics.get(part) is None or metrics.get("not_measured")
    return None if missing else math.nan
