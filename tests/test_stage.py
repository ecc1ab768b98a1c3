"""What every stage shares: outputs that are whole or absent, messages, and the record of a run."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

from conftest import REPO, sh
from stages import stage
from stages.errors import UserError


def test_an_output_appears_only_when_nothing_was_raised(tmp_path: Path) -> None:
    path = tmp_path / "deep/out"
    with pytest.raises(ValueError), stage.new_output(path) as out:
        out.write_text("half")
        assert not path.exists()
        raise ValueError
    assert list(path.parent.iterdir()) == []
    with stage.new_output(path) as out:
        out.write_text("whole")
    assert path.read_text() == "whole"


def test_a_failure_leaves_the_previous_output_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with stage.new_output(path) as out:
        out.mkdir()
        (out / "file").write_text("first")
    with pytest.raises(ValueError), stage.new_output(path) as out:
        out.mkdir()
        raise ValueError
    assert (path / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".out.tmp-1"
    left.mkdir()
    (left / "half").write_text("x")
    with stage.new_output(tmp_path / "out") as out:
        out.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_outputs_can_be_read_by_whoever_may_read_the_folder(tmp_path: Path) -> None:
    """The safetensors library makes files of mode 0600."""
    (tmp_path / "plain").write_text("x")
    with stage.new_output(tmp_path / "out") as out:
        out.mkdir()
        (out / "weights").touch(mode=0o600)
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out/weights").stat().st_mode == mode


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """After a power cut an empty file could have the name."""
    said: list[str] = []
    path = tmp_path / "out"
    name = f".out.tmp-{os.getpid()}"
    if kind == "file":
        path.write_text("before")

    def fsync(number: int) -> None:
        said.append(Path(f"/proc/self/fd/{number}").readlink().relative_to(tmp_path).as_posix())

    def replace(source: Path, target: Path) -> None:
        assert path.exists() == (kind == "file")
        said.append("replace")
        Path(source).rename(target)

    monkeypatch.setattr(stage.os, "fsync", fsync)
    monkeypatch.setattr(stage.os, "replace", replace)
    with stage.new_output(path) as out:
        if kind == "folder":
            (out / "inner").mkdir(parents=True)
            (out / "inner/b").touch()
            (out / "a").touch()
        else:
            out.touch()
    folder = [f"{name}/a", f"{name}/inner", f"{name}/inner/b"] if kind == "folder" else []
    assert sorted(said[:-2]) == [name, *folder]
    assert said[-2:] == ["replace", "."]


def test_writing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing was written"), stage.new_output(tmp_path / "x"):
        pass


def run_failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of a stage that raises, in this process and in an environment that is put back."""

    def main(params: object) -> None:
        raise error

    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["stage"])
    monkeypatch.setattr(stage, "die_with_parent", lambda: None)
    with mock.patch.dict(os.environ):
        stage.run(main, "toolchain")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("data/x.jsonl:3: not JSON"), "toolchain: data/x.jsonl:3: not JSON"),
        (
            OSError(errno.ENOSPC, "full", "models/x"),
            "toolchain: no space left on the disk: models/x",
        ),
        (OSError(errno.EDQUOT, "quota"), "toolchain: no space left on the disk: while writing"),
    ],
)
def test_a_users_mistake_and_a_full_disk_are_messages(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_failing(error, monkeypatch)
    assert ended.value.code == message  # text as exit code: printed on stderr, exit 1


def test_another_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="broken disk"):
        run_failing(OSError(errno.EIO, "broken disk"), monkeypatch)


def test_a_stage_refuses_libraries_other_than_those_recorded(toy: Path) -> None:
    sh(sys.executable, "-m", "stages.toolchain", cwd=toy, PYTHONPATH=str(REPO))
    path = toy / "models/toolchain.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps(recorded | {"olive-ai": "0.1"}))
    done = sh(*(sys.executable, "-m", "stages.fetch"), cwd=toy, check=False, PYTHONPATH=str(REPO))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"says olive-ai 0.1, installed is {recorded['olive-ai']}" in done.stderr


def test_a_stage_before_the_toolchain_says_what_to_do(toy: Path) -> None:
    done = sh(*(sys.executable, "-m", "stages.fetch"), cwd=toy, check=False, PYTHONPATH=str(REPO))
    assert done.returncode == 1
    assert "models/toolchain.json is missing; run `olivepress run`" in done.stderr


def test_an_adapter_that_is_not_in_params(toy: Path) -> None:
    sh(sys.executable, "-m", "stages.toolchain", cwd=toy, PYTHONPATH=str(REPO))
    done = sh(
        *(sys.executable, "-m", "stages.prepare", "--adapter", "nope"),
        cwd=toy,
        check=False,
        PYTHONPATH=str(REPO),
    )
    assert done.returncode == 1 and "adapters.nope: no such adapter" in done.stderr


def test_the_record_says_when_where_and_by_what(toy: Path) -> None:
    sh(
        *(sys.executable, "-m", "stages.toolchain"),
        cwd=toy,
        PYTHONPATH=str(REPO),
        OLIVEPRESS_RUN_ID="run-7",
    )
    record = json.loads((toy / "models/lineage/toolchain.json").read_text())
    assert record["run_id"] == "run-7" and record["versions"] == stage.versions()
    assert record["seconds"] >= 0 and record["started"].endswith("+00:00")
    assert {"git_commit", "git_dirty", "platform", "stage"} <= set(record)


def test_the_toolchain_names_what_changes_outputs_and_nothing_else() -> None:
    found = stage.versions()
    assert {"olive-ai", "onnxruntime-genai", "torch", "transformers", "python"} <= set(found)
    assert not {"pytest", "prefect", "dvc", "ruff"} & set(found)
    assert not any("+" in version for version in found.values())  # a build tag, not a version
