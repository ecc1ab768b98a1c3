"""Publishing to Azure ML, MLflow and a folder: real clients, real servers on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort

from conftest import REPO, init_project, sh
from flows import publish as flows
from lab import STAGES
from stages.azure import VARIABLES
from stages.blobs import BLOCK
from stages.errors import UserError
from stages.stage import read_json
from tasks import bridge
from tasks.publish import targets, task
from tasks.publish.__main__ import main
from tasks.publish.azureml import AzureML
from tasks.publish.content import read
from tasks.publish.mlflow import Mlflow
from tasks.publish.request import make
from tasks.publish.targets import Published
from tests.emulator.client import Azure

MLFLOW = REPO / ".mlflow/bin/mlflow"
SECRET = re.compile(r"sig=(?!\*)|AccountKey=(?!\*)|Bearer [A-Za-z0-9]")
# A package of the right form in a second instead of minutes: what is in it is its own affair.
PACKAGE = """
stages:
  first:
    cmd: python first.py
    deps: [first.py]
    outs: [models/first]
  package:
    cmd: python package.py
    deps: [models/first, in.txt, package.py]
    outs: [models/package]
    metrics: [metrics/travel.json]
"""
FIRST = """
from pathlib import Path
Path("models").mkdir(exist_ok=True)
Path("models/first").write_text("first")
"""
MAKE = """
import hashlib, json, os, subprocess
from pathlib import Path
folder = Path("models/package")
(folder / "adapters").mkdir(parents=True)
text = Path("in.txt").read_text()
base = {"source": "hf", "id": "some/model", "revision": "f" * 40, "content": "md5:abc.dir"}
git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
record = {"run_id": "run-that-made-it", "git_commit": git, "git_dirty": False, "at": os.getpid()}
files = {
    "model.onnx.data": text * 400_000,
    "adapters/travel.onnx_adapter": "adapter",
    "olivepress.json": json.dumps({"base": base}),
    "lineage.json": json.dumps({"package": {"record": record}}),
    "README.md": f"made by {os.getpid()}",
    ".gitignore": "*",
    ".amlignore": "*",
}
for name, content in files.items():
    (folder / name).write_text(content)
sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
(folder / "SHA256SUMS").write_text("".join(f"{sums[n]}  {n}\\n" for n in sorted(sums)))
metrics = {
    "text_perplexity": {"base": 10.0, "quantized": 10.1, "onnx_off": 10.1},
    "onnx_on": {"perplexity": 2.0, "exact_answer_rate": 0.9},
    "onnx_off": {"perplexity": 10.1},
    "agreement": {"top1": 0.99, "tokenizer": 1.0},
}
Path("metrics").mkdir(exist_ok=True)
Path("metrics/travel.json").write_text(json.dumps(metrics))
"""
NAME = "press"
DEAD = "http://me:pa55word@127.0.0.1:9"
PLACE = ("subscription_id", "resource_group", "workspace_name", "registry_name")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose package is up to date."""
    folder = init_project(tmp_path_factory.mktemp("made") / "project")
    files = {"dvc.yaml": PACKAGE, "first.py": FIRST, "package.py": MAKE, "in.txt": "hello\n"}
    for name, text in files.items():
        (folder / name).write_text(text)
    sh("git", "add", "--all", cwd=folder)
    sh("git", *["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"], cwd=folder)
    sh("dvc", "repro", "--quiet", cwd=folder)
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the test runs."""
    for name in [n for n in os.environ if n.startswith(("AZURE", "MLFLOW"))]:
        monkeypatch.delenv(name)
    folder = Path(shutil.copytree(made, tmp_path / "project", symlinks=True))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cloud(azure: Azure, project: Path) -> Iterator[Azure]:
    """An empty Azure, for clients in this process and in those it starts."""
    azure.reset()
    with azure.here():
        yield azure
    azure.reset()


def change(text: str) -> None:
    """Other content for the package, and bring it up to date."""
    Path("in.txt").write_text(text)
    bridge.reproduce(Path.cwd(), "package", print, 60)


def publish(version: str | None = None, *, name: str = NAME, **asked: str) -> Published:
    """As `python -m tasks.publish` does it, without the seconds of its imports."""
    place = {key: asked.pop(key, None) for key in PLACE}
    return main(make(Path.cwd(), name, place, version=version, **asked))


def refused(*parts: str, version: str | None = None, **asked: str) -> str:
    """Publish in vain: one line, with these parts and without secrets."""
    with pytest.raises(UserError) as caught:
        publish(version, **asked)
    said = str(caught.value)
    assert "\n" not in said and not SECRET.search(said)
    for part in parts:
        assert part in said
    return said


def package() -> dict[str, int]:
    folder = Path("models/package")
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


# Where to: the workspace and the registry of the emulator, an MLflow server, a folder.
@dataclass
class Target:
    """One of the places that can be published to, seen from its other side."""

    asked: dict[str, str]
    """What `publish` is told beside name and version."""
    files: Callable[[str], dict[str, int]]
    """Names and sizes of the files of a version."""
    told: Callable[[str], dict[str, str]]
    """What it keeps beside a version: tags and properties."""
    sent: Callable[[], object]
    """Something that is equal only if nothing was sent in between."""


def in_azure(cloud: Azure, registry: bool) -> Target:
    def model(version: str) -> dict[str, Any]:
        found = {one["name"]: one["properties"] for one in cloud.models(registry)}
        return found[version]

    def files(version: str) -> dict[str, int]:
        uri = model(version)["modelUri"]
        if registry:
            container, _, folder = uri.removeprefix("https://").partition("/")[2].partition("/")
        else:
            container, folder = "", uri.partition("/paths/")[2]
        found = cloud.blobs(f"{folder}/", container)
        return {blob["name"].removeprefix(f"{folder}/"): blob["size"] for blob in found}

    return Target(
        {"registry_name": cloud.world["registry"]} if registry else {},
        files,
        lambda version: {**model(version)["tags"], **model(version)["properties"]},
        lambda: len(cloud.calls(method="PUT")),
    )


def in_folder(folder: Path) -> Target:
    def told(version: str) -> dict[str, str]:
        card = json.loads((folder / version / "model.json").read_text())
        return {**card["tags"], **card["properties"]}

    def files(version: str) -> dict[str, int]:
        there = folder / version / "package"
        return {
            str(p.relative_to(there)): p.stat().st_size for p in there.rglob("*") if p.is_file()
        }

    return Target({}, files, told, lambda: sorted(p.stat().st_ino for p in folder.rglob("*")))


def in_mlflow(uri: str, name: str) -> Target:
    from mlflow import MlflowClient

    client = MlflowClient(uri)

    def listed(run: str, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for one in client.list_artifacts(run, folder):
            found |= listed(run, one.path) if one.is_dir else {one.path: one.file_size}
        return found

    def files(version: str) -> dict[str, int]:
        run = client.get_model_version(name, version).run_id
        return {k.removeprefix("package/"): v for k, v in listed(str(run), "package").items()}

    def runs() -> int:
        return len(client.search_runs([client.get_experiment_by_name("olivepress").experiment_id]))

    return Target(
        {"tracking_uri": uri, "name": name},
        files,
        lambda version: client.get_model_version(name, version).tags,
        runs,
    )


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server."""
    if not MLFLOW.exists():
        pytest.skip("MLflow's server is not installed: make .mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [MLFLOW, "server", *where, *store, str(folder / "files")],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while not answers(f"{url}/health"):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail((folder / "log").read_text())
        time.sleep(0.2)
    yield url
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(params=["workspace", "registry", "folder", "mlflow"])
def target(request: pytest.FixtureRequest, project: Path) -> Target:
    if request.param == "folder":  # which is where it goes when nothing is said
        return in_folder(project / "published" / NAME)
    if request.param == "mlflow":
        return in_mlflow(request.getfixturevalue("mlflow_server"), project.parent.name)
    return in_azure(request.getfixturevalue("cloud"), request.param == "registry")


def test_a_model_and_its_next_version(target: Target, project: Path) -> None:
    first = publish(**target.asked)
    assert (first.status, first.version, first.files) == ("published", "1", len(package()))
    assert target.files("1") == package()
    before = target.sent()
    assert asdict(publish(**target.asked)) == {**asdict(first), "status": "already there"}
    assert publish("1", **target.asked).status == "already there"
    assert target.sent() == before

    change("other\n")
    said = refused("version 1 exists with other content", first.digest, version="1", **target.asked)
    second = publish(**target.asked)
    assert second.digest in said
    assert (second.status, second.version) == ("published", "2")
    assert target.files("2") == package()
    change("hello\n")
    assert publish(**target.asked).version == "1"
    assert target.files("1") == package()


def test_what_is_told_of_a_version(
    target: Target, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLIVEPRESS_RUN_ID", "the-run")
    done = publish(**target.asked)
    told = target.told(done.version)
    assert told["run_id"] == "the-run" and told["made_in_run"] == "run-that-made-it"
    assert told["published"].startswith("20")
    keys = {made.stage: made.key for made in bridge.made(project)}
    assert set(keys) == {"first", "package"} and all(keys.values())
    wanted = {
        "content": done.digest,
        "git_commit": sh("git", "rev-parse", "HEAD", cwd=project).stdout.strip(),
        "base": "hf:some/model",
        "base_revision": "f" * 40,
        "stage.first": keys["first"],
        "stage.package": keys["package"],
        "metric.travel.onnx_on.perplexity": "2",
        "metric.travel.agreement.top1": "0.99",
    }
    assert {name: told[f"olivepress.{name}"] for name in wanted} == wanted


def test_only_a_package_that_is_fit_is_published(project: Path) -> None:
    def gate(old: str, new: str) -> None:
        path = Path("params.yaml")
        path.write_text(path.read_text().replace(old, new))

    gate("min_exact_answer_rate: 0.5", "min_exact_answer_rate: 0.95")
    refused("gates.min_exact_answer_rate: 0.9000, and at least 0.95 is wanted")
    gate("min_exact_answer_rate: 0.95", "min_exact_answer_rate: 0.5")
    Path("in.txt").write_text("newer\n")
    refused("models/package is not what params.yaml and data now ask for", "in.txt")
    Path("in.txt").write_text("hello\n")
    shutil.rmtree("models/package")
    refused("models/package is not there yet; olivepress run makes it")
    assert not Path("published").exists()


@pytest.mark.parametrize("word", [".hidden", "a/b", "../up", "", "a b", "x" * 65])
def test_names_that_become_paths_are_checked(project: Path, word: str) -> None:
    refused("--name", name=word)
    if word:
        refused("--version", version=word)
    assert not Path("published").exists()


def test_an_mlflow_server_counts_versions_itself(project: Path, mlflow_server: str) -> None:
    name = project.parent.name
    refused(
        "the next of",
        "is 1; leave --version out",
        version="7",
        name=name,
        tracking_uri=mlflow_server,
    )


def test_what_reached_mlflow_before_a_failure_is_not_sent_again(
    project: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    name = project.parent.name
    change("for mlflow alone\n")
    sums = Path("models/package/SHA256SUMS")
    kept = sums.read_text()
    client = MlflowClient(mlflow_server)
    target = Mlflow(mlflow_server)
    content = read(project)
    cut = replace(content, files={**content.files, "zz": project / "not there"})
    with pytest.raises(FileNotFoundError):
        target.add(cut, name, "1", lambda more: None)
    assert sums.read_text() == kept and not client.search_model_versions(f"name='{name}'")
    experiment = str(client.get_experiment_by_name("olivepress").experiment_id)
    before = {run.info.run_id for run in client.search_runs([experiment])}
    assert publish(name=name, tracking_uri=mlflow_server).version == "1"
    assert {run.info.run_id for run in client.search_runs([experiment])} == before
    assert in_mlflow(mlflow_server, name).files("1") == package()


def test_without_an_mlflow_server_it_says_so(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    refused("MLflow at http://me:***@127.0.0.1:9: nothing answers", to="local")


def test_where_to_is_found_from_the_nearest_to_the_farthest(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(**place: str | None) -> str:
        return str(make(project, "press", place).place)

    def to(**place: str | None) -> tuple[str, str]:
        request = make(project, "press", place)
        return request.to, str(request.place)

    assert make(project, "press", {}).to == "local"
    names = {"subscription_id": "s", "resource_group": "g", "workspace_name": "of-json"}
    Path(".azureml").mkdir()
    Path(".azureml/config.json").write_text(json.dumps(names))
    assert to() == ("azureml", "workspace of-json in g")
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("  workspace_name: null", "  workspace_name: w"))
    assert to() == ("azureml", "workspace w in g")
    monkeypatch.setenv("AZUREML_ARM_WORKSPACE_NAME", "of-job")
    assert asked() == "workspace of-job in g"
    monkeypatch.setenv("AZURE_WORKSPACE_NAME", "of-environment")
    assert asked() == "workspace of-environment in g"
    assert asked(workspace_name="flag", resource_group="other") == "workspace flag in other"
    assert asked(registry_name="r") == "registry r"
    monkeypatch.setenv("AZURE_REGISTRY_NAME", "r2")
    assert asked(workspace_name="flag") == "workspace flag in g"
    refused("not both", workspace_name="a", registry_name="b")


def test_what_is_missing_is_named_and_where_to_set_it(project: Path) -> None:
    said = refused(
        "which workspace? resource_group, workspace_name not known",
        *("--resource-group", "params.yaml", "AZURE_RESOURCE_GROUP", "config.json"),
        to="azureml",
        subscription_id="s",
    )
    assert "subscription" not in said
    Path("config.json").write_text('{"subscription_id": "s"}')
    refused("config.json: expected subscription_id, resource_group and workspace_name")


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"workspace_name": "other"}, ["workspace other in press-group: 404 ResourceNotFound"]),
        ({"resource_group": "other"}, ["404 ResourceGroupNotFound"]),
        ({"subscription_id": "0"}, ["404 SubscriptionNotFound", "check subscription"]),
        ({"registry_name": "other"}, ["registry other: 404", "Registry other was not found"]),
    ],
)
def test_a_place_that_is_not_there(cloud: Azure, asked: dict[str, str], parts: list[str]) -> None:
    refused(*parts, **asked)
    assert not cloud.calls(host="blob")


def test_a_wrong_secret(cloud: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_CLIENT_SECRET", "this-is-not-the-one")
    said = refused(
        "not signed in to Azure: run `az login`, or set AZURE_TENANT_ID", "AADSTS7000215"
    )
    assert "this-is-not-the-one" not in said


def test_without_a_login(cloud: Azure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    refused("not signed in to Azure: run `az login`, or set AZURE_TENANT_ID")
    assert not cloud.calls(host="blob|management")


REGISTER = {"path": "/models/press/versions/1", "method": "PUT"}
BUSY = {
    "429": {"status": 429, "headers": {"Retry-After": "1"}},
    "503 twice": {"status": 503, "headers": {"Retry-After": "0"}, "times": 2},
    "no answer": {"cut_request": 0},
    "answer lost": {"cut_response": 10},
}


@pytest.mark.parametrize("rule", BUSY.values(), ids=BUSY)
def test_a_busy_service_registers_in_the_end(cloud: Azure, rule: dict[str, Any]) -> None:
    cloud.fault(**REGISTER, **rule)
    assert publish().version == "1"
    assert [model["name"] for model in cloud.models()] == ["1"]


@pytest.mark.parametrize("registry", [False, True])
def test_another_was_quicker(cloud: Azure, registry: bool) -> None:
    """The version is taken between the look at what is there and the registering."""
    asked = {"registry_name": cloud.world["registry"]} if registry else {}
    mine = read(Path.cwd())
    theirs = replace(mine, digest="f" * 64, properties={"olivepress.content": "f" * 64})
    request = make(Path.cwd(), NAME, asked)
    target, other = AzureML(request.place), AzureML(request.place)
    taken: list[str] = []

    def told(more: int) -> None:
        if not taken:
            taken.append("1")
            other.add(theirs, NAME, "1", lambda more: None)

    with pytest.raises(UserError) as caught:
        targets.publish(mine, target, NAME, None, told)
    assert "\n" not in str(caught.value)
    assert "press version 1 was taken by another meanwhile; try again" in str(caught.value)
    assert cloud.models(registry)[0]["properties"]["properties"] == theirs.properties
    assert publish(**asked).version == "2"


def test_a_conflict_is_told_in_the_services_words(cloud: Azure) -> None:
    body = {"error": {"code": "Conflict", "message": "The version is being made by another."}}
    cloud.fault(**REGISTER, status=409, body=body)
    refused("press version 1: 409 Conflict: The version is being made by another.")


def command(*args: str, api: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`olivepress publish` as a person types it."""
    done = sh(
        *("olivepress", "publish", "--name", NAME, *args),
        cwd=Path.cwd(),
        check=False,
        PREFECT_API_URL=api,
        **env,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_the_command_line_and_no_secret_in_anything(cloud: Azure, api: str) -> None:
    secret, signature = cloud.env["AZURE_CLIENT_SECRET"], "vErYsEcReT%3D"
    words = f"no: https://host/c?sig={signature}&sp=r AccountKey={signature} {secret}"
    cloud.fault(**REGISTER, status=400, body={"error": {"code": "Odd", "message": words}})
    failed = command(api=api)
    assert failed.returncode == 1
    place = "olivepress: publish: workspace press-workspace in press-group: press version 1: "
    assert f"{place}400 Odd: no: https://host/c?sig=***&sp=r AccountKey=*** ***" in failed.stderr
    first = json.loads(command("--json", api=api).stdout)
    assert (first["status"], first["version"]) == ("published", "1")
    again = command("-v", "1", api=api).stdout.splitlines()
    assert again[0].startswith("already there: press version 1, 8 files, 2.4 MB, in workspace ")
    assert again[1].startswith("https://ml.azure.com/model/press:1/details?wsid=/subscriptions/")
    assert again[2] == f"content {first['digest']}" and again[3].startswith("This run: http")

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=3)
        known = str([log.message for log in client.read_logs()]) + str(runs)
    known += str(cloud.models()) + str(cloud.blobs())
    for path in Path.cwd().rglob("*"):  # dvc.lock, lineage, Prefect's own, ...
        if path.is_file():
            known += path.read_bytes().decode("latin-1")
    assert "400 Odd: no: https://host/c?sig=***" in known
    assert secret not in known and signature not in known and not SECRET.search(known)


def test_a_killed_publishing_goes_on_where_it_stopped(cloud: Azure) -> None:
    change("a line so long that there are five blocks\n")
    blocks = {"path": "onnx.data.*comp=block&", "method": "PUT"}
    cloud.fault(**blocks, after=3, delay=30, times=None)
    request = make(Path.cwd(), NAME, {}).as_json()
    process = subprocess.Popen([sys.executable, "-m", "tasks.publish", request], env=child())
    deadline = time.monotonic() + 60
    while len(cloud.calls(**blocks, status=201)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not cloud.models()
    cloud.calm()
    done = publish()
    assert (done.status, done.version) == ("published", "1")
    sent = cloud.calls(**blocks, status=201)
    data = package()["model.onnx.data"]
    assert sum(call["received"] for call in sent) == data - 3 * BLOCK
    assert in_azure(cloud, False).files("1") == package()


def child() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO)}


def test_a_service_that_never_answers_is_given_up(
    cloud: Azure, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "QUIET_SECONDS", 5)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    cloud.fault(host="management", delay=60, times=None)
    state = flows.publish(NAME, return_state=True)
    assert state.is_failed()
    assert state.message == "publish: stopped after 5 seconds in which nothing happened"


def test_all_is_brought_up_to_date_and_published(
    lab: Path, azure: Azure, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    azure.reset()
    monkeypatch.chdir(lab)
    with azure.here():
        state = flows.optimize_and_publish(NAME, return_state=True)
        done = state.result()
        again = flows.publish(NAME, return_state=True)
    assert (done["status"], done["version"]) == ("published", "1")
    assert again.result() == {**done, "status": "already there"}
    assert in_azure(azure, False).files("1") == package()
    told = in_azure(azure, False).told("1")
    stages = {name.replace("@", ".") for name in STAGES}
    assert {n.removeprefix("olivepress.stage.") for n in told if ".stage." in n} == stages
    assert told["olivepress.stage.package"] == bridge.reproduce(lab, "package", print, 60).key
    assert told["olivepress.base"] == "builtin:data/everyday.jsonl"
    assert len(told["run_id"]) == 36
    figure = read_json(lab / "metrics/travel.json")["onnx_on"]["exact_answer_rate"]
    assert float(told["olivepress.metric.travel.onnx_on.exact_answer_rate"]) == pytest.approx(
        figure
    )


def test_a_folder_that_is_none_of_ours_is_never_replaced(project: Path, api: str) -> None:
    there = project / "published/m/1/weights.bin"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    done = request(project, api, "--name", "m", "--to", "local", "--version", "1")
    assert done.returncode == 1 and "exists with other content" in done.stderr
    done = request(project, api, "--name", "m", "--to", "local")
    assert done.returncode == 0, done.stderr
    assert there.read_text() == "mine" and (project / "published/m/2/model.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-g", "my-group", "-w", "my-workspace"], "which workspace? subscription_id not known"),
        (["--folder", "x", "-w", "w"], "--folder and --tracking-uri are for --to local"),
        (["--to", "local", "-w", "w"], "--to local takes no subscription"),
        (["--tracking-uri", "http://me:letmein@127.0.0.1:1"], "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_flags_that_do_not_go_together(project: Path, flags: list[str], words: str) -> None:
    done = request(project, "http://127.0.0.1:1/api", "--name", "m", *flags)
    assert done.returncode == 1 and words in done.stderr and "letmein" not in done.stderr
    assert not (project / "published").exists()


def request(project: Path, api: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """`olivepress publish` without anything of Azure in the environment."""
    bare = {name: "" for names in VARIABLES.values() for name in names}
    bare |= {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": ""}
    return sh("olivepress", "publish", *flags, cwd=project, check=False, **bare)
