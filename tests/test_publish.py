"""Publishing to Azure ML, MLflow and a folder: real clients, real servers on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from packaged import (
    NAME,
    REGISTER,
    SECRET,
    Target,
    change,
    in_azure,
    package,
    publish,
    refused,
    work_in_copy,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort

from conftest import REPO, sh, typed
from flows import publish as flows
from lab import STAGES
from stages.azure import VARIABLES
from stages.stage import read_json
from stages.sums import SIGNATURE
from tasks import bridge, signing
from tasks.publish.content import read
from tasks.publish.mlflow import Mlflow
from tasks.publish.request import make
from tests.emulator.client import Azure
from tests.emulator.server import Server

MLFLOW = REPO / ".mlflow/bin/mlflow"
DEAD = "http://me:pa55word@127.0.0.1:9"


@pytest.fixture
def project(packaged_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the test runs."""
    return work_in_copy(packaged_project, tmp_path / "project", monkeypatch)


@pytest.fixture
def cloud(azure: Azure, project: Path) -> Iterator[Azure]:
    """An empty Azure, for clients in this process and in those it starts."""
    azure.reset()
    with azure.here():
        yield azure
    azure.reset()


# Where to: the workspace and the registry of the emulator, an MLflow server, a folder.
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
    url = f"http://127.0.0.1:{port}"
    with Server(folder / "log") as server:
        server.start(
            [MLFLOW, "server", *where, *store, folder / "files"],
            lambda: answers(f"{url}/health"),
            # Ten processes more, for jobs of the server's own.
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        yield url


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


def test_a_signature_and_what_is_told_go_along(
    target: Target, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    sh("openssl", "genpkey", *curve, "-out", "key.pem", cwd=tmp_path)
    place = signing.sign(project / "models/package", tmp_path / "key.pem", project)
    monkeypatch.setenv("OLIVEPRESS_RUN_ID", "the-run")
    done = publish(**target.asked)
    signed = {**package(), SIGNATURE: place.stat().st_size}
    assert target.files(done.version) == signed and done.files == len(signed)
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


def test_the_command_line_and_no_secret_in_anything(cloud: Azure, api: str) -> None:
    secret, signature = cloud.env["AZURE_CLIENT_SECRET"], "vErYsEcReT%3D"
    words = f"no: https://host/c?sig={signature}&sp=r AccountKey={signature} {secret}"
    cloud.fault(**REGISTER, status=400, body={"error": {"code": "Odd", "message": words}})
    project, asked = Path.cwd(), ("publish", "--name", NAME, "--no-try")
    failed = sh("olivepress", *asked, cwd=project, check=False, PREFECT_API_URL=api)
    assert failed.returncode == 1 and "Traceback" not in failed.stdout + failed.stderr
    place = "olivepress: publish: workspace press-workspace in press-group: press version 1: "
    assert f"{place}400 Odd: no: https://host/c?sig=***&sp=r AccountKey=*** ***" in failed.stderr
    done = typed(*asked, "--json", cwd=project, PREFECT_API_URL=api)
    first = json.loads(done.stdout)
    assert (first["status"], first["version"]) == ("published", "1")
    done = typed(*asked, "-v", "1", cwd=project, PREFECT_API_URL=api)
    again = done.stdout.splitlines()
    assert again[0].startswith("already there: press version 1, 8 files, 2.4 MB, in workspace ")
    assert again[1].startswith("https://ml.azure.com/model/press:1/details?wsid=/subscriptions/")
    assert again[2] == f"content {first['digest']}" and again[3].startswith("This run: http")

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=3)
        known = str([log.message for log in client.read_logs()]) + str(runs)
    known += str(cloud.models()) + str(cloud.blobs())
    for path in project.rglob("*"):  # dvc.lock, lineage, Prefect's own, ...
        if path.is_file():
            known += path.read_bytes().decode("latin-1")
    assert "400 Odd: no: https://host/c?sig=***" in known
    assert secret not in known and signature not in known and not SECRET.search(known)


def test_all_is_brought_up_to_date_and_published(
    lab: Path, azure: Azure, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    azure.reset()
    monkeypatch.chdir(lab)
    with azure.here():
        state = flows.optimize_and_publish(NAME, return_state=True)
        done = state.result()
        again = flows.publish(NAME, try_it=False, return_state=True)
    assert (done["status"], done["version"]) == ("published", "1")
    assert done.pop("tried") == "4 answers, 4 of them word for word as measured"
    assert again.result() == {**done, "status": "already there"}
    table = artifact("smoke-test")
    assert "| base |" in table and "| travel |" in table and "| no:" not in table
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


def bare(api: str) -> dict[str, str]:
    """Nothing of Azure in the environment."""
    none = {name: "" for names in VARIABLES.values() for name in names}
    return none | {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": ""}


def artifact(key: str) -> str:
    """The newest artifact of a key."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])),
            sort=ArtifactSort.CREATED_DESC,
            limit=1,
        )
    return str(found[0].data)


def test_a_package_that_cannot_be_served_is_told_after_it_was_published(
    project: Path, api: str
) -> None:
    done = typed("publish", "--name", "m", "--to", "local", cwd=project, **bare(api))
    assert done.exit_code == 1
    assert "published, but smoke test: " in done.stderr and "genai_config.json" in done.stderr
    assert (project / "published/m/1/model.json").exists()


def test_a_folder_that_is_none_of_ours_is_never_replaced(project: Path, api: str) -> None:
    there = project / "published/m/1/weights.bin"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    asked = ("publish", "--name", "m", "--to", "local", "--no-try")
    done = typed(*asked, "--version", "1", cwd=project, **bare(api))
    assert done.exit_code == 1 and "exists with other content" in done.stderr
    done = typed(*asked, cwd=project, **bare(api))
    assert done.exit_code == 0, done.stderr
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
    nowhere = bare("http://127.0.0.1:1/api")
    done = typed("publish", "--name", "m", *flags, cwd=project, **nowhere)
    assert done.exit_code == 1 and words in done.stderr and "letmein" not in done.stderr
    assert not (project / "published").exists()
