"""A project whose stages are quick and know what they cost, for sweeps over many machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import BIN, init_project, sh
from lab import commit

PIPELINE = """
stages:
  quantize:
    cmd: python stage.py quantize
    deps: [stage.py, in.txt]
    params: [quantize.bits, quantize.group_size]
    outs: [models/quantized]
  measure:
    cmd: python stage.py measure
    deps: [stage.py, models/quantized]
    outs: [models/measured]
    metrics: [metrics/quantized/text.json]
  export:
    cmd: python stage.py export
    deps: [stage.py, models/quantized]
    outs: [models/onnx]
  finetune:
    foreach: ${adapters}
    do:
      cmd: python stage.py finetune ${key}
      deps: [stage.py, models/quantized]
      params: [finetune.learning_rate, finetune.max_steps]
      outs: ["models/adapters/${key}"]
  evaluate:
    foreach: ${adapters}
    do:
      cmd: python stage.py evaluate ${key}
      deps: [stage.py, models/onnx, "models/adapters/${key}"]
      outs: ["models/evaluated/${key}"]
      metrics: ["metrics/${key}.json"]
"""
# Weights are counted in bytes; each stage says in $RAN that it ran, and sleeps as long as $SLEEP.
STAGE = """
import json, os, sys, time
from pathlib import Path
import yaml

stage, key = sys.argv[1], (sys.argv[2:] or [""])[0]
name = f"{stage}@{key}" if key else stage
params = yaml.safe_load(open("params.yaml"))
if ran := os.environ.get("RAN"):
    with open(ran, "a") as file:
        file.write(f"{name} {os.getpid()} {os.getcwd()}\\n")
sleep = json.loads(os.environ.get("SLEEP", "{}"))
time.sleep(sleep.get(stage, 0))
bits, group = params["quantize"]["bits"], params["quantize"]["group_size"]


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


if stage == "quantize":
    write("models/quantized/weights", "w" * (bits * 1000 + 32000 // group))
elif stage == "measure":
    ratio = 1 + group / (1000 * bits)
    write("metrics/quantized/text.json", json.dumps(
        {"text_perplexity": {"base": 10, "quantized": 10 * ratio}, "size_mb": {}}))
    write("models/measured", "yes")
elif stage == "export":
    write("models/onnx/model.onnx", Path("models/quantized/weights").read_text())
elif stage == "finetune":
    tune = params["finetune"]
    write(f"models/adapters/{key}", f"{tune['learning_rate']} {tune['max_steps']} {bits} {group}")
elif stage == "evaluate":
    rate, steps, bits, group = map(float, Path(f"models/adapters/{key}").read_text().split())
    perplexity = 1 + group / (100 * bits) + 10 / steps + abs(rate - 0.005)
    size = Path("models/onnx/model.onnx").stat().st_size / 1e6
    write(f"metrics/{key}.json", json.dumps({
        "onnx_on": {"perplexity": perplexity, "exact_answer_rate": 0.5},
        "text_perplexity": {"base": 10, "quantized": 11, "onnx_off": 11},
        "base": None, "quantized": None, "quantized_lora": None, "onnx_off": None,
        "not_measured": None, "agreement": {"top1": 1.0, "mean_kl": 0.0},
        "size_mb": {"base": 1, "quantized": size, "onnx": size, "adapter": 0.1},
        "speed": {"adapter_on": {"tokens_per_second": 1000 / bits, "time_to_first_token_ms": 2},
                  "adapter_off": {"tokens_per_second": 1000 / bits}, "peak_rss_mb": 10}}))
    write(f"models/evaluated/{key}", str(perplexity))
"""
GRID = {
    "name": "grid",
    "sampler": "grid",
    "space": {"quantize.bits": [4, 8], "finetune.max_steps": [100, 200, 300]},
    "objectives": {"perplexity": "minimize", "size_mb": "minimize"},
}


def make(folder: Path) -> Path:
    """The project, committed."""
    init_project(folder)
    for name, text in {"dvc.yaml": PIPELINE, "stage.py": STAGE, "in.txt": "hello\n"}.items():
        (folder / name).write_text(text)
    (folder / "data").mkdir()
    for name in ("travel.jsonl", "everyday.jsonl"):
        (folder / "data" / name).write_text('{"prompt": "a", "response": "b"}\n')
    (folder / ".gitignore").write_text("/models/\n/metrics/\n/sweeps/\n.prefect/\nprefect.toml\n")
    commit(folder, "start")
    return folder


@dataclass
class Machine:
    """A clone with a worker, as if on a machine of its own.

    Args:
        folder: the clone.
        process: the worker, first of its session.
        ran: what its stages were.
    """

    folder: Path
    process: subprocess.Popen
    ran: Path

    @property
    def stages(self) -> list[str]:
        """The stages that ran here, in order."""
        lines = self.ran.read_text().splitlines() if self.ran.exists() else []
        return [line.split()[0] for line in lines]

    def processes(self) -> list[int]:
        """Every process of this machine: all that run in its session or work in its clone."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ = (entry / "environ").read_bytes()
                    dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                except OSError:
                    continue
                if f"RAN={self.ran}".encode() in environ and not dead:
                    found.append(int(entry.name))
        return found

    def switch_off(self) -> None:
        """Kill all of it at once."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@contextmanager
def machine(
    folder: Path, api: str, name: str, sleep: dict[str, float] | None = None, **env: str
) -> Iterator[Machine]:
    """A worker in a clone, until the end of the block."""
    ran = folder.parent / f"{name}.ran"
    with (folder.parent / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [BIN / "olivepress", "worker", "--name", name],
            cwd=folder,
            env={
                **os.environ,
                "PREFECT_API_URL": api,
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "RAN": str(ran),
                "SLEEP": json.dumps(sleep or {}),
                **env,
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        found = Machine(folder, process, ran)
        try:
            yield found
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            found.switch_off()


def clone(project: Path, folder: Path) -> Path:
    sh("git", "clone", "--quiet", str(project), str(folder), cwd=folder.parent)
    return folder


def wait_until(true: Any, seconds: float = 120) -> None:
    """Return once `true()` is; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)
