"""The flow and its tasks against a real Prefect server: states, keys, logs, artifacts, failures."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import Log, State, TaskRun

from conftest import REPO
from figures import MEASURED
from flows import summary
from flows.optimize import check_names, optimize
from lab import STAGES
from stages.errors import UserError
from tasks import bridge, overrides

pytestmark = pytest.mark.usefixtures("api")


def flow(**values: object) -> tuple[State, dict[str, TaskRun]]:
    """The final state of a run and its task runs by name."""
    state = optimize(values or None, return_state=True)
    return state, task_runs(flow_run_id(state))


def flow_run_id(state: State) -> UUID:
    assert state.state_details.flow_run_id
    return state.state_details.flow_run_id


def task_runs(run_id: UUID) -> dict[str, TaskRun]:
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
        return {run.name: run for run in client.read_task_runs(flow_run_filter=chosen)}


def states(runs: dict[str, TaskRun]) -> dict[str, str | None]:
    return {name: run.state_name for name, run in runs.items()}


def artifacts(run_id: UUID) -> dict[str | None, str]:
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        found = client.read_artifacts(artifact_filter=chosen)
        return {artifact.key: str(artifact.data) for artifact in found}


def logs(run_id: UUID, until: str) -> list[Log]:
    """The lines of a run, once one begins with `until`: they are sent in the background."""
    deadline = time.monotonic() + 20
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
    while time.monotonic() < deadline:
        with get_client(sync_client=True) as client:
            found = client.read_logs(wanted)
        if any(log.message.startswith(until) for log in found):
            return found
        time.sleep(0.05)
    pytest.fail(f"{until!r} is not among {[log.message for log in found]}")


def test_first_run_completes_and_second_is_cached(toy: Path) -> None:
    state, runs = flow()
    assert state.is_completed()
    assert states(runs) == {"first": "Completed", "each@travel": "Completed"}
    assert runs["first"].state is not None and runs["first"].state.message == "never run"
    _, again = flow()
    assert states(again) == {"first": "Cached", "each@travel": "Cached"}


def test_cache_key_of_a_task_run_is_dvcs_stage_key(toy: Path) -> None:
    _, runs = flow()
    for name, run in runs.items():
        key = bridge.reproduce(toy, name, print, 60).key
        assert run.state is not None and run.state.state_details.cache_key == key
        assert key is not None and (toy / ".dvc/cache/runs" / key[:2] / key).is_dir()


def test_work_done_by_dvc_repro_is_cached(toy: Path) -> None:
    from conftest import sh

    sh("dvc", "repro", cwd=toy)
    assert set(states(flow()[1]).values()) == {"Cached"}


def test_cached_means_on_disk(toy: Path) -> None:
    flow()
    (toy / "out/first").unlink()
    (toy / "out/each-travel").write_text("tampered")
    _state, runs = flow()
    assert states(runs) == {"first": "Cached", "each@travel": "Cached"}
    assert (toy / "out/first").read_text() == "hello\n"
    assert (toy / "out/each-travel").read_text() == "hello\n" * 2
    assert runs["first"].state is not None and "restored" in (runs["first"].state.message or "")


def test_overrides_change_params_yaml_and_what_is_stale(toy: Path) -> None:
    flow()
    _state, runs = flow(**{"quantize.bits": 8})
    assert states(runs) == {"first": "Completed", "each@travel": "Cached"}  # same bytes out
    assert runs["first"].state is not None
    assert runs["first"].state.message == "params quantize.bits 4 → 8"
    assert "bits: 8" in (toy / "params.yaml").read_text()


def test_a_bad_override_fails_the_run_before_any_stage(toy: Path) -> None:
    state, runs = flow(**{"quantize.bitz": 8})
    assert state.is_failed() and not runs
    assert state.message == (
        "params.yaml: quantize.bitz: unknown parameter; did you mean quantize.bits?"
    )


def test_a_failed_stage_fails_the_run_with_its_last_words(toy: Path) -> None:
    (toy / "first.py").write_text("import sys\nprint('noise')\nsys.exit('first: no such luck')\n")
    state, runs = flow()
    assert state.is_failed() and state.message == "first: no such luck"
    assert states(runs) == {"first": "Failed"}  # what depends on it was not started
    assert runs["first"].state is not None
    assert runs["first"].state.message == "first: no such luck"
    (toy / "first.py").write_text(
        "import os\nos.makedirs('out', exist_ok=True)\nopen('out/first', 'w').write('x')\n"
    )
    assert states(flow()[1])["first"] == "Completed"  # it ran again: a failure is not cached


def test_time_limit_of_one_stage(toy: Path) -> None:
    (toy / "first.py").write_text("import time\ntime.sleep(600)\n")
    state, _ = flow(**{"run.time_limits.first": 0.03})
    assert state.message == "first: stopped after its time limit of 0.03 minutes"


def test_a_time_limit_of_no_stage_fails_the_run(toy: Path) -> None:
    state, runs = flow(**{"run.time_limits.frist": 30})
    assert state.is_failed() and not runs
    assert state.message == (
        "params.yaml: run.time_limits.frist: no such stage; did you mean first?"
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("finetune", "finetune@travel"),
        ("evaluate@food", "evaluate@travel"),
        ("quantise", "quantize"),
    ],
)
def test_the_nearest_stage_is_named(name: str, near: str) -> None:
    graph = dict.fromkeys(STAGES)
    check_names("run.time_limits", {"quantize": 1, "finetune@travel": 2}, graph)
    with pytest.raises(UserError, match=rf"{name}: no such stage; did you mean {near}\?"):
        check_names("run.time_limits", {name: 30}, graph)


def test_what_earlier_runs_left_is_removed_and_told(toy: Path) -> None:
    flow(**{"adapters.food.data": "x"})
    (toy / "metrics").mkdir()
    (toy / "metrics/food.json").write_text("{}")
    shutil.copy(REPO / "params.yaml", toy)
    state, runs = flow()
    assert set(states(runs)) == {"first", "each@travel"}
    assert not (toy / "out/each-food").exists() and (toy / "out/each-travel").exists()
    logs(flow_run_id(state), "removed out/each-food, which an earlier run left")
    assert summary.metrics(toy) == {}  # only adapters of params.yaml


def test_a_damaged_cache_is_never_called_cached(toy: Path) -> None:
    flow()
    for path in (toy / ".dvc/cache/files/md5").rglob("*"):
        if path.is_file() and path.read_text() == "hello\n":
            path.chmod(0o644)
            path.write_text("jello\n")
            path.chmod(0o444)
    (toy / "out/first").unlink()
    _, runs = flow()
    assert states(runs) == {"first": "Completed", "each@travel": "Cached"}
    assert (toy / "out/first").read_text() == "hello\n"


def test_retries_are_off_and_can_be_switched_on(toy: Path) -> None:
    (toy / "first.py").write_text(
        "import os, sys\nopen('tries', 'a').write('x')\n"
        "if len(open('tries').read()) < 3: sys.exit('first: not yet')\n"
        "os.makedirs('out', exist_ok=True)\nopen('out/first', 'w').write('x')\n"
    )
    assert flow()[0].is_failed()
    assert (toy / "tries").read_text() == "x"
    state, runs = flow(**{"run.retries": 1})
    assert state.is_completed() and (toy / "tries").read_text() == "xxx"
    assert runs["first"].run_count == 2


def test_lines_of_a_stage_are_in_the_logs_of_the_run(toy: Path) -> None:
    state, runs = flow()
    found = logs(flow_run_id(state), "first was here")
    said = {log.message for log in found if log.task_run_id == runs["first"].id}
    assert "first was here" in said
    assert not any("progress" in line for line in said)


def test_artifacts_show_stages_and_reasons(toy: Path) -> None:
    run_id = flow_run_id(flow()[0])
    found = artifacts(run_id)
    assert {"stages", "summary"} <= set(found)
    for text in (found["stages"], found["summary"]):
        assert "each@travel" in text and "out/first" in text and "never run" in text


def test_a_run_links_to_its_report_and_shows_its_picture(toy: Path) -> None:
    (toy / "metrics").mkdir()
    (toy / "metrics/travel.json").write_text(json.dumps(MEASURED))
    found = artifacts(flow_run_id(flow()[0]))
    page = toy / "report/index.html"
    assert page.exists() and found["report"] == f"[{page}]({page.as_uri()})"
    assert found["pictures"].startswith("![Perplexity on travel, by stage](data:image/png;base64,")
    again = artifacts(flow_run_id(flow()[0]))
    assert "summary" in again and "report" not in again


def test_a_run_whose_gates_are_not_met_is_reported(toy: Path) -> None:
    (toy / "first.py").write_text(
        "import os, sys\nos.makedirs('metrics', exist_ok=True)\n"
        f"open('metrics/travel.json', 'w').write({json.dumps(MEASURED)!r})\n"
        "sys.exit('first: gates.min_top1_agreement: 0.1')\n"
    )
    state, _ = flow()
    assert state.is_failed() and "report" in artifacts(flow_run_id(state))


def test_a_report_that_cannot_be_written_fails_no_run(toy: Path) -> None:
    (toy / "metrics").mkdir()
    (toy / "metrics/travel.json").write_text(json.dumps(MEASURED))
    (toy / "report").write_text("in the way")
    state, _ = flow()
    assert state.is_completed()
    logs(flow_run_id(state), "no report was written: ")


def test_a_failed_run_leaves_its_table_too(toy: Path) -> None:
    (toy / "first.py").write_text("import sys\nsys.exit('first: broken | here')\n")
    found = artifacts(flow_run_id(flow()[0]))
    assert "first: broken \\| here" in found["summary"]


def test_long_stages_have_a_progress_artifact(toy: Path) -> None:
    text = (toy / "dvc.yaml").read_text().replace("  first:", "  quantize:")
    (toy / "dvc.yaml").write_text(text)
    (toy / "first.py").write_text(
        "import os, time\nprint('progress 1/4 layers', flush=True)\ntime.sleep(2.5)\n"
        "print('progress 4/4 layers', flush=True)\n"
        "os.makedirs('out')\nopen('out/first', 'w').write('x')\n"
    )
    found = artifacts(flow_run_id(flow()[0]))
    assert float(found[None]) == 100  # a progress artifact has no key


def test_stages_run_at_once_up_to_the_limit(toy: Path) -> None:
    names = [f"a{i}" for i in range(3)]
    overrides.apply(toy, {f"adapters.{name}.data": "x" for name in names} | {"run.concurrency": 2})
    (toy / "each.py").write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "Path(f'{sys.argv[1]}.began').write_text(str(time.time()))\ntime.sleep(1.5)\n"
        "Path(f'out/each-{sys.argv[1]}').write_text('x')\n"
        "Path(f'{sys.argv[1]}.ended').write_text(str(time.time()))\n"
    )
    assert flow()[0].is_completed()
    spans = [
        (float(p.read_text()), float(p.with_suffix(".ended").read_text()))
        for p in toy.glob("*.began")
    ]
    assert len(spans) == 4
    at_once = [sum(b <= began < e for b, e in spans) for began, _ in spans]
    assert max(at_once) == 2


def test_of_stages_that_can_start_the_one_higher_up_in_dvc_yaml_does(toy: Path) -> None:
    first = "  first:\n    cmd: python first.py"
    early = "  late-in-the-alphabet:\n    cmd: mkdir early\n    outs: [early]"
    text = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(text.replace(first, f"{early}\n{first}"))
    rows = flow(**{"run.concurrency": 1})[0].result()
    assert [row.stage for row in rows] == ["late-in-the-alphabet", "first", "each@travel"]


def test_the_graph_of_the_run_is_that_of_dvc_yaml(toy: Path) -> None:
    _, runs = flow()
    inputs = runs["each@travel"].task_inputs["wait_for"]
    assert [str(getattr(i, "id", "")) for i in inputs] == [str(runs["first"].id)]
