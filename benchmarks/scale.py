"""Time and memory of the stages at the size people use, beside what the machine can do.

    python benchmarks/scale.py ceilings
    python benchmarks/scale.py quantize finetune --size 3.8
    python benchmarks/scale.py export --size 0.1 0.5 1 3.8

Models have the shape of Phi-3.5-mini (3.8), or a smaller one, and random weights. Every row is a
process of its own; its memory is that of the process, at most. "Of the limit" is the time that the
row's arithmetic, or its bytes, would take at the machine's own measured rate, over the row's time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

from benchmarks import shapes  # noqa: E402

CUDA = torch.cuda.is_available()
SAMPLES, WINDOW = 128, 512  # calibration
BATCH, RANK = 8, 16  # training, on rows of WINDOW tokens
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
GB = 1e9
Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="+", choices=["ceilings", *STAGES])
    parser.add_argument("--size", nargs="+", choices=shapes.SIZES, default=["0.1"])
    parser.add_argument("--folder", type=Path, help="keep the models here, and use what is there")
    parser.add_argument("--steps", type=int, default=100, help="of training, more than 5")
    parser.add_argument("--row", nargs=2, metavar=("NAME", "ARGUMENTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return measure(*args.row)
    names = ("torch", "transformers", "olive-ai", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{machine()}; {versions}\n", flush=True)
    limits = ceilings()
    print(", ".join(f"{name} {value / 1e12:.3g} T/s" for name, value in limits.items()), flush=True)
    print("\n| parameters | what | s | of the limit | host, GB | GPU, GB | |")
    print("|---:|---|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.size:
            for name in [what for what in args.what if what != "ceilings"]:
                for label, options in STAGES[name][1]:
                    given = options | ({"steps": args.steps} if name == "finetune" else {})
                    row = run(name, (args.folder or Path(temporary)) / size, size, given)
                    print(line(f"{name}{label}", size, row, limits), flush=True)


def machine() -> str:
    cpu = f"{len(os.sched_getaffinity(0))} cores, {os.uname().machine}"
    return f"{torch.cuda.get_device_name()}, {cpu}" if CUDA else cpu


def run(name: str, folder: Path, size: str, options: dict[str, Any]) -> Row:
    """Make what a row needs, and run it in a process of its own."""
    make(folder, size, needed={"quantize": "float", "export": "quantized"}.get(name, "both"))
    given = json.dumps({"folder": str(folder), "size": size, **options})
    command = [sys.executable, __file__, name, "--row", name, given]
    most = 0
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors)
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.05)
        said.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(errors.read()[-3000:].decode())
        return json.loads(said.read().splitlines()[-1]) | {"anonymous": most}


def anonymous(pid: int) -> int:
    """Bytes of memory that the system cannot take back, unlike pages of mapped files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def make(folder: Path, size: str, needed: str) -> None:
    for kind, write in (("float", shapes.float_model), ("quantized", shapes.quantized_model)):
        if needed in (kind, "both") and not (folder / kind).exists():
            write(folder / kind, size)


def line(name: str, size: str, row: Row, limits: dict[str, float]) -> str:
    least = sum(row[unit] / rate for unit, rate in limits.items() if unit in row)
    gpu = f"{row['gpu'] / GB:.1f}" if CUDA else ""
    more = ", ".join(f"{key} {row[key]:,.4g}" for key in row if key not in KNOWN | set(limits))
    return (
        f"| {shapes.parameters(size) / GB:.2f} B | {name} | {row['seconds']:.1f} | "
        f"{least / row['seconds']:.0%} | {row['anonymous'] / GB:.1f} | {gpu} | {more} |"
    )


KNOWN = {"seconds", "anonymous", "gpu"}


def ceilings() -> dict[str, float]:
    """Operations and bytes a second that this machine was seen to do, each the best of 3."""
    device, n = ("cuda", 8192) if CUDA else ("cpu", 2048)
    found = {}
    kinds = {"tf32": torch.float32, "bf16": torch.bfloat16} if CUDA else {"fp32": torch.float32}
    for name, dtype in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        found[name] = 2 * n**3 / best(lambda a=a, b=b: a @ b)
    x = torch.empty(1 << (30 if CUDA else 28), dtype=torch.uint8, device=device)
    found["copy"] = 2 * x.numel() / best(x.clone)
    with tempfile.NamedTemporaryFile(dir=REPO) as file:

        def write() -> None:
            file.seek(0)
            for _ in range(16):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

        block = os.urandom(1 << 26)
        found["disk"] = (1 << 30) / best(write)
    return found


def best(work: Callable[[], Any]) -> float:
    """Least seconds of 3, after a warm-up."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def measure(name: str, given: str) -> None:
    """Run one row here and print what it took, as JSON on the last line."""
    options = json.loads(given)
    with tempfile.TemporaryDirectory(dir=options["folder"]) as out:
        row = STAGES[name][0](Path(out) / "out", **options)
    row["max RSS, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    row["gpu"] = torch.cuda.max_memory_allocated() if CUDA else 0
    print(json.dumps(row))


class Clock:
    """Notes when each step of a pass was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, done: int, total: int, note: str) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def quantize(out: Path, folder: str, size: str) -> Row:
    """From loaded weights to a saved checkpoint."""
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    from passes.awq import Awq
    from passes.calibration import data_config
    from stages.quantize import batch_size

    sequences = torch.randint(0, 1000, (SAMPLES, WINDOW)).tolist()
    config = {"group_size": 128, "data_config": data_config(sequences, None, batch_size(WINDOW))}
    quantizer = create_pass_from_dict(Awq, config, disable_search=True)
    quantizer.progress = clock = Clock()
    started = time.perf_counter()
    quantizer.run(HfModelHandler(str(Path(folder) / "float")), str(out))
    ended = time.perf_counter()
    hidden, wide, layers, _ = shapes.SIZES[size]
    linears = [(3 * hidden, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)]
    tokens = SAMPLES * WINDOW
    search = sum(2 * 41 * rows * columns**2 for rows, columns in linears)
    forward = sum(2 * tokens * rows * columns for rows, columns in linears)
    grams = sum(2 * tokens * columns**2 for _, columns in linears)
    return {
        "seconds": ended - clock.times[0],
        "tf32" if CUDA else "fp32": layers * (search + forward + grams),
        "load, s": clock.times[0] - started,
        "save, s": ended - clock.times[-1],
    }


def finetune(
    out: Path, folder: str, size: str, *, base: str, checkpointing: bool, steps: int
) -> Row:
    """From the start of the pass, which loads, to a saved adapter.

    On `bitsandbytes` PEFT's own layers over 4-bit NF4 weights are taught, by the same loop.
    """
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    from passes.calibration import data_config, token_sequences
    from passes.lora import QuantLora

    rows = torch.randint(0, 1000, (BATCH * 16, WINDOW)).tolist()
    config = {
        "r": RANK,
        "alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "target_modules": TARGETS,
        "train_data_config": data_config(rows, rows),
        "torch_dtype": "bfloat16" if CUDA else "float32",
        "device_map": "auto" if CUDA else None,
        "training_args": {
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "gradient_checkpointing": checkpointing,
            "seed": 7,
        },
    }
    lora = create_pass_from_dict(QuantLora, config, disable_search=True)
    lora.progress = clock = Clock()
    started = time.perf_counter()
    peft = torch.autocast("cuda", torch.bfloat16, enabled=CUDA and base != "quantized")
    with peft:  # as transformers' trainer does it
        if base == "bitsandbytes":
            lora.losses = []
            model = on_bitsandbytes(Path(folder) / "float")
            lora._train(model, token_sequences(rows), lora.config.training_args)
        else:
            lora.run(HfModelHandler(str(Path(folder) / base)), str(out))
    ended = time.perf_counter()
    hidden, wide, layers, _ = shapes.SIZES[size]
    linear = layers * (4 * hidden**2 + 3 * hidden * wide) + shapes.VOCABULARY * hidden
    warm = steps // 5
    steady = (clock.times[-1] - clock.times[warm - 1]) / (steps - warm)
    tokens = BATCH * WINDOW
    return {
        "seconds": ended - started,
        "bf16" if CUDA else "fp32": 4 * linear * tokens * steps,
        "first step, s": clock.times[0] - started,
        "tokens/s after": tokens / steady,
        "TFLOP/s after": 4 * linear * tokens / steady / 1e12,
        "last loss": lora.losses[-1][1],
    }


def on_bitsandbytes(folder: Path) -> Any:
    """A float model in 4 bits of bitsandbytes, with a new adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if CUDA else torch.float32
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=four_bits, device_map={"": 0 if CUDA else "cpu"}
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    return get_peft_model(model, config)


def export(out: Path, folder: str, size: str) -> Row:
    """The stage without the start of its process."""
    from stages.export import export as stage_export
    from stages.params import Export

    started = time.perf_counter()
    params = Export(device="cpu", provider="cpu", lm_head="float", accuracy_level=4)
    stage_export(Path(folder) / "quantized", out, params, TARGETS)
    ended = time.perf_counter()
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"seconds": ended - started, "disk": written, "output, GB": written / GB}


STAGES: dict[str, tuple[Callable[..., Row], list[tuple[str, dict[str, Any]]]]] = {
    "quantize": (quantize, [("", {})]),
    "finetune": (
        finetune,
        [
            ("", {"base": "quantized", "checkpointing": False}),
            (", activations recomputed", {"base": "quantized", "checkpointing": True}),
            (" on float weights", {"base": "float", "checkpointing": False}),
            *(
                [(" on bitsandbytes", {"base": "bitsandbytes", "checkpointing": False})]
                if find_spec("bitsandbytes")
                else []
            ),
        ],
    ),
    "export": (export, [("", {})]),
}


if __name__ == "__main__":
    main()
