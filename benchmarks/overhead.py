"""What the machinery costs: cold against Olive's own commands, warm against `dvc repro`, a stage.

    python benchmarks/overhead.py [--json FILE] [--growth]

Everything is run side by side in one go on the built-in model, in fresh copies of the project;
the table gives seconds and the ratio that is asked for. Quiet the machine before you believe it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

REPEATS = 5
SIZES = (10, 100, 1000)  # stages
SIDE_BY_SIDE = 10
Row = dict[str, object]


def sh(*command: object, cwd: Path) -> float:
    """Run a command that must succeed; its wall time in seconds."""
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OLIVE_DISABLE_TELEMETRY": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--growth", action="store_true", help="only how it grows with the stages")
    parser.add_argument("--keep", type=Path, help="work here instead of in a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        rows = measure(work, args.growth)
    names = ("olive-ai", "dvc", "prefect", "torch", "onnxruntime-genai")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(f"\n{os.cpu_count()} cores, " + ", ".join(f"{n} {v}" for n, v in versions.items()) + "\n")
    print("| what | seconds | against | seconds | ratio or excess | goal |")
    print("|---|---:|---|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")


def measure(work: Path, growth: bool) -> list[Row]:
    from lab import copy_project
    from tasks import server

    project = copy_project(work / "project")
    say("start the server")
    server.ensure(project)  # and say so to what is started from here
    try:
        rows = [] if growth else of_the_project(project, work)
        for count in SIZES:
            rows += warm(trivial(work / str(count), count), f" of {count:,} trivial stages", "", "")
        return rows
    finally:
        server.stop(project)


def of_the_project(project: Path, work: Path) -> list[Row]:
    from lab import copy_project

    base = make_base(copy_project(work / "source"))
    return [cold(project, base, work), *warm(project, "", "≤ 3 s", "≤ 1 s"), a_stage(work)]


def say(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def make_base(source: Path) -> Path:
    """The built-in model, made once: neither side is charged for it."""
    say("make the base model")
    sh("dvc", "repro", "fetch", cwd=source)
    return source / "models/base"


def cold(project: Path, base: Path, work: Path) -> Row:
    """(a) `olivepress run` with nothing cached against one Olive command for each step."""
    say("olivepress run, cold")
    ours = sh(
        "olivepress", "run", "-S", "base.source=local", "-S", f"base.path={base}", cwd=project
    )
    return {
        "what": "olivepress run, cold: prepare, AWQ, LoRA, export, convert, evaluate, package",
        "seconds": f"{ours:.1f}",
        "against": "olive quantize (RTN), finetune, auto-opt",
        "other": f"{(theirs := olive(project, base, work)):.1f}",
        "ratio": f"{ours / theirs:.2f}",
        "goal": "≤ 0.6",
    }


def olive(project: Path, base: Path, work: Path) -> float:
    """The same steps by Olive's commands, a process each; telemetry off, as for ours.

    They cannot teach a quantized model, so the float one is taught and exported with the adapter;
    the quantized one is made beside it, as in the lab.
    """
    import yaml

    tune = yaml.safe_load((project / "params.yaml").read_text())["finetune"]
    rows = project / "data/prepared/travel/train.jsonl"
    out = work / "olive"
    common = ("--disable_telemetry", "--log_level", "3")
    say("olive quantize")
    seconds = sh(
        *("olive", "quantize", "-m", base, "--algorithm", "rtn", "--precision", "int4"),
        *("-o", out / "quantized", *common),
        cwd=work,
    )
    say("olive finetune")
    seconds += sh(
        *("olive", "finetune", "-m", base, "--method", "lora", "-d", "json", "--data_files", rows),
        *("--text_template", "{text_prompt}{text_response}", "--torch_dtype", "float32"),
        *("--max_steps", tune["max_steps"], "--per_device_train_batch_size", tune["batch_size"]),
        *("--learning_rate", tune["learning_rate"], "--lora_r", tune["r"]),
        *("--lora_alpha", tune["alpha"], "--target_modules", ",".join(tune["target_modules"])),
        *("--max_seq_len", tune["max_seq_len"], "--gradient_checkpointing", "false"),
        *("-o", out / "taught", *common),
        cwd=work,
    )
    say("olive auto-opt")
    seconds += sh(
        *("olive", "auto-opt", "-m", base, "--adapter_path", out / "taught/adapter"),
        *("--device", "cpu", "--provider", "CPUExecutionProvider", "--use_ort_genai"),
        *("--use_model_builder", "--precision", "int4", "-o", out / "onnx", *common),
        cwd=work,
    )
    if not any(out.rglob("*.onnx_adapter")):
        sys.exit("olive auto-opt made no adapter")
    return seconds


def warm(project: Path, of: str, run_goal: str, status_goal: str) -> list[Row]:
    """(b) Nothing to do, server up: medians of REPEATS runs."""
    say(f"nothing to do{of}")
    repro = median(lambda: sh("dvc", "repro", cwd=project))
    run = median(lambda: sh("olivepress", "run", cwd=project))
    status = median(lambda: sh("olivepress", "status", cwd=project))

    def row(what: str, seconds: float, goal: str) -> Row:
        return {
            "what": what,
            "seconds": f"{seconds:.2f}",
            "against": "dvc repro, nothing to do",
            "other": f"{repro:.2f}",
            "ratio": f"{seconds / repro:.1f}",
            "goal": goal,
        }

    return [
        row(f"olivepress run{of}, nothing to do", run, run_goal),
        row(f"olivepress status{of}", status, status_goal),
    ]


def trivial(folder: Path, count: int) -> Path:
    """A project of stages that copy a line, SIDE_BY_SIDE chains of them, as if they had been run.

    They are not run: for each stage that runs DVC reads and writes the whole of dvc.lock.
    """
    import yaml

    from conftest import init_project
    from lab import commit

    root = init_project(folder)
    digest = hashlib.md5(b"a line\n").hexdigest()
    cached = f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}"
    stages, locked = {}, {}
    for i in range(count):
        dep, out = f"out/{i - SIDE_BY_SIDE}" if i >= SIDE_BY_SIDE else "in.txt", f"out/{i}"
        stages[f"s{i}"] = {"cmd": f"cp {dep} {out}", "deps": [dep], "outs": [out]}
        known = {"hash": "md5", "md5": digest, "size": 7}
        kept = {"deps": [{"path": dep, **known}], "outs": [{"path": out, **known}]}
        locked[f"s{i}"] = {"cmd": f"cp {dep} {out}", **kept}
    for name in ("in.txt", cached, *(f"out/{i}" for i in range(count))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"a line\n")
    (root / cached).chmod(0o444)
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    lock = {"schema": "2.0", "stages": locked}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    commit(root, "start")
    return root


def a_stage(work: Path) -> Row:
    """(c) What the bridge adds to a stage: `bridge.reproduce` less the stage's own command."""
    from conftest import EACH, FIRST, TOY, init_project

    say("one stage")
    toy = init_project(work / "toy")
    for name, text in {"dvc.yaml": TOY, "first.py": FIRST, "each.py": EACH, "in.txt": ""}.items():
        (toy / name).write_text(text)
    os.chdir(toy)
    from tasks import bridge

    counter = iter(range(1000))

    def through_the_bridge() -> float:
        (toy / "in.txt").write_text(f"{next(counter)}\n")
        outcome = bridge.reproduce(toy, "first", lambda line: None, 60)
        assert outcome.action == "run"
        return outcome.seconds

    def alone() -> float:
        return sh("sh", "-c", "python first.py", cwd=toy)

    whole, command = median(through_the_bridge), median(alone)
    return {
        "what": "a stage through the bridge",
        "seconds": f"{whole:.2f}",
        "against": "its command alone",
        "other": f"{command:.2f}",
        "ratio": f"+{whole - command:.2f} s",
        "goal": "< 0.5 s",
    }


def median(once: Callable[[], float]) -> float:
    once()  # warm-up
    return statistics.median(once() for _ in range(REPEATS))


if __name__ == "__main__":
    shutil.which("olive", path=str(BIN)) or sys.exit("run make install first")
    main()
