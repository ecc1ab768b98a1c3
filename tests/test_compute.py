"""A stage on a cluster: the real SDK, against Azure on loopback and a DVC remote in its storage."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import BIN, REPO, hears_ctrl_c, sh, typed
from flows.optimize import check_names
from lab import commit
from stages import params
from stages.azure import Place
from stages.errors import UserError
from tasks import bridge
from tasks.compute import watch
from tasks.compute.__main__ import main
from tasks.compute.request import Request
from tests.emulator.client import Azure

# Says where it works, and waits until a test lets it go on.
WAITING = """
import os, time
from pathlib import Path
print("progress 1/2 half way")
print("begun", os.getcwd(), flush=True)
Path("begun").touch()
while not Path("go").exists():
    time.sleep(0.05)
Path("out").mkdir(exist_ok=True)
Path("out/first").write_text(Path("in.txt").read_text())
"""


@pytest.fixture
def cloud(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> Iterator[Azure]:
    """An empty Azure, for clients in this process and in those it starts."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.1)
    azure.reset()
    with azure.here():
        yield azure
    azure.reset()


@pytest.fixture
def project(toy: Path, cloud: Azure) -> Path:
    """The toy, whose first stage runs on the cluster; the login opens the remote."""
    (toy / ".dvc/config.local").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n"
        f"    url = azure://{cloud.world['container']}/dvc\n"
        f"    account_name = {cloud.world['account']}\n"
    )
    settle(toy, {"first": "azureml"}, cluster=cloud.world["cluster"])
    commit(toy, "start")
    return toy


def settle(project: Path, compute: dict[str, str], **azure: str | None) -> None:
    """Set sections of params.yaml."""
    path = project / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["azure"] |= azure
    values["compute"] = compute
    path.write_text(yaml.safe_dump(values))


def begin(project: Path, cloud: Azure, api: str) -> subprocess.Popen[str]:
    """`olivepress run` in the background."""
    return subprocess.Popen(
        [BIN / "olivepress", "run"],
        cwd=project,
        env={**os.environ, "PREFECT_API_URL": api},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509
    )


def asked(cloud: Azure, **change: Any) -> Request:
    """What the flow asks of the cluster for the first stage."""
    names = (cloud.world[name] for name in ("subscription", "resource_group", "workspace"))
    values = {
        "stage": "first",
        "key": "0" * 64,
        "made": [],
        "files": ["in.txt"],
        "place": Place(*names),
        "cluster": cloud.world["cluster"],
        "instance_type": None,
        "limit_seconds": 60,
    }
    return Request(**{**values, **change})


def refusal(cloud: Azure, **change: Any) -> str:
    """The one message with which it ends, in this process."""
    with pytest.raises(UserError) as caught:
        main(asked(cloud, **change))
    return str(caught.value)


def last_line(project: Path, cloud: Azure) -> str:
    """The same of the process that the flow starts."""
    command = (sys.executable, "-m", "tasks.compute", asked(cloud).as_json())
    done = sh(*command, cwd=project, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    return done.stderr


def jobs(cloud: Azure) -> list[str]:
    """Names of the jobs that were submitted, oldest first."""
    puts = cloud.calls(r"/jobs/[^/]+\?", method="PUT", status=201)
    return [call["path"].rpartition("/")[2] for call in puts]


def work(cloud: Azure, job: str) -> Path:
    """Where the emulator runs a job."""
    return cloud.home / "jobs" / job / "code"


def until(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def started(cloud: Azure, count: int = 1) -> str:
    """The name of the latest job, once its stage is at work."""
    until(lambda: len(jobs(cloud)) == count and (work(cloud, jobs(cloud)[-1]) / "begun").exists())
    return jobs(cloud)[-1]


def logs(api: str, flow_run: str) -> str:
    """What a flow run and its tasks logged."""
    import requests

    asked = {"logs": {"flow_run_id": {"any_": [flow_run]}}, "sort": "TIMESTAMP_ASC"}
    answer = requests.post(f"{api}/logs/filter", json=asked, timeout=30).json()
    return "\n".join(line["message"] for line in answer)


def test_a_stage_runs_there_and_is_here_afterwards(project: Path, cloud: Azure, api: str) -> None:
    run = ("run", "--json")
    done = typed(*run, cwd=project, PREFECT_API_URL=api)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    rows = {row["stage"]: row for row in report["stages"]}
    assert rows["first"]["state"] == "Completed"
    assert rows["first"]["reason"] == f"on {cloud.world['cluster']}: never run"
    assert (project / "out/each-travel").read_text() == "hello\n" * 2
    (job,) = jobs(cloud)
    assert job == f"olivepress-first-{rows['first']['key'][:16]}-1"
    assert {need.action for need in bridge.status(project).values()} == {"unchanged"}
    run_id = report["url"].rpartition("/")[2]
    until(lambda: f"job {job}: Completed" in logs(api, run_id))
    said = logs(api, run_id)
    assert "first was here" in said and f"https://ml.azure.com/runs/{job}" in said
    with cloud.here():
        spec = cloud.ml().jobs.get(job)
    assert spec.environment_variables["OLIVEPRESS_RUN_ID"] == run_id
    sent_from = sh("git", "rev-parse", "HEAD", cwd=project).stdout.strip()
    commit = {"git_commit": sent_from, "git_dirty": False}
    assert json.loads(spec.environment_variables["OLIVEPRESS_COMMIT"]) == commit
    code = [path for path in work(cloud, job).rglob("*") if path.is_file()]
    assert work(cloud, job) / "first.py" in code
    written = b"".join(path.read_bytes() for path in code).decode("utf-8", "replace")
    assert_no_secrets(cloud, done.stdout + done.stderr + said + str(spec) + written)
    again = json.loads(typed(*run, cwd=project, PREFECT_API_URL=api).stdout)
    assert [row["state"] for row in again["stages"]] == ["Cached", "Cached"]
    shutil.rmtree(project / ".dvc/cache")
    main(asked(cloud, key=rows["first"]["key"]))
    assert bridge.status(project)["first"].action == "unchanged"
    assert jobs(cloud) == [job]


def assert_no_secrets(cloud: Azure, text: str) -> None:
    assert len(text) > 1000
    assert cloud.env["AZURE_CLIENT_SECRET"] not in text
    assert not re.search(r"sig=[^*]|AccountKey=[^*]|Bearer [^*]", text)


def test_a_killed_run_finds_its_job_again(project: Path, cloud: Azure, api: str) -> None:
    """The first is ended by SIGKILL, the second watches the same job to its end.

    The stage reads what another made here, so that goes there first.
    """
    settle(project, {"each": "azureml"})
    (project / "each.py").write_text(
        WAITING + "Path('out/each-travel').write_text(Path('out/first').read_text() + 'there')\n"
    )
    process = begin(project, cloud, api)
    job = started(cloud)
    process.kill()
    process.wait()
    again = begin(project, cloud, api)
    seen = len(cloud.calls(f"runs/{job}/details"))
    until(lambda: len(cloud.calls(f"runs/{job}/details")) > seen)
    (work(cloud, job) / "go").touch()
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "Completed each@travel" in said, said
    assert jobs(cloud) == [job]
    assert (project / "out/each-travel").read_text() == "hello\nthere"


def test_ctrl_c_cancels_the_job(project: Path, cloud: Azure, api: str) -> None:
    (project / "first.py").write_text(WAITING)
    process = begin(project, cloud, api)
    job = started(cloud)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "what was finished is kept" in said
    assert len(cloud.calls(f"/jobs/{job}/cancel", method="POST")) == 1
    with cloud.here():
        until(lambda: cloud.ml().jobs.get(job).status == "Canceled")


def test_what_is_missing_is_said_before_anything_is_sent(project: Path, cloud: Azure) -> None:
    said = refusal(cloud, cluster="small")
    assert "has no cluster small: az ml compute create --type AmlCompute --name small" in said
    (project / "new.txt").touch()
    said = refusal(cloud, files=["in.txt", "new.txt"])
    assert "new.txt: first reads it, and neither Git nor DVC keeps it" in said
    local, kept = project / ".dvc/config.local", project / ".dvc/config"
    local.unlink()
    assert "no remote is configured" in refusal(cloud)
    kept.write_text(kept.read_text() + "['remote \"store\"']\n    account_key = c2VjcmV0\n")
    assert ".dvc/config: account_key is a secret in a file that Git keeps" in refusal(cloud)
    assert not cloud.blobs() and not jobs(cloud)


def test_a_job_that_cannot_start_is_told_with_the_reason(project: Path, cloud: Azure) -> None:
    cloud.cluster(quota=True)
    assert "no quota for its machine: Operation results in exceeding" in refusal(cloud)
    error = {"code": "ImageBuildFailure", "message": "Image build failed.\nSee the log."}
    ended = {"status": "Failed", "error": {"error": error}, "logFiles": {}}
    cloud.fault(path="/details", status=200, body=ended)
    said = refusal(cloud)
    assert said == (
        f"job {jobs(cloud)[-1]} failed: its environment could not be built: Image build failed."
    )
    assert len(jobs(cloud)) == 2 and jobs(cloud)[-1].endswith("-2")


def test_last_words_from_there_though_the_log_breaks_off(project: Path, cloud: Azure) -> None:
    (project / "first.py").write_text("import sys\nsys.exit('first: row 3 is bad')\n")
    cloud.fault(host="blob", path="std_log", method="GET", cut_response=3)
    assert last_line(project, cloud) == "first: row 3 is bad\n"


def test_a_remote_that_the_cluster_does_not_reach(project: Path, cloud: Azure) -> None:
    config = project / ".dvc/config.local"
    config.write_text(config.read_text().replace(cloud.world["container"], "nowhere"))
    said = refusal(cloud)
    assert said.startswith("first: on the cluster: remote store (azure://nowhere/dvc): ")
    assert "is not there" in said


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("compute.quantise", "azureml", "compute.quantise: no such stage; did you mean quantize"),
        ("compute.quantize", "moon", "compute.quantize: must be 'here' or 'azureml'"),
        ("compute.quantize", "azureml", "azure.cluster: which cluster"),
    ],
)
def test_what_params_may_say(key: str, value: str, message: str) -> None:
    values = yaml.safe_load((REPO / "params.yaml").read_text())
    values["azure"]["cluster"] = "gpu" if "did you mean" in message else None
    section, _, name = key.partition(".")
    values[section][name] = value
    with pytest.raises(UserError, match=re.escape(message)):
        check_names("compute", params.check(values).compute, ["quantize"])


def test_an_entry_of_its_own_counts_before_that_of_the_group() -> None:
    values = yaml.safe_load((REPO / "params.yaml").read_text())
    values["azure"]["instance_type"] = "Standard_NC24ads_A100_v4"
    values["compute"] = {"finetune": "azureml", "finetune@travel": "here"}
    checked = params.check(values)
    asked = ("finetune@travel", "finetune@food", "export")
    assert [checked.machine(stage) for stage in asked] == ["here", "azureml", "here"]
