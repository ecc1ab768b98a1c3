"""An export for CUDA on an NVIDIA GPU: whether it agrees with the CPU's export, and its speed.

    python benchmarks/gpu.py agree exports/cpu exports/cuda data/prepared/travel/eval.jsonl
    python benchmarks/gpu.py speed exports/cuda

Nothing of this project is needed where it runs: numpy, onnxruntime-gpu, onnxruntime-genai-cuda and
CUDA's libraries, which PyTorch brings if it is there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import statistics
import subprocess
import time
from contextlib import suppress
from pathlib import Path

with suppress(ImportError):
    import torch  # noqa: F401  # its CUDA libraries are found by those below
import numpy as np
import onnxruntime
import onnxruntime_genai as og

PROMPT, TOKENS, TURNS = 128, 128, 5


class Model:
    """An exported folder with its adapters."""

    def __init__(self, folder: Path) -> None:
        self.model = og.Model(str(folder))
        self.tokenizer = og.Tokenizer(self.model)
        self.adapters = og.Adapters(self.model)
        self.names = sorted(path.stem for path in folder.glob("adapters/*.onnx_adapter"))
        for name in self.names:
            self.adapters.load(str(folder / f"adapters/{name}.onnx_adapter"), name)

    def begun(self, ids: list[int], adapter: str | None, more: int) -> og.Generator:
        params = og.GeneratorParams(self.model)
        length = len(ids) + more
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(self.model, params)
        if adapter:
            generator.set_active_adapter(self.adapters, adapter)
        generator.append_tokens(np.asarray(ids, np.int32))
        return generator

    def log_probabilities(self, ids: list[int], adapter: str | None) -> np.ndarray:
        """Of the next token after each token: float64 (len(ids), vocabulary)."""
        raw = self.begun(ids, adapter, 1).get_output("logits")[0]
        logits = np.asarray(raw, np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def answer(self, ids: list[int], adapter: str | None, tokens: int) -> list[int]:
        generator = self.begun(ids, adapter, tokens)
        for _ in range(tokens):
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def agree(args: argparse.Namespace) -> None:
    """Both exports on the same rows: perplexity, the likeliest token, the answers."""
    cpu, cuda = Model(args.cpu), Model(args.cuda)
    rows = [json.loads(line) for line in args.rows.read_text("utf-8").splitlines()]
    print("| adapter | places | perplexity, of the CPU's | same top-1 | mean KL | same answers |")
    print("|---|---:|---:|---:|---:|---:|")
    for adapter in (None, *cpu.names):
        loss, same, kl, places, answers = np.zeros(2), 0, 0.0, 0, 0
        for row in rows:
            prompt = [int(token) for token in cpu.tokenizer.encode(row["text_prompt"])]
            response = [int(token) for token in cpu.tokenizer.encode(row["text_response"])]
            ids, start = prompt + response, len(prompt)
            p, q = (one.log_probabilities(ids, adapter)[start - 1 : -1] for one in (cpu, cuda))
            loss += [-each[np.arange(len(response)), response].sum() for each in (p, q)]
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            kl += float((np.exp(p) * (p - q)).sum())
            places += len(response)
            answers += cpu.answer(prompt, adapter, 16) == cuda.answer(prompt, adapter, 16)
        ratio = math.exp((loss[1] - loss[0]) / places)
        print(
            f"| {adapter or 'none'} | {places} | {ratio:.5f} | {same / places:.4f} "
            f"| {kl / places:.2e} | {answers} of {len(rows)} |",
            flush=True,
        )


def speed(args: argparse.Namespace) -> None:
    """Time to the first of `TOKENS` tokens, the rate after it, the GPU's memory at the end."""
    model = Model(args.folder)
    size = sum(path.stat().st_size for path in args.folder.glob("model.onnx*")) / 1e9
    print(f"{size:.2f} GB; a prompt of {PROMPT} tokens, then {TOKENS}; medians of {TURNS}\n")
    print("| adapter | first token, ms | tokens/s |\n|---|---:|---:|")
    for adapter in (None, *model.names[:1]):
        first, rate = [], []
        for turn in range(TURNS + 1):
            ids = list(range(100 + turn, 100 + turn + PROMPT))
            began = time.perf_counter()
            generator = model.begun(ids, adapter, TOKENS)
            generator.generate_next_token()
            there = time.perf_counter()
            for _ in range(TOKENS - 1):
                generator.generate_next_token()
            if turn:
                first.append(1000 * (there - began))
                rate.append((TOKENS - 1) / (time.perf_counter() - there))
        name = adapter or "none"
        print(f"| {name} | {statistics.median(first):.1f} | {statistics.median(rate):.1f} |")
    print(f"\nmemory of the GPU in use: {gpu('memory.used')}")


def gpu(what: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("agree")
    one.add_argument("cpu", type=Path)
    one.add_argument("cuda", type=Path)
    one.add_argument("rows", type=Path, help="what prepare made for evaluation")
    one.set_defaults(do=agree)
    two = kinds.add_parser("speed")
    two.add_argument("folder", type=Path)
    two.set_defaults(do=speed)
    args = parser.parse_args()
    genai = importlib.metadata.version("onnxruntime-genai-cuda")
    print(f"{gpu('name')}, driver {gpu('driver_version')}")
    print(f"onnxruntime {onnxruntime.__version__}, onnxruntime-genai-cuda {genai}\n")
    args.do(args)


if __name__ == "__main__":
    main()
