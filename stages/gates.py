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
        "max_quantized_perplexity_ratio": (
            quotient(metrics["text_perplexity"]["quantized"], metrics["text_perplexity"]["base"]),
            "quantize",
        ),
        "max_onnx_perplexity_ratio": (
            quotient(
                metrics["text_perplexity"]["onnx_off"], metrics["text_perplexity"]["quantized"]
            ),
            "export (lm_head, accuracy_level)",
        ),
        "max_adapter_perplexity_ratio": (
            quotient(
                figure(metrics, "onnx_on", "perplexity"), figure(metrics, "onnx_off", "perplexity")
            ),
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


def quotient(a: float | None, b: float | None) -> float | None:
    """a / b; None unless both were measured, nan unless both are finite."""
    if a is None or b is None:
        return None
    return a / b if math.isfinite(a) and math.isfinite(b) else math.nan
