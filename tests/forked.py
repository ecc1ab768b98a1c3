"""Stages in processes that have their slow imports already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# A stage begins with seconds of imports. This process makes them once, and each stage is a fork.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["passes.lora", "stages.scoring", "stages.generation", "transformers.models.phi3.modeling_phi3"]
)


def fork_stage(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """As `tiny.run_stage`, for a stage that computes."""
    said = project / ".said.out", project / ".said.err"
    process = FORKS.Process(target=_stage, args=(project, command, dict(os.environ), said))
    process.start()
    process.join()
    texts = [path.read_text() for path in said]
    for path in said:
        path.unlink()
    return subprocess.CompletedProcess(command, process.exitcode or 0, *texts)


def _stage(
    project: Path, command: tuple[str, ...], env: dict[str, str], said: tuple[Path, Path]
) -> None:
    os.environ.clear()
    os.environ.update(env | {"PYTHONPATH": f"{REPO}:{REPO / 'tests/watch'}"})
    for stream, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(project)
    runpy.run_path(str(REPO / "tests/watch/sitecustomize.py"))
    sys.argv = [f"stages.{command[0]}", *command[1:]]
    runpy.run_module(f"stages.{command[0]}", run_name="__main__", alter_sys=True)
