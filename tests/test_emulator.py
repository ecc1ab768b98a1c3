"""Azure on loopback, driven by the unmodified SDK: what it gives, what it refuses, how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from conftest import REPO
from tests.emulator.client import Azure


@pytest.fixture
def cloud(azure: Azure) -> Iterator[Azure]:
    """An empty Azure for the clients in this process."""
    azure.reset()
    with azure.here():
        yield azure


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    """A folder to upload."""
    folder = tmp_path / "leaf"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("hello")
    (folder / "deep/b.bin").write_bytes(bytes(range(256)) * 400)
    return folder


def model(path: Path, version: str | None = "1", **more: Any) -> Any:
    from azure.ai.ml.entities import Model

    return Model(name="press", version=version, path=str(path), type="custom_model", **more)


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("registry", [False, True])
def test_a_model_comes_back_as_it_went(
    cloud: Azure, leaf: Path, tmp_path: Path, registry: bool
) -> None:
    ml = cloud.ml(cloud.world["registry"] if registry else None)
    made = ml.models.create_or_update(model(leaf, tags={"run": "7"}, properties={"digest": "x"}))
    assert (made.name, made.version, made.tags) == ("press", "1", {"run": "7"})
    found = ml.models.get("press", "1")
    assert (found.path, found.properties) == (made.path, {"digest": "x"})
    assert [one.version for one in ml.models.list("press")] == ["1"]
    assert [one.name for one in ml.models.list()] == ["press"]
    ml.models.download("press", "1", download_path=tmp_path / "back")
    assert content(tmp_path / "back/press/leaf") == content(leaf)
    assert [one["properties"]["tags"] for one in cloud.models(registry)] == [{"run": "7"}]
    assert not cloud.models(not registry)


def refused(cloud: Azure, leaf: Path, version: str, **names: str) -> str:
    """What the service says to a model that it does not take."""
    from azure.core.exceptions import HttpResponseError

    with pytest.raises(HttpResponseError) as caught:
        cloud.ml(**names).models.create_or_update(model(leaf, version))
    return str(caught.value)


def test_a_version_that_is_made_keeps_its_files_and_properties(
    cloud: Azure, leaf: Path, tmp_path: Path
) -> None:
    models = cloud.ml().models
    made = models.create_or_update(model(leaf, properties={"digest": "x"}))
    made.tags, made.description = {"flow": "2"}, "better"
    assert models.create_or_update(made).tags == {"flow": "2"}
    renamed = leaf.rename(tmp_path / "other")
    assert "data uri and properties cannot be changed" in refused(cloud, renamed, "1")
    assert "must be a positive integer" in refused(cloud, renamed, "1.0.0")
    assert models.create_or_update(model(renamed, None)).version == "2"
    assert [one["name"] for one in cloud.models()] == ["1", "2"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"subscription_id": "0"}, "SubscriptionNotFound"),
        ({"resource_group_name": "other"}, "ResourceGroupNotFound"),
        ({"workspace_name": "other"}, "ResourceNotFound"),
    ],
)
def test_only_the_workspace_that_exists_is_found(
    cloud: Azure, leaf: Path, names: dict[str, str], said: str
) -> None:
    assert f"({said})" in refused(cloud, leaf, "1", **names)


def test_another_registry_does_not_exist(cloud: Azure) -> None:
    from azure.core.exceptions import ResourceNotFoundError

    with pytest.raises(ResourceNotFoundError, match="Registry other was not found"):
        cloud.ml("other")


def test_a_wrong_secret_is_refused(cloud: Azure) -> None:
    from azure.core.exceptions import ClientAuthenticationError

    wrong = mock.patch.dict(os.environ, AZURE_CLIENT_SECRET="wrong")
    with wrong, pytest.raises(ClientAuthenticationError, match="AADSTS7000215"):
        cloud.ml().models.get("press", "1")
    assert "wrong" not in (cloud.home / "calls.jsonl").read_text()


def raw(method: str, url: str, token: str | None = None, **more: Any) -> Any:
    import requests

    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.request(method, url, headers=headers, timeout=30, **more)


def test_the_service_is_strict(cloud: Azure) -> None:
    from azure.identity import EnvironmentCredential

    token = EnvironmentCredential().get_token("https://management.azure.com/.default").token
    group = f"/subscriptions/{cloud.world['subscription']}/resourceGroups/press-group"
    workspace = f"{group}/providers/Microsoft.MachineLearningServices/workspaces/press-workspace"
    url = f"https://management.azure.com{workspace}/models/press/versions/1"
    for bad in (None, "garbage", token[:-2]):
        answer = raw("GET", url, bad)
        assert answer.status_code == 401
        assert "login.microsoftonline.com" in answer.headers["WWW-Authenticate"]
    assert raw("GET", url, token).json()["error"]["code"] == "InvalidApiVersionParameter"
    known = f"{url}?api-version=2023-10-01"
    assert raw("GET", known, token).status_code == 404
    assert raw("GET", known.replace("/models/", "/nothing/"), token).status_code == 404
    uri = "azureml://datastores/workspaceblobstore/paths/nothing/here"
    given: dict[str, str] = {}
    for key, value, said in (
        ("", "", "modelUri is required"),
        ("modelUri", uri, "modelType is required"),
        ("modelType", "pickle", "Invalid model type"),
        ("modelType", "custom_model", "does not exist in the datastore"),
        ("modelUri", "https://example.com/a", "does not point into a datastore"),
    ):
        given[key] = value
        answer = raw("PUT", known, token, json={"properties": given})
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


def test_storage_wants_a_good_signature(cloud: Azure) -> None:
    from azure.core.exceptions import HttpResponseError
    from azure.identity import EnvironmentCredential
    from azure.storage.blob import ContainerClient

    host = f"https://{cloud.world['account']}.blob.core.windows.net"
    good = cloud.ml().datastores.get_default(include_secrets=True).credentials.sas_token
    bad = good.replace("sp=racwdl", "sp=racwdlt")
    for credential in (good, EnvironmentCredential()):
        with ContainerClient(host, cloud.world["container"], credential) as container:
            container.upload_blob("a", b"hello", overwrite=True)
    with (
        ContainerClient(host, cloud.world["container"], bad) as container,
        pytest.raises(HttpResponseError, match="failed to authenticate the request"),
    ):
        container.upload_blob("b", b"hello")
    assert [blob["name"] for blob in cloud.blobs()] == ["a"]


def test_the_tunnel_opens_azure_only(cloud: Azure) -> None:
    import requests

    with pytest.raises(requests.exceptions.ProxyError, match="403"):
        requests.get("https://example.com/", timeout=30)
    assert [call["host"] for call in cloud.calls(status=403)] == ["example.com"]


def test_a_fault_hits_the_calls_that_it_names(cloud: Azure, leaf: Path) -> None:
    cloud.fault(path="/versions/1", method="PUT", status=503, headers={"Retry-After": "0"})
    cloud.fault(path="/listSecrets", status=404, body={"error": {"code": "X"}}, after=1)
    models = cloud.ml().models
    models.create_or_update(model(leaf))
    puts = cloud.calls("/models/press/versions/1", method="PUT")
    assert [call["status"] for call in puts] == [503, 201]
    models.create_or_update(model(leaf))
    assert [call["status"] for call in cloud.calls("/listSecrets")] == [200, 404]


def test_an_upload_can_be_cut(cloud: Azure) -> None:
    from azure.core.exceptions import ServiceRequestError, ServiceResponseError
    from azure.storage.blob import BlobClient

    cloud.fault(host="blob", path="/big", method="PUT", cut_request=100_000)
    sas = cloud.ml().datastores.get_default(include_secrets=True).credentials.sas_token
    host = f"https://{cloud.world['account']}.blob.core.windows.net"
    with BlobClient(host, cloud.world["container"], "big", credential=sas, retry_total=0) as blob:
        with pytest.raises((ServiceRequestError, ServiceResponseError)):
            blob.upload_blob(bytes(10_000_000))
        assert cloud.blobs() == []
        blob.upload_blob(bytes(10_000_000))
    first, second = cloud.calls("/big", method="PUT")
    assert (first["status"], first["note"]) == (0, "fault: cut_request 100000")
    assert (second["status"], second["received"]) == (201, 10_000_000)


def test_a_download_can_be_cut_and_spoilt(cloud: Azure, leaf: Path, tmp_path: Path) -> None:
    models = cloud.ml().models
    models.create_or_update(model(leaf))
    cloud.fault(host="blob", path="deep/b.bin", method="GET", cut_response=50_000)
    cloud.fault(host="blob", path="deep/b.bin", method="GET", corrupt=7)
    models.download("press", "1", download_path=tmp_path)
    assert [call["status"] for call in cloud.calls("deep/b.bin", method="GET")] == [0, 206]
    wrong = (tmp_path / "press/leaf/deep/b.bin").read_bytes()
    right = (leaf / "deep/b.bin").read_bytes()
    differ = [place for place in range(len(right)) if wrong[place] != right[place]]
    assert len(wrong) == len(right)
    assert len(differ) == 1


def submit(cloud: Azure, code: Path, text: str, **more: Any) -> Any:
    """Submit a command job and return it as the service answers."""
    from azure.ai.ml import command
    from azure.ai.ml.entities import Environment

    job = command(
        code=str(code),
        command=text,
        environment=Environment(image="mcr.microsoft.com/azureml/minimal:1"),
        **{"compute": cloud.world["cluster"], **more},
    )
    return cloud.ml().jobs.create_or_update(job)


def test_a_job_runs_and_its_log_is_streamed(
    cloud: Azure, leaf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (leaf / "say.py").write_text("import os, sys; print(os.environ['WORD'], os.listdir('deep'))")
    text = "python say.py && echo ${{inputs.n}} && env"
    cloud.cluster(queue_seconds=1)  # of a job that has ended the SDK streams nothing
    job = submit(cloud, leaf, text, inputs={"n": 5}, environment_variables={"WORD": "hi"})
    assert job.studio_url.startswith("https://ml.azure.com/runs/")
    jobs = cloud.ml().jobs
    jobs.stream(job.name)
    said = capsys.readouterr().out
    assert "Streaming user_logs/std_log.txt" in said
    assert "hi ['b.bin']\n5\n" in said
    assert f"AZUREML_RUN_ID={job.name}\n" in said
    assert "PYTEST" not in said
    assert jobs.get(job.name).status == "Completed"
    assert [one.name for one in jobs.list()] == [job.name]


def test_a_job_that_fails_says_so(cloud: Azure, leaf: Path) -> None:
    from azure.ai.ml.exceptions import JobException

    failed = submit(cloud, leaf, "echo before; exit 3").name
    with pytest.raises(JobException, match="exited with status code 3"):
        cloud.ml().jobs.stream(failed)
    log = cloud.blobs(container="azureml")
    assert [blob["size"] for blob in log] == [len("before\n")]
    cloud.cluster(quota=True)
    with pytest.raises(JobException, match="exceeding quota limits"):
        cloud.ml().jobs.stream(submit(cloud, leaf, "true").name)


def test_a_job_can_be_cancelled(cloud: Azure, leaf: Path, tmp_path: Path) -> None:
    jobs = cloud.ml().jobs
    running = submit(cloud, leaf, f"touch {tmp_path}/begun; sleep 600; touch {tmp_path}/ended").name
    while not (tmp_path / "begun").exists():
        assert jobs.get(running).status in ("Queued", "Preparing", "Running")
    cloud.cluster(queue_seconds=600)
    queued = submit(cloud, leaf, "true").name
    for name in (running, queued):
        jobs.begin_cancel(name).result()
        assert jobs.get(name).status == "Canceled"
    assert not (tmp_path / "ended").exists()


def test_a_job_that_cannot_run_is_refused(cloud: Azure, leaf: Path) -> None:
    from azure.core.exceptions import HttpResponseError

    for more, said in (
        ({"compute": "other"}, "ComputeNotFound"),
        ({"name": "twice"}, "job with this name already exists"),
    ):
        with pytest.raises(HttpResponseError, match=said):
            for _ in range(2):
                submit(cloud, leaf, "true", **more)


def test_it_ends_with_the_one_who_started_it(azure: Azure, tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from tests.emulator.client import Azure
Azure(Path({str(tmp_path)!r})).__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=False, timeout=60)
    deadline = time.monotonic() + 30
    while (tmp_path / "pid").exists():  # the emulator's own last act, after Azurite's end
        assert time.monotonic() < deadline
        time.sleep(0.05)
