"""Measure what quantizing costs, on text that the base model knows, and check that gate.

Once for each quantization, before any adapter is there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.gates import OF_MEASURE, check_gates
from stages.params import Evaluate, Params
from stages.rows import read_halves
from stages.stage import (
    BASE,
    METRICS,
    QUANTIZED,
    TORCH_MB,
    new_output,
    progress,
    read_json,
    run,
    write_json,
)
from stages.tokenizer import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.scoring import Example

# In a folder, where no adapter's metrics/NAME.json can be.
MEASURED = METRICS / "quantized" / "text.json"


def main(params: Params) -> None:
    """Write metrics/quantized/text.json, then check params.gates.max_quantized_perplexity_ratio.

    It holds `text_perplexity` and `size_mb` of `base` and `quantized`: perplexity as in
    stages/scoring.py, on params.evaluate.text; sizes as in `size_mb`. A number that is not finite
    is null.

    Raises:
        UserError: the text is too short, or the gate is not met; then the figures are written all
            the same.
    """

    text = known_text(params.evaluate, load(BASE))
    models = {"base": BASE, "quantized": QUANTIZED}
    known: dict[str, float] = {}
    for done, (name, folder) in enumerate(models.items(), start=1):
        known[name] = perplexity(folder, text)
        progress(done, len(models), f"{name} model scored")
    sizes = {name: size_mb(folder) for name, folder in models.items()}
    figures = {"text_perplexity": known, "size_mb": sizes}
    with new_output(MEASURED) as out:
        write_json(out, finite(figures))
    print(f"{'':16}{'on known text':>15}{'size':>12}")
    for name in models:
        print(f"{name:16}{known[name]:15.3f}{sizes[name]:9.1f} MB")
    check_gates(figures, params.gates, only=OF_MEASURE)


def known_text(params: Evaluate, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """What is scored of params.text: windows of 512 tokens, or of as many as the model takes.

    Raises:
        UserError: no text in it has two tokens.
    """
    from stages.scoring import excerpts

    length = min(512, read_json(BASE / "config.json").get("max_position_embeddings", 512))
    texts = read_halves(Path(params.text), tokenizer)
    if found := excerpts(tokenizer, texts, params.text_tokens, length):
        return found
    raise UserError(f"{params.text}: no text of two tokens or more; see evaluate.text")


def perplexity(folder: Path, text: list[Example]) -> float:
    """Of the model in `folder`, which is in memory only meanwhile."""
    from passes.lora import load_adapted
    from stages.scoring import score, torch_logits

    return score(text, torch_logits(load_adapted(folder, None), text))["perplexity"]


def size_mb(path: Path) -> float:
    """Of a file, or of all files in a folder, in MB of 10^6 bytes."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return round(sum(p.stat().st_size for p in files) / 1e6, 3)


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    run(main, "measure", TORCH_MB)
