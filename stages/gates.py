"""The gates: least figures that a model must reach, or `evaluate` fails."""

from __future__ import annotations

import math

from stages.errors import UserError
from stages.params import Gates


def check_gates(metrics: dict, gates: Gates, adapter: str) -> None:
    """Raise a UserError that names every gate that is not met, and the stage to look at.

    A figure that was not measured, or is no finite number, meets no gate.
    """
    checks = {
        "max_quantized_perplexity_ratio": (ratio(metrics, "quantized", "base"), "quantize"),
        "max_adapter_perplexity_ratio": (
            ratio(metrics, "onnx_on", "onnx_off"),
            f"finetune@{adapter}",
        ),
        "min_top1_agreement": (
            figure(metrics, "agreement", "top1"),
            f"export (lm_head, accuracy_level) or convert@{adapter}",
        ),
        "min_tokenizer_agreement": (
            figure(metrics, "agreement", "tokenizer"),
            "tokenizer.json of the base model, which genai reads otherwise than transformers",
        ),
        "min_exact_answer_rate": (
            figure(metrics, "onnx_on", "exact_answer_rate"),
            f"finetune@{adapter}",
        ),
    }
    failed = []
    for name, (value, place) in checks.items():
        limit = getattr(gates, name)
        if limit is None:
            continue
        least = name.startswith("min_")
        if value is None:
            failed.append(
                f"gates.{name}: not measured: {metrics['not_measured']}; run evaluate where it "
                "does, or set the gate to null"
            )
        elif not math.isfinite(value) or (value < limit if least else value > limit):
            shown = f"{value:.4f}" if math.isfinite(value) else "no finite number"
            failed.append(
                f"gates.{name}: {shown}, and at {'least' if least else 'most'} {limit} is "
                f"wanted; look at {place}"
            )
    if failed:
        raise UserError("\n".join(failed))


def figure(metrics: dict, part: str, name: str) -> float | None:
    """One figure, or None where its part was not measured."""
    return None if metrics[part] is None else metrics[part][name]


def ratio(metrics: dict, one: str, other: str) -> float | None:
    """One model's perplexity over another's; nan unless both are finite."""
    a, b = figure(metrics, one, "perplexity"), figure(metrics, other, "perplexity")
    if a is None or b is None:
        return None
    return a / b if math.isfinite(a) and math.isfinite(b) else math.nan
