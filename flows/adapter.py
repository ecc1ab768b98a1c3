"""What a report says of one adapter: figures, pictures, answers and gates."""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import pictures
from flows.pictures import About, Picture, finite
from stages.card import shown
from stages.errors import UserError
from stages.gates import Gate, judge
from stages.params import Gates
from stages.reading import Missing
from stages.stage import METRICS, PLOTS, read_json

# Key in the metrics, label, whose size, taught or not.
MODELS = [
    ("base", "base", ["base"], False),
    ("quantized", "quantized", ["quantized"], False),
    ("quantized_lora", "quantized + LoRA", [], True),
    ("onnx_off", "ONNX off", ["onnx"], False),
    ("onnx_on", "ONNX on", ["onnx", "adapter"], True),
]
ON_TEXT = ("base", "quantized", "onnx_off")  # a taught model is not measured on the base's text


@dataclass(frozen=True)
class Section:
    """What the page says of one adapter."""

    name: str
    metrics: dict[str, Any]
    table: list[tuple[str, list[str], bool]]
    """Label, cells and whether the model is taught."""
    pictures: list[Picture]
    answers: list[dict[str, Any]]
    gates: list[Gate]

    @property
    def verdict(self) -> str:
        """All gates in a few words."""
        if not self.metrics:
            return "not evaluated"
        missed = [gate for gate in self.gates if gate.verdict in ("not met", "not measured")]
        if missed:
            return f"{len(missed)} of {len(self.gates)} gates not met"
        return "all gates met" if any(g.verdict == "met" for g in self.gates) else "no gates set"


def section(root: Path, name: str, limits: Gates) -> Section:
    metrics = _json(root / METRICS / f"{name}.json")
    found = [
        perplexities(name, metrics),
        size_against_perplexity(name, metrics),
        loss(root, name),
        speeds(name, metrics),
    ]
    return Section(
        name,
        metrics,
        [(label, cells(metrics, key, sizes), taught) for key, label, sizes, taught in MODELS],
        [picture for picture in found if picture],
        [compared(answer) for answer in metrics.get("answers") or []],
        judge(metrics, limits, name) if metrics else [],
    )


def cells(metrics: dict[str, Any], model: str, sizes: list[str]) -> list[str]:
    """Perplexity on the rows, exact answers, perplexity on the base's text, MB."""
    text = metrics.get("text_perplexity") or {}
    known = shown(text if text.get(model) is not None else None, model, ".3f")
    figures = metrics.get(model)
    size = _size(metrics, sizes)
    return [
        shown(figures, "perplexity", ",.3f"),
        shown(figures, "exact_answer_rate", ".1%"),
        known if model in ON_TEXT else "",
        f"{size:,.1f}" if size is not None else "not measured" if sizes else "",
    ]


def _size(metrics: dict[str, Any], parts: list[str]) -> float | None:
    """Sum of the parts' sizes in MB."""
    found = [(metrics.get("size_mb") or {}).get(part) for part in parts]
    sizes = [size for size in found if finite(size)]
    return sum(sizes) if sizes and len(sizes) == len(found) else None


def compared(answer: dict[str, Any]) -> dict[str, Any]:
    """Answers as (word, differs) pairs: the quantized one against the base's, the taught one
    against the expected one; None where it was not measured."""
    base, expected = answer.get("base"), answer.get("expected")
    return {
        "prompt": answer.get("prompt", ""),
        "expected": expected,
        "base": words(base, base),
        "quantized": words(answer.get("onnx_off"), base),
        "taught": words(answer.get("onnx_on"), expected),
        "same_as_base": base is not None and answer.get("onnx_off") == base,
        "as_expected": expected is not None and answer.get("onnx_on") == expected,
    }


def words(text: str | None, other: str | None) -> list[tuple[str, bool]] | None:
    """Words and spaces of `text`, and whether `other` lacks the word in its place."""
    if text is None:
        return None
    pieces = re.findall(r"\s+|\S+", text)
    places = [i for i, piece in enumerate(pieces) if piece.strip()]
    matcher = difflib.SequenceMatcher(
        None, [pieces[i] for i in places], (other or "").split(), autojunk=False
    )
    same = {
        places[i]
        for block in matcher.get_matching_blocks()
        for i in range(block.a, block.a + block.size)
    }
    return [(piece, i in places and i not in same) for i, piece in enumerate(pieces)]


def _scored(metrics: dict[str, Any]) -> list[tuple[str, list[str], float, bool]]:
    """Label, whose size, perplexity, and whether it is taught, of every model that has one."""
    return [
        (label, sizes, figures["perplexity"], taught)
        for key, label, sizes, taught in MODELS
        if (figures := metrics.get(key)) and finite(figures["perplexity"])
    ]


def perplexities(adapter: str, metrics: dict[str, Any]) -> Picture | None:
    points = [(label, value, taught) for label, _, value, taught in _scored(metrics)]
    about = About(
        f"perplexity-{adapter}",
        f"Perplexity on {adapter}, by stage",
        "On rows that were kept from training: the loss, and beside it the perplexity. "
        "Less is better.",
    )
    return pictures.bars(about, points) if points else None


def size_against_perplexity(adapter: str, metrics: dict[str, Any]) -> Picture | None:
    points = [
        (label, size, value, taught)
        for label, sizes, value, taught in _scored(metrics)
        if (size := _size(metrics, sizes)) is not None
    ]
    about = About(
        f"size-{adapter}",
        f"Size against perplexity on {adapter}",
        "Left and low is better; beside each model its perplexity. ONNX on is the exported model "
        "with the adapter's file.",
    )
    return pictures.sizes(about, points) if points else None


def loss(root: Path, adapter: str) -> Picture | None:
    points = _columns(root / PLOTS / "loss" / f"{adapter}.csv", "step", "loss")
    about = About(
        f"loss-{adapter}",
        f"Loss of finetune@{adapter}",
        "Of each batch while the adapter was taught, in nats a token. The figure is the last.",
    )
    return pictures.line(about, points, ("step", "loss"), True) if points else None


SPEEDS = {
    "tokens_per_second": "tokens/s, more is better",
    "time_to_first_token_ms": "ms to the first token, less is better",
}


def speeds(adapter: str, metrics: dict[str, Any]) -> Picture | None:
    speed = metrics.get("speed") or {}
    models = {"adapter off": speed.get("adapter_off"), "adapter on": speed.get("adapter_on")}
    parts = []
    for key, quantity in SPEEDS.items():
        points = [
            (label, figures[key], label == "adapter on")
            for label, figures in models.items()
            if figures and finite(figures.get(key))
        ]
        if points:
            parts.append((quantity, points))
    about = About(
        f"speed-{adapter}",
        f"Speed with and without {adapter}",
        "Of onnxruntime-genai on the machine that ran evaluate, in a process of its own.",
    )
    return pictures.speed(about, parts) if parts else None


def base_pictures(root: Path, sections: list[Section]) -> list[Picture]:
    """Of the base model and its quantizer, which all adapters share."""
    found = []
    texts = [part.metrics.get("text_perplexity") or {} for part in sections]
    known: dict[str, Any] = next(filter(None, texts), {})
    points = [
        (label, known[key], taught) for key, label, _, taught in MODELS if finite(known.get(key))
    ]
    if points:
        caption = "On text that the base model knows: what quantizing and exporting cost."
        about = About("text", "Perplexity on the base's own text", caption)
        found.append(pictures.bars(about, points))
    layers = _columns(root / PLOTS / "quantize.csv", "layer", "error")
    if layers:
        caption = "Relative error of the hidden states after each layer, quantized against base."
        about = About("layers", "Error of the quantizer, layer by layer", caption)
        found.append(pictures.line(about, layers, ("layer", "relative error")))
    return found


def _json(path: Path) -> dict[str, Any]:
    """What the file holds; empty when it is not there."""
    try:
        return read_json(path)
    except Missing:
        return {}
    except UserError as error:
        raise UserError(f"{error}; `olivepress run` restores it") from None


def _columns(path: Path, x: str, y: str) -> list[tuple[float, float]]:
    """Two columns of a CSV, rows that are not finite left out; empty when it is not there."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            pairs = [(float(row[x]), float(row[y])) for row in csv.DictReader(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    return [pair for pair in pairs if all(map(finite, pair))]


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not as its stage wrote it ({error}); `olivepress run` restores it")
