"""The stages themselves on a full disk and with too little memory, one after the other."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_scarcity import failed, full, run
from tiny import small_disk

from lab import STAGES
from tasks.command import Job
from tests.chaos.project import made

FAR_TOO_LITTLE = 350  # megabytes: PyTorch does not come up

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def disk(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The lab with all that it made, on a small disk."""
    with small_disk(tmp_path_factory.mktemp("scarce") / "disk", "400m") as folder:
        shutil.copytree(lab, folder, symlinks=True, dirs_exist_ok=True)
        yield folder


def lose(root: Path, stage: str) -> None:
    """Have a stage's outputs neither here nor in the cache."""
    shutil.rmtree(root / ".dvc/cache/runs", ignore_errors=True)
    for out in yaml.safe_load((root / "dvc.lock").read_text())["stages"][stage]["outs"]:
        kept = root / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]
        kept.unlink(missing_ok=True)
        path = root / out["path"]
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_at_a_stage(
    disk: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disk)
    before = made(disk)
    lose(disk, stage)
    with full(disk):
        said = failed(disk, stage)
    assert said.startswith(f"{stage.partition('@')[0]}") and "space left on" in said, said
    assert run(disk, stage).action == "run"
    assert made(disk) == before


@pytest.mark.parametrize("stage", ["quantize", "measure", "export", "finetune", "evaluate"])
@pytest.mark.parametrize("megabytes", [FAR_TOO_LITTLE, 520, 560, 600, 700])
def test_too_little_memory_for_a_stage(lab: Path, stage: str, megabytes: int) -> None:
    """At whatever line it runs out: it is told, or there was enough."""
    adapter = ["--adapter", "travel"] if stage in ("finetune", "evaluate") else []
    # Each thread of a library reserves memory of its own.
    job = Job(lambda line: None, 600, {"OMP_NUM_THREADS": "1"})
    code = job.run(
        ["python", "-m", f"stages.{stage}", *adapter],
        dict(os.environ),
        cwd=lab,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20)
        ),
    )
    assert code or megabytes > FAR_TOO_LITTLE
    if code:
        said = job.last_words(stage) or ""
        assert said.startswith(f"{stage}: memory ran out"), job.lines[-20:]
