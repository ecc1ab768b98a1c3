"""base.source azureml: the real clients and Azure on loopback.

The stage is called in this process but where its end, DVC or its command line is the point: its
imports take 2 s.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from tiny import REPO, assert_refused, make_project, refused, run_stage

from conftest import init_project, sh
from stages import azure, blobs, fetch, params
from stages.assets import content
from stages.blobs import BLOCK

if TYPE_CHECKING:
    from tests.emulator.client import Azure

BIG = "extra.safetensors"
BIG_BYTES = 24_000_000  # six ranges


@dataclass
class Place:
    """A project whose base is version 1 of `tiny`, in a registry or a workspace."""

    project: Path
    azure: Azure

    def fetch(self) -> None:
        fetch.main(params.load())

    def refused(self, *parts: str) -> str:
        """Fetch in vain; the one line with these parts."""
        said = refused(self.project, fetch.main, *parts)
        assert "\n" not in said
        return said

    def set(self, **values: str | None) -> None:
        path = self.project / "params.yaml"
        found = yaml.safe_load(path.read_text())
        found["base"] |= values
        path.write_text(yaml.safe_dump(found))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("azureml") / "project")
    rng = np.random.default_rng(0)
    save_file(
        {"x": rng.integers(0, 255, BIG_BYTES, np.uint8).view(np.uint8)}, folder / "tiny" / BIG
    )
    (folder / "tiny/pytorch_model.bin").write_bytes(b"never read")
    (folder / "tiny/README.md").write_text("not needed")
    return folder


@pytest.fixture
def place(project: Path, azure: Azure, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    azure.reset()
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    for left in ("models/base", "models/.base.download"):
        shutil.rmtree(project / left, ignore_errors=True)
    found = Place(project, azure)
    found.set(source="azureml", id=in_workspace(azure), revision=None)
    with azure.here():
        yield found
    azure.reset()


def in_workspace(azure: Azure, version: str = "1", name: str = "tiny") -> str:
    world = azure.world
    return (
        f"azureml://subscriptions/{world['subscription']}/resourceGroups/{world['resource_group']}"
        f"/workspaces/{world['workspace']}/models/{name}/versions/{version}"
    )


def register(place: Place, registry: bool = False, folder: str = "tiny") -> None:
    """As `az ml model create` would: the SDK's own upload of a folder."""
    from azure.ai.ml.entities import Model

    client = place.azure.ml(place.azure.world["registry"] if registry else None)
    client.models.create_or_update(
        Model(name="tiny", version="1", path=str(place.project / folder), type="custom_model")
    )


def test_a_model_of_the_workspace_comes_with_what_is_needed_of_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    register(place)
    place.fetch()
    base = place.project / "models/base"
    names = {path.name for path in base.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", BIG} <= names
    assert not names & {"pytorch_model.bin", "README.md"}
    for name in names:
        assert (base / name).read_bytes() == (place.project / "tiny" / name).read_bytes()
    assert content(base) in capsys.readouterr().out
    assert not (place.project / "models/.base.download").exists()
    assert not place.azure.calls(path="pytorch_model.bin|README", host="blob", method="GET")


def test_the_digest_that_it_prints_pins_the_content(place: Place) -> None:
    register(place, registry=True)
    place.set(
        id=f"azureml://registries/{place.azure.world['registry']}/models/tiny/versions/1",
        revision="0" * 64,
    )
    said = place.refused("its content is", "base.revision says " + "0" * 64)
    assert not (place.project / "models/base").exists()
    digest = said.split("its content is ")[1][:64]
    place.set(revision=digest)
    place.fetch()
    assert content(place.project / "models/base") == digest


def test_the_model_may_be_in_a_folder_of_the_asset(place: Place) -> None:
    """As Azure's own registry has them, in the format of MLflow."""
    inner = place.project / "mlflow_model_folder"
    (inner / "data").mkdir(parents=True)
    shutil.copytree(place.project / "tiny", inner / "data/model")
    (inner / "MLmodel").write_text("flavors: {}\n")
    (inner / "data/config.json").write_text("{}")  # of something else
    register(place, folder="mlflow_model_folder")
    place.fetch()
    config = (place.project / "models/base/config.json").read_text()
    assert config == (place.project / "tiny/config.json").read_text()


def test_a_killed_download_goes_on_where_it_stopped(place: Place) -> None:
    register(place)
    place.azure.fault(path=BIG, host="blob", method="GET", after=2, delay=600, times=None)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.fetch"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    parts = place.project / "models/.base.download"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(path.stat().st_size for path in parts.rglob(f"{BIG}*.part")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = sum(path.stat().st_size for path in parts.rglob(f"{BIG}*.part"))
    whole = {path.name for path in parts.rglob("*") if path.is_file() and path.suffix != ".part"}
    assert 0 < there < BIG_BYTES and whole
    place.azure.calm()
    place.fetch()
    ranges = place.azure.calls(path=BIG, host="blob", method="GET", status=206)
    assert len(ranges) == -(-((place.project / "tiny" / BIG).stat().st_size - there) // BLOCK)
    for name in whole:
        assert not place.azure.calls(path=f"/{name}", host="blob", method="GET")
    base = place.project / "models/base" / BIG
    assert base.read_bytes() == (place.project / "tiny" / BIG).read_bytes()


def test_other_bytes_than_the_service_has_are_never_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(place)
    monkeypatch.setattr(blobs, "TRIES", 2)
    place.azure.fault(path="config.json", host="blob", method="GET", corrupt=10, times=None)
    place.refused("the bytes were changed on their way")
    kept = (place.project / "models/.base.download").rglob("config.json*")
    assert not sum(path.stat().st_size for path in kept)
    place.azure.calm()
    place.fetch()
    assert content(place.project / "models/base")


BLOB = """<Blob><Name>{}</Name><Properties><Etag>0x1</Etag><Content-Length>5</Content-Length>
<BlobType>BlockBlob</BlobType></Properties></Blob>"""


def test_names_that_lead_out_of_the_folder_are_refused(place: Place) -> None:
    register(place)
    names = ["../../out/config.json", "../../out/model.safetensors"]
    prefix = azure.model_files(*model(place))[1]
    listed = "".join(BLOB.format(f"{prefix}{name}") for name in names)
    place.azure.fault(
        **{"path": "comp=list", "status": 200, "headers": {"content-type": "application/xml"}},
        body=f"<EnumerationResults><Blobs>{listed}</Blobs></EnumerationResults>",
        times=None,
    )
    place.refused("config.json' is no name for a file in a folder")
    assert not place.azure.calls(path="/out/", host="blob")


def model(place: Place) -> tuple[Any, Any]:
    """A client, and the model that is registered."""
    world = place.azure.world
    names = ("subscription", "resource_group", "workspace")
    client = azure.connect(azure.Place(*(world[name] for name in names)))
    return client, client.models.get("tiny", "1")


def test_a_registry_that_gives_no_signature_is_one_line(place: Place) -> None:
    """As one does whose files everyone may read; here storage lets nobody in without."""
    register(place, registry=True)
    place.set(id=f"azureml://registries/{place.azure.world['registry']}/models/tiny/versions/1")
    place.azure.fault(
        path="/datarefs/",
        status=200,
        body={"blobReferenceForConsumption": {"credential": {"credentialType": "NoCredentials"}}},
        times=None,
    )
    place.refused("tiny version 1 in registry press-registry: 40")
    assert place.azure.calls(path="comp=list", host="blob")


FETCH = """
stages:
  fetch:
    cmd: python -m stages.fetch
    params: [base]
    outs: [models/base]
"""


def test_dvc_fetches_it_once(place: Place, tmp_path: Path) -> None:
    register(place)
    project = init_project(tmp_path / "dvc")
    (project / "models").mkdir()
    for name in ("params.yaml", "models/toolchain.json"):
        shutil.copy(place.project / name, project / name)
    (project / "dvc.yaml").write_text(FETCH)
    sh("dvc", "repro", cwd=project)
    place.azure.calm()
    shutil.rmtree(project / "models/base")
    sh("dvc", "repro", cwd=project)
    assert (project / "models/base/config.json").exists()
    assert not place.azure.calls()
    kept = (project / "dvc.lock").read_text() + (project / "models/lineage/fetch.json").read_text()
    assert place.azure.env["AZURE_CLIENT_SECRET"] not in kept and "sig=" not in kept


PEAK = """
import resource, sys
from pathlib import Path
from stages import azure, blobs
client = azure.connect(azure.Place(*sys.argv[1:4]))
model = client.models.get("big", "1")
place, prefix = azure.model_files(client, model)
store = blobs.Store(lambda: place, "W")
names = list(store.listed(prefix))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
blobs.download(store, prefix, names, Path(sys.argv[4]), lambda more: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)  # KiB
"""


def test_a_large_file_is_never_whole_in_memory(place: Place, tmp_path: Path) -> None:
    from azure.ai.ml.entities import Model

    size = 200 << 20
    with (tmp_path / "big").open("wb") as file:
        file.truncate(size)
    world = place.azure.world
    names = [world[name] for name in ("subscription", "resource_group", "workspace")]
    client = azure.connect(azure.Place(*names))
    store = blobs.Store(lambda: azure.store_container(client), "W")
    blobs.upload(store, "big/", {"big": tmp_path / "big"}, lambda more: None)
    path = f"azureml://datastores/{azure.STORE}/paths/big"
    client.models.create_or_update(Model(name="big", version="1", path=path))
    done = sh(sys.executable, "-c", PEAK, *names, str(tmp_path / "to"), cwd=REPO)
    assert (tmp_path / "to/big").stat().st_size == size
    assert int(done.stdout) << 10 < size // 2


def test_what_is_not_there_is_one_line(place: Place) -> None:
    place.refused("base.id: tiny version 1 in workspace", "404")
    register(place)
    place.set(id=in_workspace(place.azure, "2"))
    place.refused("base.id: tiny version 2 in workspace", "404")


def test_without_a_login_it_says_what_to_do(place: Place) -> None:
    register(place)
    secret = place.azure.env["AZURE_CLIENT_SECRET"]
    with mock.patch.dict(os.environ, AZURE_CLIENT_SECRET="not-" + secret[4:]):
        done = run_stage(place.project, "fetch")
    assert_refused(place.project, done, "not signed in to Azure: run `az login`")
    assert secret not in done.stdout + done.stderr


def test_pickles_are_refused(place: Place) -> None:
    folder = place.project / "pickles"
    folder.mkdir(exist_ok=True)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "config.json").write_text("{}")
    register(place, folder="pickles")
    place.refused("the weights are pickles")


def test_an_address_that_is_none_is_refused_before_anything_is_asked(place: Place) -> None:
    place.set(id="azureml:tiny:1")
    place.refused("base.id must be azureml://registries/")
    assert not place.azure.calls()
