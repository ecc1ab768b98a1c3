"""The flow that new data starts, against a real server, real DVC and a Git upstream on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import State
from test_flow import flow_run_id, logs, states, task_runs

from conftest import reproduce, sh
from flows.refresh import refresh

pytestmark = pytest.mark.usefixtures("api")

NAMES = ("-c", "user.name=test", "-c", "user.email=test@localhost")


def run(**values: bool) -> tuple[State, dict[str, str | None]]:
    """The final state, and that of each stage's task run."""
    state: State = refresh(**values, return_state=True)  # type: ignore[assignment,call-overload]
    inner = children(flow_run_id(state))
    return state, states(task_runs(inner[0])) if inner else {}


def children(run_id: UUID) -> list[UUID]:
    """The subflow runs of a flow run."""
    under = FlowRunFilterParentFlowRunId(any_=[run_id])
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=under))
        return [child.id for child in found]


def said(state: State, word: str) -> str:
    """The line of a run's log that begins with a word."""
    found = logs(flow_run_id(state), word)
    return next(log.message for log in found if log.message.startswith(word))


def commit(folder: Path, message: str) -> None:
    sh("git", "add", "--all", cwd=folder)
    sh("git", *NAMES, "commit", "--quiet", "-m", message, cwd=folder)


@pytest.fixture
def shared(toy: Path, tmp_path: Path) -> Path:
    """The toy project with an upstream, brought up to date; returns a colleague's clone."""
    for path in ("out", "__pycache__"):
        with (toy / ".gitignore").open("a") as file:
            file.write(f"/{path}\n")
    commit(toy, "start")
    sh("git", "init", "--quiet", "--bare", "up.git", cwd=tmp_path)
    sh("git", "remote", "add", "origin", str(tmp_path / "up.git"), cwd=toy)
    sh("git", "push", "--quiet", "--set-upstream", "origin", "HEAD", cwd=toy)
    sh("git", "clone", "--quiet", "up.git", "colleague", cwd=tmp_path)
    reproduce(toy)
    return tmp_path / "colleague"


def push(colleague: Path, message: str, **files: str) -> None:
    for name, text in files.items():
        (colleague / name.replace("_", ".")).write_text(text)
    commit(colleague, message)
    sh("git", "push", "--quiet", cwd=colleague)


def test_nothing_changed_starts_no_stage(toy: Path) -> None:
    reproduce(toy)
    state, stages = run()
    assert state.is_completed() and state.message == "nothing changed" and not stages
    assert not task_runs(flow_run_id(state)) and not children(flow_run_id(state))


def test_changed_data_runs_what_it_makes_stale(toy: Path) -> None:
    reproduce(toy)
    (toy / "in.txt").write_text("news\n")
    state, stages = run()
    assert state.is_completed() and state.message == "first: in.txt modified; 1 more"
    assert stages == {"first": "Completed", "each@travel": "Completed"}
    assert (toy / "out/each-travel").read_text() == "news\n" * 2
    assert said(state, "stale: each") == "stale: each@travel: waits for first"
    assert run()[0].message == "nothing changed"


def test_a_stage_that_fails_fails_the_run(toy: Path) -> None:
    (toy / "first.py").write_text("import sys\nsys.exit('first: no such luck')\n")
    state, stages = run()
    assert state.is_failed() and state.message == "first: no such luck"
    assert stages == {"first": "Failed"}


def test_a_mistake_in_dvc_yaml_fails_the_run(toy: Path) -> None:
    (toy / "dvc.yaml").write_text("stages: 7\n")
    state, stages = run()
    assert state.is_failed() and "dvc.yaml" in (state.message or "") and not stages


def test_a_commit_of_the_upstream_is_pulled_and_run(toy: Path, shared: Path) -> None:
    push(shared, "News", in_txt="news\n")
    state, stages = run()
    assert state.is_completed() and set(stages.values()) == {"Completed"}
    assert (toy / "out/each-travel").read_text() == "news\n" * 2
    assert said(state, "pulled").endswith(" News")
    push(shared, "Words of it", README="nothing that a stage reads\n")
    state, stages = run()  # dvc.lock, which the run wrote, does not stop it
    assert state.message == "nothing changed" and (toy / "README").exists()


def test_the_upstreams_dvc_lock_replaces_that_of_a_run_here(toy: Path, shared: Path) -> None:
    commit(toy, "lock")
    sh("git", "push", "--quiet", cwd=toy)
    sh("git", "pull", "--quiet", cwd=shared)
    (toy / "in.txt").write_text("news\n")
    run()
    sh("git", "checkout", "--quiet", "in.txt", cwd=toy)
    shutil.copytree(toy / ".dvc/cache", shared / ".dvc/cache")
    (shared / "in.txt").write_text("other\n")
    sh("dvc", "repro", cwd=shared)
    push(shared, "Other")
    state, _ = run()
    assert state.is_completed() and said(state, "pulled").endswith(" Other")
    assert (toy / "out/first").read_text() == "other\n"
    (toy / "in.txt").write_text("news\n")  # what was run here before is not computed again
    assert set(run()[1].values()) == {"Cached"}


def test_changed_files_are_not_pulled_over(toy: Path, shared: Path) -> None:
    push(shared, "News", in_txt="news\n")
    (toy / "each.py").write_text((toy / "each.py").read_text() + "# mine\n")
    state, stages = run()
    assert said(state, "not pulled") == (
        "not pulled: files are changed here: each.py; commit or restore them"
    )
    assert (toy / "in.txt").read_text() == "hello\n"
    assert stages == {"first": "Cached", "each@travel": "Completed"}


def test_a_dead_upstream_is_a_warning(toy: Path, shared: Path) -> None:
    sh("git", "remote", "set-url", "origin", "http://127.0.0.1:9/up.git", cwd=toy)
    (toy / "in.txt").write_text("news\n")
    commit(toy, "News")
    state, stages = run()
    assert state.is_completed() and set(stages.values()) == {"Completed"}
    assert "Failed to connect to 127.0.0.1 port 9" in said(state, "not pulled: ")


def test_a_branch_that_went_its_own_way_is_left(toy: Path, shared: Path) -> None:
    push(shared, "Theirs", in_txt="theirs\n")
    (toy / "in.txt").write_text("mine\n")
    commit(toy, "Mine")
    state, _ = run()
    assert "fast-forward" in said(state, "not pulled: ")
    assert (toy / "out/first").read_text() == "mine\n"


def test_pulling_can_be_switched_off(toy: Path, shared: Path) -> None:
    push(shared, "News", in_txt="news\n")
    state, _ = run(pull=False)
    assert state.message == "nothing changed" and (toy / "in.txt").read_text() == "hello\n"


def test_data_that_a_commit_names_comes_from_the_remote(
    toy: Path, shared: Path, tmp_path: Path
) -> None:
    sh("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"), cwd=shared)
    sh("git", "rm", "--quiet", "--cached", "in.txt", cwd=shared)
    sh("dvc", "add", "in.txt", cwd=shared)
    sh("dvc", "push", "in.txt.dvc", cwd=shared)
    push(shared, "in.txt is DVC's")
    assert run()[0].message == "nothing changed"  # the same bytes, fetched

    (shared / "in.txt").write_text("news\n")
    sh("dvc", "add", "in.txt", cwd=shared)
    sh("dvc", "push", "in.txt.dvc", cwd=shared)
    push(shared, "News")
    state, stages = run()
    assert set(stages.values()) == {"Completed"}
    assert (toy / "out/first").read_text() == "news\n"
    assert said(state, "data") == (f"data of in.txt.dvc: 1 files fetched from {tmp_path / 'store'}")

    (toy / "in.txt").write_text("mine\n")  # newer than its .dvc file: a person's
    run()
    assert (toy / "out/first").read_text() == "mine\n"

    (toy / "in.txt").unlink()
    shutil.rmtree(tmp_path / "store")
    shutil.rmtree(toy / ".dvc/cache/files")
    state, _ = run()
    assert said(state, f"data not fetched: remote store ({tmp_path / 'store'})")  # a warning
    assert state.is_failed()  # and the stage says what it lacks
    assert "in.txt" in (state.message or "")


def test_a_stage_at_work_is_not_disturbed(toy: Path, shared: Path) -> None:
    push(shared, "News", in_txt="news\n")
    (toy / "first.py").write_text(
        "import time\nfrom pathlib import Path\nbegan = Path('began')\nbegan.touch()\n"
        "while began.exists():\n    time.sleep(0.1)\n"
    )
    busy = subprocess.Popen([sys.executable, "-m", "dvc", "repro"], cwd=toy, env=os.environ)
    while not (toy / "began").exists():
        assert busy.poll() is None
        time.sleep(0.1)
    state, stages = run()
    busy.kill()
    busy.wait()
    (toy / "began").unlink()
    assert state.message == "another run is at work in this clone; the next poll looks"
    assert not stages and (toy / "in.txt").read_text() == "hello\n"
    sh("git", "checkout", "first.py", cwd=toy)
    assert set(run()[1].values()) == {"Completed"}  # what is left of a killed one blocks nothing
