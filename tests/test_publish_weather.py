"""Publishing to Azure ML in bad weather: the real client, faults between it and the service."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from packaged import (
    NAME,
    REGISTER,
    change,
    in_azure,
    package,
    publish,
    refused,
    work_in_copy,
)

from conftest import REPO
from flows import publish as flows
from stages.blobs import BLOCK
from stages.errors import UserError
from tasks.publish import targets, task
from tasks.publish.azureml import AzureML
from tasks.publish.content import read
from tasks.publish.request import make
from tests.emulator.client import Azure


@pytest.fixture
def cloud(
    azure: Azure, packaged_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Azure]:
    """An empty Azure, for clients in this process and in those it starts."""
    work_in_copy(packaged_project, tmp_path / "project", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    azure.reset()
    with azure.here():
        yield azure
    azure.reset()


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


def test_a_wrong_secret(cloud: Azure) -> None:
    with mock.patch.dict(os.environ, AZURE_CLIENT_SECRET="this-is-not-the-one"):
        said = refused(
            "not signed in to Azure: run `az login`, or set AZURE_TENANT_ID", "AADSTS7000215"
        )
    assert "this-is-not-the-one" not in said


def test_without_a_login(cloud: Azure, tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, HOME=str(tmp_path)):
        for name in ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"):
            del os.environ[name]
        refused("not signed in to Azure: run `az login`, or set AZURE_TENANT_ID")
    assert not cloud.calls(host="blob|management")


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


def test_a_killed_publishing_goes_on_where_it_stopped(cloud: Azure) -> None:
    change("a line so long that there are five blocks\n")
    blocks = {"path": "onnx.data.*comp=block&", "method": "PUT"}
    cloud.fault(**blocks, after=3, delay=30, times=None)
    request = make(Path.cwd(), NAME, {}).as_json()
    process = subprocess.Popen([sys.executable, "-m", "tasks.publish", request])
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


def test_a_service_that_never_answers_is_given_up(
    cloud: Azure, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "QUIET_SECONDS", 5)
    cloud.fault(host="management", delay=60, times=None)
    state = flows.publish(NAME, try_it=False, return_state=True)
    assert state.is_failed()
    assert state.message == "publish: stopped after 5 seconds in which nothing happened"
