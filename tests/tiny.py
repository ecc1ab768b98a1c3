"""A project with a tiny random model, for tests of one stage through its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
import yaml

from stages.errors import UserError
from stages.params import Params, load
from stages.stage import versions, write_json
from tests.models import save_model

REPO = Path(__file__).resolve().parents[1]


def make_project(folder: Path, **changes: object) -> Path:
    """Make `folder` a project: params.yaml with `changes` (dotted keys), and the toolchain.

    Its base model is a tiny Phi-3, in tiny/ for base.source local and in models/base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load((REPO / "params.yaml").read_text("utf-8"))
    values["base"] |= {"source": "local", "path": "tiny"}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    (folder / "models").mkdir(exist_ok=True)
    write_json(folder / "models/toolchain.json", versions())
    save_model(folder / "tiny", "phi3")
    save_model(folder / "models/base", "phi3")
    (folder / "data").mkdir(exist_ok=True)
    known = "".join(json.dumps({"text": f"{i} is less than {i + 1}."}) + "\n" for i in range(50))
    (folder / "data/everyday.jsonl").write_text(known, "utf-8")
    return folder


def run_stage(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m stages.…` in a project, as DVC does."""
    return subprocess.run(
        [sys.executable, "-m", f"stages.{command[0]}", *command[1:]],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests/watch'}"},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_refused(project: Path, done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 1, a message with these parts and no traceback, and nothing half written."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    assert not [p for p in project.rglob("*") if ".tmp-" in p.name]


def refused(project: Path, main: Callable[[Params], None], *parts: str) -> str:
    """As `assert_refused`, of a stage that is run in this process: its imports take 0.5 to 2 s."""
    with chdir(project), pytest.raises(UserError) as caught:
        main(load())
    said = str(caught.value)
    for part in parts:
        assert part in said
    assert not [p for p in project.rglob("*") if ".tmp-" in p.name]
    return said


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Make `folder` a disk of `size`, such as 64k; only root on Linux can, so others skip."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def questions(count: int) -> list[dict]:
    return [{"prompt": f"How far is {i}?", "response": f"It is {i} km."} for i in range(count)]
