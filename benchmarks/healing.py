"""Whether training heals what quantizing loses: the same steps before it, after it, and in float.

    olivepress run && python benchmarks/quality.py healing

Reads models/base and data/prepared of the project in the working directory; writes nothing there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quantizers import machine
from transformers import AutoTokenizer

from passes.lora import load_adapted
from stages import params as parameters
from stages.evaluate import choose
from stages.finetune import finetune
from stages.quantize import quantize
from stages.rows import read_halves
from stages.scoring import encode, excerpts, score, torch_logits
from stages.stage import BASE, PREPARED

QUANTIZERS = [("rtn", 4, 128), ("awq", 4, 128), ("best", 4, 128), ("awq", 4, 32), ("best", 4, 32)]


class Bench:
    """A base model, the rows to teach it, and those to measure it on."""

    def __init__(self, work: Path, adapter: str) -> None:
        self.work, self.rows = work, PREPARED / adapter
        self.params = parameters.load()
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        evaluate = self.params.evaluate
        self.examples = encode(tokenizer, choose(self.rows / "eval.jsonl", evaluate.max_rows))
        texts = read_halves(Path(evaluate.text), tokenizer)
        self.known = excerpts(tokenizer, texts, evaluate.text_tokens, 256)

    def train(self, model: Path) -> Path:
        out = self.work / f"{model.name}-adapter"
        out.mkdir()
        rows, plot = self.rows / "train.jsonl", self.work / "loss.csv"
        with redirect_stdout(sys.stderr):
            finetune(model, rows, out, plot, self.params.finetune)
        return out

    def quantize(self, model: Path, algorithm: str, bits: int, group_size: int) -> Path:
        out = self.work / f"{model.name}-{algorithm}-{group_size}"
        changes = {"algorithm": algorithm, "bits": bits, "group_size": group_size}
        settings = self.params.quantize.model_copy(update=changes)
        with redirect_stdout(sys.stderr):
            quantize(model, Path(settings.calibration_data), out, settings)
        return out

    def row(self, name: str, model: Path, adapter: Path | None = None) -> str:
        loaded = load_adapted(model, adapter)
        taught = score(self.examples, torch_logits(loaded, self.examples))
        known = score(self.known, torch_logits(loaded, self.known))
        return (
            f"| {name} | {taught['perplexity']:.4f} | {taught['exact_answer_rate']:.1%} | "
            f"{known['perplexity']:.4f} |"
        )


def merged(model: Path, adapter: Path, out: Path) -> Path:
    """The float model with an adapter added to its weights."""
    whole: Any = load_adapted(model, adapter)
    whole.merge_and_unload().to(torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


def measure(bench: Bench) -> Iterator[str]:
    """The rows of the table, as they are ready."""
    yield "| model | perplexity on rows kept | exact answers | perplexity on known text |"
    yield "|---|---:|---:|---:|"
    yield bench.row("float", BASE)
    adapter = bench.train(BASE)
    yield bench.row("float, taught", BASE, adapter)
    taught = merged(BASE, adapter, bench.work / "taught")
    for how in QUANTIZERS:
        name = "{} {} bits, group {}".format(*how)
        quantized = bench.quantize(BASE, *how)
        yield bench.row(name, quantized)
        yield bench.row(f"{name}, then taught", quantized, bench.train(quantized))
        yield bench.row(f"taught, then {name}", bench.quantize(taught, *how))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "quality.py healing", description=(__doc__ or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--adapter", default="travel")
    args = parser.parse_args(argv)
    names = ("torch", "olive-ai", "peft")
    print(", ".join(f"{name} {version(name)}" for name in names), f"on {machine()}\n")
    with tempfile.TemporaryDirectory() as work:
        for line in measure(Bench(Path(work), args.adapter)):
            print(line, flush=True)
