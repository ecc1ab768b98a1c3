"""Perplexity of a model under every quantizer and combination, at equal bytes.

    python benchmarks/quality.py quantizers MODEL --calibration validation.txt --test test.txt

MODEL is a Hugging Face folder. The test text is tokenized as one string without special tokens, its
first `--tokens` are cut into windows of 512, nothing is put in front of a window, and its first
token is not scored. Weights keep the dtype they are stored in; arithmetic is float32.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.autoclip import AutoClip
from olive.passes.pytorch.gptq import Gptq
from olive.passes.pytorch.kquant import KQuant
from olive.passes.pytorch.rotate import QuaRot
from olive.passes.pytorch.rtn import Rtn
from torch import Tensor, nn
from transformers import AutoTokenizer

from passes.awq import Awq
from passes.best import Best
from passes.calibration import data_config, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW = 512
BATCH = 8  # windows at once
NOTHING = {"grid": 0, "duo": False}  # of a scale search: s = 1 is all that is tried
# Rows: name, then passes one after the other, each with what differs from its defaults.
ROWS: dict[str, list[tuple[type, dict[str, Any]]]] = {
    "rtn": [(Rtn, {})],
    "kquant": [(KQuant, {})],
    "gptq": [(Gptq, {})],
    "autoclip + rtn": [(AutoClip, {}), (Rtn, {})],
    "autoclip + gptq": [(AutoClip, {}), (Gptq, {})],
    "quarot + rtn": [(QuaRot, {}), (Rtn, {})],
    "quarot + gptq": [(QuaRot, {}), (Gptq, {})],
    "awq": [(Awq, {})],
    "awq, no clipping": [(Awq, {"clip_grid": 0})],
    "awq, clipping alone": [(Awq, NOTHING)],
    "awq, scales from activations alone": [(Awq, {"duo": False})],
    "awq, grids of 10": [(Awq, {"grid": 10, "clip_grid": 10})],
    "quarot + awq": [(QuaRot, {}), (Awq, {})],
    "best": [(Best, {})],
    "best, 1 sweep": [(Best, {"sweeps": 1})],
    "best, no sweeps": [(Best, {"sweeps": 0})],
    "best, no scales": [(Best, NOTHING)],
    "best, no correction for quantized inputs": [(Best, {"ridge": 1e6})],
    "quarot + best": [(QuaRot, {}), (Best, {})],
}
CALIBRATED = (Gptq, AutoClip, Awq, Best)


@dataclass
class Text:
    """Windows of the test text with the float model's log-probabilities of each next token."""

    windows: list[Tensor]
    expected: list[Tensor]

    @torch.no_grad()
    def score(self, model: nn.Module) -> tuple[float, float]:
        """Perplexity, and the mean of KL(float || model) in nats."""
        loss = divergence = tokens = 0.0
        for ids, reference in zip(self.windows, self.expected, strict=True):
            found = log_probabilities(model, ids)
            loss -= found.gather(-1, ids[:, 1:, None]).double().sum().item()
            p = reference.float()
            divergence += (p.exp() * (p - found)).double().sum().item()
            tokens += ids[:, 1:].numel()
        return math.exp(loss / tokens), divergence / tokens


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """log p of the tokens after each but the last, (B, T - 1, vocabulary) float32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)


def load(folder: Path) -> nn.Module:
    handler = HfModelHandler(str(folder), load_kwargs={"dtype": "float32"})
    return handler.load_model(cache_model=False).eval().to(DEVICE)


def quantize(
    model: Path, out: Path, row: str, group_size: int, sequences: list[list[int]]
) -> float:
    """Run a row's passes; return the seconds they took, reading and writing included."""
    began = time.perf_counter()
    handler = HfModelHandler(str(model))
    for i, (pass_type, changes) in enumerate(ROWS[row]):
        config = dict(changes)
        if pass_type is not QuaRot:
            config |= {"bits": 4, "group_size": group_size}
        if pass_type in CALIBRATED:
            config["data_config"] = data_config(sequences, batch_size=BATCH)
        handler = create_pass_from_dict(pass_type, config, True).run(handler, str(out / str(i)))
    (out / "last").symlink_to(handler.model_path)
    return time.perf_counter() - began


def calibration(tokenizer: Any, path: Path, samples: int) -> list[list[int]]:
    documents = path.read_text("utf-8").split("<|endoftext|>")
    return pack(tokenizer(documents, add_special_tokens=False).input_ids, samples, WINDOW)


def windows(tokenizer: Any, path: Path, tokens: int) -> list[Tensor]:
    text = path.read_text("utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0, :tokens]
    whole = len(ids) // WINDOW * WINDOW
    rest = [ids[None, whole:]] if len(ids) - whole > 1 else []
    return [w.to(DEVICE) for w in [*ids[:whole].view(-1, WINDOW).split(BATCH), *rest]]


def measure(args: argparse.Namespace) -> Iterator[str]:
    """The rows of the table, as they are ready."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sequences = calibration(tokenizer, args.calibration, args.samples)
    base = load(args.model)
    parts = windows(tokenizer, args.test, args.tokens)
    text = Text(parts, [log_probabilities(base, part).half() for part in parts])
    exact = text.score(base)[0]
    del base
    yield "| group | quantizer | perplexity | loss / RTN's | KL / RTN's | seconds |"
    yield "|---:|---|---:|---:|---:|---:|"
    yield f"| | float | {exact:.4f} | 0 | 0 | |"
    for group_size in args.group_size:
        rtn = (math.nan, math.nan)
        for row in args.rows:
            with tempfile.TemporaryDirectory() as folder:
                seconds = quantize(args.model, Path(folder), row, group_size, sequences)
                found = text.score(load(Path(folder) / "last"))
            if row == "rtn":
                rtn = found
            loss = (found[0] - exact) / (rtn[0] - exact)
            yield (
                f"| {group_size} | {row} | {found[0]:.4f} | {loss:.3f} | "
                f"{found[1] / rtn[1]:.3f} | {seconds:.0f} |"
            )


def parser_of(part: str, doc: str | None, tokens: int, samples: int) -> argparse.ArgumentParser:
    """What every part takes that measures a model on a text."""
    parser = argparse.ArgumentParser(
        f"quality.py {part}", description=(doc or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=tokens, help="of the test text")
    parser.add_argument(
        "--samples", type=int, default=samples, help="calibration windows of 512 tokens"
    )
    return parser


def main(argv: list[str]) -> None:
    parser = parser_of("quantizers", __doc__, tokens=100_000, samples=256)
    parser.add_argument("--group-size", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args(argv)
    names = ("torch", "olive-ai", "transformers")
    print(", ".join(f"{name} {version(name)}" for name in names), f"on {machine()}\n")
    for line in measure(args):
        print(line, flush=True)


def machine() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of {platform.machine()}"
