"""`olivepress serve` under load, beside onnxruntime-genai alone and llama.cpp's server.

    python benchmarks/serve.py --folder MODELS --size 0.5
    python benchmarks/serve.py --folder MODELS --size 0.5 --llama PYTHON   # with llama-cpp-python
    python benchmarks/serve.py --folder MODELS --size 0.5 --memory         # with 1 and 50 adapters
    python benchmarks/serve.py --folder MODELS --size 0.1 --steady 30      # minutes of load

Models have Phi-3.5-mini's shape, or a smaller one, and random weights. The load comes from a second
process: so many clients, each of which asks again when it has its answer. Every answer has `TOKENS`
tokens and streams. Tokens a second are those of all clients, prompts among the time; the time to
the first token is the median, and the 95th of a hundred.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

PROMPT, TOKENS = 64, 48
CLIENTS = (1, 4, 16, 64)
SLOTS = 16
WORD = 500  # a token with text; random weights would make some that have none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="0.5")
    parser.add_argument(
        "--folder", type=Path, required=True, help="for models; those there are used"
    )
    parser.add_argument("--seconds", type=float, default=20, help="of load for each row")
    parser.add_argument("--llama", type=Path, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--steady", type=float, metavar="MINUTES")
    parser.add_argument("--load", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--genai", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--together", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(asyncio.run(load(**json.loads(args.load)))))
    elif args.genai:
        print(json.dumps(genai(args.genai, args.seconds, args.together, args.adapter)))
    elif args.memory:
        memory(prepared(args, adapters=50))
    elif args.steady:
        steady(prepared(args, adapters=8), args.steady)
    else:
        table(args)


def table(args: argparse.Namespace) -> None:
    """Tokens a second and time to the first token, by clients and adapters."""
    package = prepared(args, adapters=8)
    names = ("onnxruntime", "onnxruntime-genai", "fastapi", "uvicorn")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    bare = {adapter: alone(package, args.seconds, adapter=adapter) for adapter in (False, True)}
    print("\nonnxruntime-genai alone, one answer after the other:")
    print(f"{bare[False]:.1f} tokens/s of the base, {bare[True]:.1f} with an adapter\n")
    print(
        "| server | models asked | clients | tokens/s | of genai alone | first token, ms | 95 % |"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    with served(package, args.size) as (url, _):
        for models in (["base"], ["a0"], [f"a{i}" for i in range(8)]):
            for clients in CLIENTS:
                said = models[0] if len(models) == 1 else f"{len(models)} adapters"
                found = under(url, models, clients, args.seconds)
                row("olivepress", said, clients, found, bare[models != ["base"]])
    if args.llama:
        with llama(args) as url:
            for clients in CLIENTS:
                found = under(url, ["llama"], clients, args.seconds)
                row("llama-cpp-python", "base, Q4_0", clients, found, bare[False])
    again = [alone(package, args.seconds, adapter=adapter) for adapter in (False, True)]
    print(f"\nonnxruntime-genai alone, at the end again: {again[0]:.1f}, {again[1]:.1f} tokens/s")
    for together in CLIENTS[1:3]:
        rate = alone(package, args.seconds, together)
        print(
            f"{together} of its generators in turn: {rate:.1f} tokens/s, {rate / bare[False]:.2f}"
        )


def alone(package: Path, seconds: float, together: int = 1, adapter: bool = False) -> float:
    arguments = ["--seconds", str(seconds), "--together", str(together)]
    arguments += ["--adapter"] * adapter
    return child("--genai", str(package), *arguments)["tokens_per_second"]


def row(server: str, models: str, clients: int, found: dict[str, Any], bare: float) -> None:
    rate = found["tokens"] / found["seconds"]
    first = sorted(found["first"])
    late = first[int(0.95 * (len(first) - 1))]
    failed = f" ({found['failed']} failed)" if found["failed"] else ""
    print(
        f"| {server} | {models} | {clients} | {rate:.1f} | {rate / bare:.2f} "
        f"| {1000 * statistics.median(first):.0f} | {1000 * late:.0f} |{failed}",
        flush=True,
    )


def prepared(args: argparse.Namespace, adapters: int) -> Path:
    """A package of that size with so many adapters."""
    from benchmarks import inference, shapes
    from stages.export import export
    from stages.params import Export

    folder: Path = args.folder / args.size
    package = folder / "package"
    if not (folder / "quantized").exists():
        shapes.quantized_model(folder / "quantized", args.size)
    if not (package / "model.onnx").exists():
        params = Export(device="cpu", provider="cpu", lm_head="int8", accuracy_level=4)
        export(folder / "quantized", package, params, inference.TARGETS)
    (package / "adapters").mkdir(exist_ok=True)
    first = package / "adapters/a0.onnx_adapter"
    if not first.exists():
        inference.random_adapter(package, first)
    for number in range(1, adapters):
        if not (there := first.with_name(f"a{number}.onnx_adapter")).exists():
            shutil.copy(first, there)  # the weights may be the same, the work is not
    return package


@contextmanager
def served(package: Path, size: str) -> Iterator[tuple[str, int]]:
    """The server: its address, and its process's number."""
    command = [
        Path(sys.executable).with_name("olivepress"), "serve", package, "--port", "0", "--json",
        "--slots", SLOTS, "--waiting", "64", "--context", "1024",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line == "}\n":
                break
        yield json.loads(said)["url"], process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def llama(args: argparse.Namespace) -> Iterator[str]:
    """llama-cpp-python's server on the same weights as Q4_0."""
    from benchmarks import shapes

    folder: Path = args.folder / args.size
    if not (folder / "float").exists():
        shapes.float_model(folder / "float", args.size)
    gguf = folder / "Q4_0.gguf"
    if not gguf.exists():
        script = Path(__file__).with_name("gguf_of.py")
        subprocess.run([args.llama, script, folder / "float", gguf], check=True)
    port = 8177
    command = [
        args.llama, "-m", "llama_cpp.server", "--model", gguf, "--port", port, "--n_ctx", "1024",
        "--n_threads", os.cpu_count(), "--model_alias", "llama", "--verbose", "false",
        "--interrupt_requests", "false",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                httpx.get(f"{url}/v1/models")
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        process.kill()
        process.wait()


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--folder", ".", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def under(url: str, models: list[str], clients: int, seconds: float) -> dict[str, Any]:
    """What clients got that ask from a process of their own."""
    asked = {"url": url, "models": models, "clients": clients, "seconds": seconds}
    return child("--load", json.dumps(asked))


async def load(url: str, models: list[str], clients: int, seconds: float) -> dict[str, Any]:
    """Ask until the time is over; what was begun by then is finished, and counts."""
    first: list[float] = []
    tokens = failed = 0
    began = time.monotonic()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        nonlocal tokens, failed
        turn = number
        while time.monotonic() < began + seconds:
            body = {
                "model": models[turn % len(models)],
                "prompt": [*range(100 + number, 100 + number + PROMPT)],
                "max_tokens": TOKENS,
                "temperature": 0,
                "stream": True,
                "logit_bias": {str(WORD): 100},
                "stream_options": {"include_usage": True},
            }
            if models == ["llama"]:  # it takes text only: a token for each letter, each prompt new
                text = hashlib.sha256(str(turn).encode()).hexdigest()[:PROMPT]
                body |= {"prompt": text, "logit_bias": None, "stream_options": None}
            turn += clients
            started, count, used = time.monotonic(), 0, None
            async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    failed += 1
                    await answer.aread()
                    await asyncio.sleep(0.1)
                    continue
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        if not count:
                            first.append(time.monotonic() - started)
                        count += 1
                        used = json.loads(line[6:]).get("usage") or used
            tokens += used["completion_tokens"] if used else min(count, TOKENS)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))
    elapsed = time.monotonic() - began
    return {"tokens": tokens, "seconds": elapsed, "first": first, "failed": failed}


def genai(package: Path, seconds: float, together: int, adapter: bool) -> dict[str, float]:
    """onnxruntime-genai alone: so many prompts at a time, a token of each in turn."""
    import numpy as np
    import onnxruntime_genai as og

    model = og.Model(str(package))
    adapters = og.Adapters(model)
    adapters.load(str(package / "adapters/a0.onnx_adapter"), "a0")
    length = PROMPT + TOKENS

    def begun() -> og.Generator:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        if adapter:
            generator.set_active_adapter(adapters, "a0")
        generator.append_tokens(np.arange(100, 100 + PROMPT, dtype=np.int32))
        return generator

    def answer() -> None:
        generators = [begun() for _ in range(together)]
        for _ in range(TOKENS):
            for generator in generators:
                generator.generate_next_token()

    answer()
    began, count = time.monotonic(), 0
    while time.monotonic() < began + seconds:
        answer()
        count += TOKENS * together
    return {"tokens_per_second": count / (time.monotonic() - began)}


def rss_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024 / 1e6


def memory(package: Path) -> None:
    """Memory of the server after its start, and with adapters in use."""
    size = (package / "adapters/a0.onnx_adapter").stat().st_size / 1e6
    print(f"one adapter has {size:.1f} MB; the model {file_mb(package):.0f} MB\n")
    print("| adapters asked | memory of the server, MB |\n|---:|---:|")
    with served(package, "") as (url, process):
        print(f"| 0 | {rss_mb(process):.0f} |")
        for count in (1, 8, 50):
            for number in range(count):
                body = {"model": f"a{number}", "prompt": [5, 6], "max_tokens": 4}
                httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
            print(f"| {count} | {rss_mb(process):.0f} |", flush=True)


def file_mb(package: Path) -> float:
    return sum(path.stat().st_size for path in package.glob("model.onnx*")) / 1e6


def steady(package: Path, minutes: float) -> None:
    """Memory over minutes of load by eight clients on nine models; a line for each tenth."""
    models = ["base", *(f"a{i}" for i in range(8))]
    part = minutes * 60 / 10
    print("| minutes | tokens/s | failed | memory, MB | open files |\n|---:|---:|---:|---:|---:|")
    with served(package, "") as (url, process):
        under(url, models, 8, 10)
        for tenth in range(11):
            open_files = len(list(Path(f"/proc/{process}/fd").iterdir()))
            found = (
                under(url, models, 8, part) if tenth else {"tokens": 0, "seconds": 1, "failed": 0}
            )
            print(
                f"| {tenth * minutes / 10:.0f} | {found['tokens'] / found['seconds']:.1f} "
                f"| {found['failed']} | {rss_mb(process):.1f} | {open_files} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
