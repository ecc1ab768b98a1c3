"""Tokens a second of an exported model on this machine's CPU, beside its peers.

    python benchmarks/inference.py --folder MODELS --size 1
    python benchmarks/inference.py --folder MODELS --size 1 --options        # of the session
    python benchmarks/inference.py --folder MODELS --size 1 --llama PYTHON   # with llama-cpp-python

Models have Phi-3.5-mini's shape, or a smaller one, and random weights: times are real, text is not.
Each row is a process that reads a prompt and writes tokens, the first time uncounted; all rows take
turns, and a figure is the median over all turns. "Merged" is the graph without adapter inputs,
which is what a model is whose adapter was added to its weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

PROMPT, TOKENS, REPEATS, TURNS = 128, 32, 2, 3
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
RANK = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "1 thread": {"session": {"intra_op_num_threads": 1}},
    "2 threads": {"session": {"intra_op_num_threads": 2}},
    "threads sleep between operators": {"session": {"session.intra_op.allow_spinning": "0"}},
    "work in smaller parts": {"session": {"session.dynamic_block_base": "4"}},
    "denormals are zero": {"session": {"session.set_denormal_as_zero": "1"}},
    "no memory arena": {"session": {"enable_cpu_mem_arena": False}},
    "no memory pattern": {"session": {"enable_mem_pattern": False}},
    "cache in one buffer": {"search": {"past_present_share_buffer": True}},
}
Run = tuple[float, float]  # ms to the first token, tokens a second after it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="1")
    parser.add_argument(
        "--folder", type=Path, required=True, help="for models; those there are used"
    )
    parser.add_argument("--options", action="store_true", help="session options instead of peers")
    parser.add_argument("--llama", type=Path, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--leave-out", nargs="*", default=[], help="rows")
    parser.add_argument("--row", nargs=2, metavar=("ENGINE", "ARGUMENTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        engine, given = args.row
        print(json.dumps(ENGINES[engine](**json.loads(given))))
        return
    folder = args.folder / args.size
    rows = options(folder) if args.options else peers(folder, args.llama)
    rows = {name: row for name, row in rows.items() if name not in args.leave_out}
    prepare(folder, args.size, rows, args.llama)
    names = ("onnxruntime", "onnxruntime-genai", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{os.cpu_count()} cores; {versions}; prompt of {PROMPT} tokens, {TOKENS} more\n")
    found: dict[str, list[Run]] = {name: [] for name in rows}
    for _ in range(args.turns):
        for name, (python, engine, given) in rows.items():
            found[name] += measured(python, engine, given)
    print(table(found))


def peers(folder: Path, llama: Path | None) -> dict[str, tuple[Path, str, dict]]:
    """Name, Python, engine and its arguments of each row; the first is what all are compared to."""
    python, adapter = Path(sys.executable), str(folder / "random.onnx_adapter")
    rows: dict[str, tuple[Path, str, dict]] = {
        "int4, adapter off": (python, "genai", {"folder": str(folder / "onnx")}),
        "int4, adapter on": (python, "genai", {"folder": str(folder / "onnx"), "adapter": adapter}),
        "int4, merged": (python, "genai", {"folder": str(folder / "merged")}),
        "int4, int8 head, adapter off": (python, "genai", {"folder": str(folder / "onnx-int8")}),
    }
    for dtype in ("float32", "bfloat16"):
        given = {"folder": str(folder / "float"), "dtype": dtype}
        rows[f"transformers, {dtype}"] = (python, "transformers", given)
    if llama:
        rows["llama.cpp, Q4_0"] = (llama, "llama", {"path": str(folder / "Q4_0.gguf")})
    return rows


def options(folder: Path) -> dict[str, tuple[Path, str, dict]]:
    given = {"folder": str(folder / "onnx"), "adapter": str(folder / "random.onnx_adapter")}
    changes = {"as exported": {}, **OPTIONS}
    return {
        name: (Path(sys.executable), "genai", {**given, **change})
        for name, change in changes.items()
    }


def prepare(folder: Path, size: str, rows: dict, llama: Path | None) -> None:
    """Make the models that the rows need and that are not there."""
    from benchmarks import shapes
    from stages.export import export
    from stages.params import Export

    if not (folder / "quantized").exists():
        shapes.quantized_model(folder / "quantized", size)
    floats = llama or any(engine == "transformers" for _, engine, _ in rows.values())
    if floats and not (folder / "float").exists():
        shapes.float_model(folder / "float", size)
    for name, head, targets in (
        ("onnx", "float", TARGETS),
        ("merged", "float", []),
        ("onnx-int8", "int8", TARGETS),
    ):
        if not (folder / name).exists():
            params = Export(device="cpu", provider="cpu", lm_head=head, accuracy_level=4)
            export(folder / "quantized", folder / name, params, targets)
    random_adapter(folder / "onnx", folder / "random.onnx_adapter")
    if llama and not (folder / "Q4_0.gguf").exists():
        script = Path(__file__).with_name("gguf_of.py")
        subprocess.run([llama, script, folder / "float", folder / "Q4_0.gguf"], check=True)


def random_adapter(model: Path, out: Path) -> None:
    """An adapter of `RANK` for all inputs of an exported model."""
    import numpy as np
    import onnxruntime

    rng = np.random.default_rng(0)
    values = {}
    for entry in json.loads((model / "adapter_inputs.json").read_text("utf-8"))["inputs"]:
        values[entry["A"]] = rng.normal(0, 0.01, (entry["in_features"], RANK))
        values[entry["B"]] = rng.normal(0, 0.01, (RANK, entry["out_features"]))
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    to_value = onnxruntime.OrtValue.ortvalue_from_numpy  # a view: the arrays must stay
    arrays = {k: v.astype(np.float32) for k, v in values.items()}
    adapter.set_parameters({k: to_value(v) for k, v in arrays.items()})
    adapter.export_adapter(str(out))


def measured(python: Path, engine: str, given: dict) -> list[Run]:
    command = [python, __file__, "--folder", ".", "--row", engine, json.dumps(given)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine} {given}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def timed(tokens: Iterator[Any]) -> Run:
    """Time an iterator that reads the prompt for its first item and yields an item a token."""
    started = time.perf_counter()
    next(tokens)
    first = time.perf_counter()
    count = sum(1 for _ in tokens)
    return 1000 * (first - started), count / (time.perf_counter() - first)


def repeated(generate: Any) -> list[Run]:
    return [timed(generate()) for _ in range(1 + REPEATS)][1:]


def genai(
    folder: str, adapter: str | None = None, session: dict | None = None, search: dict | None = None
) -> list[Run]:
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(folder)
    overlay = {"model": {"decoder": {"session_options": session or {}}}, "search": search or {}}
    config.overlay(json.dumps(overlay))
    model = og.Model(config)
    adapters = og.Adapters(model)
    if adapter:
        adapters.load(adapter, "adapter")
    length = PROMPT + TOKENS

    def generate() -> Iterator[None]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        if adapter:
            generator.set_active_adapter(adapters, "adapter")
        generator.append_tokens(np.arange(100, 100 + PROMPT, dtype=np.int32))
        for _ in range(TOKENS):
            generator.generate_next_token()
            yield

    return repeated(generate)


def transformers(folder: str, dtype: str) -> list[Run]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate() -> Iterator[None]:
        ids, past = torch.arange(100, 100 + PROMPT)[None], None
        for _ in range(TOKENS):
            with torch.inference_mode():
                out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield

    return repeated(generate)


def llama(path: str) -> list[Run]:
    import llama_cpp as cpp
    import numpy as np

    quiet = cpp.llama_log_callback(lambda *args: None)  # the library holds no reference to it
    cpp.llama_log_set(quiet, None)
    model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
    params = cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = 512
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))

    def generate() -> Iterator[None]:
        context = cpp.llama_init_from_model(model, params)
        ids = np.arange(100, 100 + PROMPT, dtype=np.int32)
        for _ in range(TOKENS):
            tokens = (cpp.llama_token * len(ids))(*ids.tolist())
            assert cpp.llama_decode(context, cpp.llama_batch_get_one(tokens, len(ids))) == 0
            logits = np.ctypeslib.as_array(cpp.llama_get_logits(context), (size,))
            ids = np.array([logits.argmax()], np.int32)
            yield
        cpp.llama_free(context)

    return repeated(generate)


ENGINES = {"genai": genai, "transformers": transformers, "llama": llama}


def table(found: dict[str, list[Run]]) -> str:
    lines = ["| | first token, ms | tokens/s | of the first row | slowest to fastest |"]
    lines.append("|---|---:|---:|---:|---:|")
    reference = statistics.median(rate for _, rate in next(iter(found.values())))
    for name, runs in found.items():
        first, rate = (statistics.median(column) for column in zip(*runs, strict=True))
        rates = [rate for _, rate in runs]
        lines.append(
            f"| {name} | {first:,.0f} | {rate:.2f} | {rate / reference:.2f} "
            f"| {min(rates):.2f} to {max(rates):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
