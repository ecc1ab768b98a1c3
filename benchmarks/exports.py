"""What the export's choices cost: precision of the output head and arithmetic of MatMulNBits.

    python benchmarks/quality.py exports MODEL --calibration validation.txt --test test.txt

MODEL is quantized once; every export of it is compared with it as PyTorch runs it in float32, on
windows of 512 tokens of the test text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from quantizers import WINDOW, calibration, machine, parser_of, quantize
from transformers import AutoTokenizer

from passes.lora import load_adapted
from stages.export import export
from stages.generation import Session
from stages.measure import size_mb
from stages.params import Export
from stages.scoring import Agreement, Example, Score, onnx_logits, torch_logits

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PROMPT_TOKENS, SPEED_TOKENS, ROUNDS = 128, 128, 8


def measure(args: argparse.Namespace) -> Iterator[str]:
    """The rows of the table, as they are ready."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sequences = calibration(tokenizer, args.calibration, args.samples)
    text = args.test.read_text("utf-8")
    ids = tokenizer(text, add_special_tokens=False).input_ids[: args.tokens]
    examples = [Example(ids[i : i + WINDOW], 1) for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    prompt = tokenizer.decode(ids[:PROMPT_TOKENS])
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        seconds = quantize(args.model, work, args.algorithm, args.group_size, sequences)
        quantized = (work / "last").resolve()
        model = load_adapted(quantized, None)
        yield f"{args.algorithm}, group {args.group_size}, {seconds:.0f} s to quantize\n"
        yield (
            "| lm_head | accuracy_level | perplexity / PyTorch's | same top-1 | mean KL | MB | "
            "tokens/s | first token ms |"
        )
        yield "|---|---:|---:|---:|---:|---:|---:|---:|"
        rows: dict[tuple[str, int], str] = {}
        sessions = {}
        for head, level in product(("float", "int8", "int4"), (1, 4)):
            out = work / f"{head}-{level}"
            out.mkdir()
            settings = Export(device="cpu", provider="cpu", lm_head=head, accuracy_level=level)
            with redirect_stdout(sys.stderr):
                export(quantized, out, settings, TARGETS)
            sessions[head, level] = session = Session(out, {})
            rows[head, level] = f"{fidelity(model, session, examples)} | {size_mb(out):.1f}"
        # Taken in turns, the best of each, so that what else the machine does hits none alone.
        speeds = [
            {key: session.speed(prompt, None, SPEED_TOKENS) for key, session in sessions.items()}
            for _ in range(ROUNDS)
        ]
        for (head, level), row in rows.items():
            rate = max(speed[head, level]["tokens_per_second"] for speed in speeds)
            first = min(speed[head, level]["time_to_first_token_ms"] for speed in speeds)
            yield f"| {head} | {level} | {row} | {rate:.0f} | {first:.0f} |"


def fidelity(model: Any, session: Session, examples: list[Example]) -> str:
    """Ratio of perplexities, top-1 agreement and mean KL of an export and its model."""
    expected, found, agreement = Score(), Score(), Agreement()
    logits = zip(torch_logits(model, examples), onnx_logits(session, examples, None), strict=True)
    for example, (p, q) in zip(examples, logits, strict=True):
        expected.add(p, example.targets)
        found.add(q, example.targets)
        agreement.add(p, q)
    ratio = found.figures()["perplexity"] / expected.figures()["perplexity"]
    same = agreement.figures()
    return f"{ratio:.5f} | {same['top1']:.4f} | {same['mean_kl']:.6f}"


def main(argv: list[str]) -> None:
    parser = parser_of("exports", __doc__, tokens=20_480, samples=64)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--algorithm", default="awq")
    args = parser.parse_args(argv)
    names = ("onnxruntime", "onnxruntime-genai", "torch", "olive-ai")
    print(", ".join(f"{name} {version(name)}" for name in names), f"on {machine()}")
    for line in measure(args):
        print(line, flush=True)
