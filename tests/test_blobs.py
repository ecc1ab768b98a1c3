"""Files to and from blob storage in bad weather: the real client, Azurite, faults between them."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from conftest import REPO
from stages import azure as client
from stages import blobs
from stages.errors import UserError

if TYPE_CHECKING:
    from tests.emulator.client import Azure

BLOCK = 1 << 20  # a quarter of what it is outside of tests
SIZES = {"model.onnx.data": 5_000_000, "sub/small.json": 17, "empty": 0}
CUT = 250_000
# What happens to a call on the way up and to some on the way down; each is got over without a word.
WEATHER: dict[str, tuple[dict[str, Any], ...]] = {
    "503 twice": ({"status": 503, "times": 2},) * 2,
    "429, wait": ({"status": 429, "headers": {"Retry-After": "1"}},) * 2,
    "429": ({"status": 429},) * 2,
    "401": ({"status": 401},) * 2,
    "403": ({"status": 403},) * 2,
    # What arrived is not what was sent, of which the service tells.
    "changed": ({"status": 400, "headers": {"x-ms-error-code": "Md5Mismatch"}},) * 2,
    "cut": ({"cut_request": CUT, "after": 1}, {"cut_response": CUT}, {"corrupt": CUT, "after": 0}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "sub").mkdir()
    for name, size in SIZES.items():
        (folder / name).write_bytes(os.urandom(size))
    return {name: folder / name for name in SIZES}


@pytest.fixture
def store(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> Iterator[blobs.Store]:
    azure.reset()
    monkeypatch.setattr(blobs, "BLOCK", BLOCK)
    monkeypatch.setattr(blobs.random, "uniform", lambda *_: 0.05)  # Retry-After is followed
    # A cut upload is noticed by a read that gets no answer.
    monkeypatch.setattr(client, "TIMEOUTS", {"connection_timeout": 5, "read_timeout": 5})
    with azure.here():
        world = azure.world
        place = client.Place(world["subscription"], world["resource_group"], world["workspace"])
        ml = client.connect(place)
        yield blobs.Store(lambda: client.store_container(ml), "workspace W")
    azure.reset()


def send(store: blobs.Store, files: dict[str, Path]) -> int:
    """Upload; the number of bytes it was told of."""
    told: list[int] = []
    blobs.upload(store, "p/", files, told.append)
    return sum(told)


def bring(store: blobs.Store, folder: Path) -> int:
    told: list[int] = []
    blobs.download(store, "p/", list(SIZES), folder, told.append)
    return sum(told)


def assert_same(folder: Path, files: dict[str, Path]) -> None:
    for name, path in files.items():
        assert (folder / name).read_bytes() == path.read_bytes()
    assert {p for p in folder.rglob("*") if p.is_file()} == {folder / name for name in files}


def test_up_and_down_again(
    store: blobs.Store, azure: Azure, files: dict[str, Path], tmp_path: Path
) -> None:
    assert send(store, files) == sum(SIZES.values())
    there = {blob["name"]: blob["size"] for blob in azure.blobs("p/")}
    assert there == {f"p/{name}": size for name, size in SIZES.items()}
    assert bring(store, tmp_path) == sum(SIZES.values())
    assert_same(tmp_path, files)
    azure.calm()
    assert send(store, files) == sum(SIZES.values())  # told of all, and sends none
    assert not azure.calls(host="blob", method="PUT")
    assert bring(store, tmp_path) == sum(SIZES.values())
    assert not azure.calls(path="model", host="blob", method="GET", status=206)


@pytest.mark.parametrize("weather", WEATHER)
def test_bad_weather_and_an_old_signature_are_got_over(
    store: blobs.Store, azure: Azure, files: dict[str, Path], tmp_path: Path, weather: str
) -> None:
    up, *down = WEATHER[weather]
    azure.fault(host="blob", method="PUT", **{"after": 2, **up})
    send(store, files)
    for rule in down:
        azure.fault(host="blob", path="model", method="GET", **{"after": 1, **rule})
    bring(store, tmp_path)
    assert_same(tmp_path, files)
    secrets = azure.calls(path="listSecrets")
    assert len(secrets) == (3 if weather in ("401", "403") else 1)  # a new signature each time


def test_waits_grow_unless_the_service_asks_for_one() -> None:
    waits = [blobs._wait(OSError(), tried) for tried in range(1, 6)]
    assert waits == sorted(waits) and 0.5 <= waits[0] <= 1 and 8 <= waits[-1] <= 16
    for seconds, wait in {"7": 7, "0": 0, "900": blobs.LONGEST_WAIT}.items():
        asks = SimpleNamespace(response=SimpleNamespace(headers={"Retry-After": seconds}))
        assert blobs._wait(asks, 1) == wait


def test_what_arrived_is_not_sent_again(
    store: blobs.Store, azure: Azure, files: dict[str, Path]
) -> None:
    """As after a kill: two of the blocks are at the service, and no list of them."""
    azure.fault(host="blob", path="blocklist", method="PUT", status=400, times=None)
    with pytest.raises(UserError, match="workspace W: 400"):
        send(store, {"model.onnx.data": files["model.onnx.data"]})
    azure.calm()
    send(store, files)
    assert not azure.calls(path="model.*comp=block&", host="blob", method="PUT")
    assert len(azure.calls(path="model.*comp=blocklist", host="blob", method="PUT")) == 1


@pytest.mark.parametrize("fetched", [False, True])
def test_other_content_of_the_same_size_takes_the_place(
    store: blobs.Store, azure: Azure, files: dict[str, Path], tmp_path: Path, fetched: bool
) -> None:
    """At the service, and here where the older state was fetched."""
    send(store, files)
    if fetched:
        bring(store, tmp_path / "a")
    changed = tmp_path / "changed"
    changed.write_bytes(b"-" * SIZES["sub/small.json"])
    send(store, {"sub/small.json": changed})
    bring(store, tmp_path / "a")
    assert_same(tmp_path / "a", files | {"sub/small.json": changed})


def test_a_blob_that_changed_between_two_tries_begins_anew(
    store: blobs.Store, azure: Azure, files: dict[str, Path], tmp_path: Path
) -> None:
    send(store, files)
    azure.fault(host="blob", path="model", method="GET", status=404, after=4)
    with pytest.raises(UserError, match="workspace W: 404"):
        bring(store, tmp_path / "a")
    assert [path for path in (tmp_path / "a").glob("*.part") if path.stat().st_size]
    changed = tmp_path / "changed"
    changed.write_bytes(os.urandom(SIZES["model.onnx.data"]))
    send(store, {"model.onnx.data": changed})
    bring(store, tmp_path / "a")
    assert (tmp_path / "a/model.onnx.data").read_bytes() == changed.read_bytes()


def test_a_whole_file_is_checked_against_the_services_md5(
    store: blobs.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "TRIES", 1)
    from azure.storage.blob import BlobBlock, ContentSettings

    wrong = ContentSettings(
        content_md5=bytearray(hashlib.md5(b"-", usedforsecurity=False).digest())
    )
    blob = store.container.get_blob_client("p/file")
    blob.stage_block("MDAx", b"these", 5)
    blob.commit_block_list([BlobBlock("MDAx")], content_settings=wrong)
    with pytest.raises(UserError, match="MD5"):
        blobs.download(store, "p/", ["file"], tmp_path, lambda more: None)
    assert not sum(path.stat().st_size for path in tmp_path.iterdir())


def test_bytes_that_are_always_changed_on_their_way_are_one_line(
    store: blobs.Store,
    azure: Azure,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send(store, files)
    monkeypatch.setattr(blobs, "TRIES", 2)
    azure.fault(host="blob", path="small.json", method="GET", corrupt=3, times=None)
    with pytest.raises(UserError, match=r"^workspace W: [^\n]*the bytes were changed on their way"):
        bring(store, tmp_path)
    assert not (tmp_path / "sub/small.json").exists()
    azure.calm()
    bring(store, tmp_path)
    assert_same(tmp_path, files)


def test_a_signature_that_storage_refuses_is_renewed_once_for_all(
    store: blobs.Store, azure: Azure, files: dict[str, Path]
) -> None:
    """Storage itself says so, to four blocks at once."""
    good = store.container
    store.container = client.container(good.url.replace("sig=", "sig=x"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(store.listed, ["p/"] * 4))
    assert found == [{}] * 4
    assert len(azure.calls(path="comp=list", status=403)) == 4
    assert len(azure.calls(path="listSecrets")) == 2


SENDS = """
import sys
from pathlib import Path
from stages import azure, blobs
blobs.BLOCK = int(sys.argv[5])
ml = azure.connect(azure.Place(*sys.argv[1:4]))
store = blobs.Store(lambda: azure.store_container(ml), "W")
blobs.upload(store, "p/", {"model.onnx.data": Path(sys.argv[4])}, lambda more: None)
"""


def test_a_killed_upload_goes_on_with_the_blocks_that_are_missing(
    store: blobs.Store, azure: Azure, files: dict[str, Path]
) -> None:
    path = files["model.onnx.data"]
    azure.calm()
    azure.fault(host="blob", path="comp=block&", method="PUT", after=3, delay=30, times=None)
    place = [azure.world[name] for name in ("subscription", "resource_group", "workspace")]
    process = subprocess.Popen(
        [sys.executable, "-c", SENDS, *place, str(path), str(BLOCK)], cwd=REPO
    )
    deadline = time.monotonic() + 60
    while len(azure.calls("comp=block&", method="PUT", status=201)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    azure.calm()
    send(store, {"model.onnx.data": path})
    puts = azure.calls("comp=block&", method="PUT", status=201)
    assert sum(call["received"] for call in puts) == SIZES["model.onnx.data"] - 3 * BLOCK
    assert {blob["size"] for blob in azure.blobs("p/")} == {SIZES["model.onnx.data"]}


class Slow:
    """A way to the emulator that takes so many bytes a second of each connection."""

    def __init__(self, proxy: str, rate: float) -> None:
        self.rate = rate
        host, _, port = proxy.removeprefix("http://").partition(":")
        self.emulator = (host, int(port))
        self.server = socket.socket()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.server.bind(("127.0.0.1", 0))
        self.server.listen()
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            near, _ = self.server.accept()
            far = socket.create_connection(self.emulator)
            Thread(target=self.copy, args=(near, far, self.rate), daemon=True).start()
            Thread(target=self.copy, args=(far, near, 1e12), daemon=True).start()

    @staticmethod
    def copy(source: socket.socket, to: socket.socket, rate: float) -> None:
        try:
            while data := source.recv(1 << 16):
                time.sleep(len(data) / rate)
                to.sendall(data)
        except OSError:
            pass
        source.close()
        to.close()


def test_a_block_may_take_longer_than_the_limit_for_connecting(
    store: blobs.Store, azure: Azure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket's limit holds for all of what it is given at once."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_000_000))
    monkeypatch.setattr(blobs, "TRIES", 1)
    monkeypatch.setattr(blobs, "BLOCK", 4 << 20)
    monkeypatch.setitem(client.TIMEOUTS, "connection_timeout", 1)
    slow = Slow(azure.env["HTTPS_PROXY"], 1e6)
    with mock.patch.dict(os.environ, HTTPS_PROXY=slow.url, https_proxy=slow.url):
        store.container = store.connect()
        blobs.upload(store, "p/", {"file": path}, lambda more: None)
    assert {blob["size"] for blob in azure.blobs("p/")} == {3_000_000}


def test_a_service_that_never_answers_is_one_line(
    store: blobs.Store, azure: Azure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "TRIES", 2)
    monkeypatch.setitem(client.TIMEOUTS, "read_timeout", 0.5)
    store.container = store.connect()
    azure.fault(host="blob", delay=30, times=None)
    with pytest.raises(UserError, match=r"^workspace W: [^\n]*timed out[^\n]*is the network there"):
        store.listed("p/")


LISTING = """<?xml version="1.0" encoding="utf-8"?>
<EnumerationResults><Blobs><Blob><Name>p/{}</Name><Properties><Etag>0x1</Etag>
<Content-Length>5</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob></Blobs>
</EnumerationResults>"""


def listing(name: str) -> dict[str, Any]:
    """A list of one blob in place of the service's."""
    xml = {"content-type": "application/xml"}
    return {"status": 200, "headers": xml, "body": LISTING.format(name), "path": "comp=list"}


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "a//out", "a\\..\\out"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    store: blobs.Store, azure: Azure, tmp_path: Path, name: str
) -> None:
    azure.fault(times=None, **listing(name))
    with pytest.raises(UserError, match="is no name for a file in a folder; refused"):
        blobs.download(store, "p/", list(store.listed("p/")), tmp_path / "to", print)
    assert not list(tmp_path.iterdir())
    assert not azure.calls("out", method="GET")


PUT = {"host": "blob", "method": "PUT"}
NO_RIGHT = {
    "path": "listSecrets",
    "status": 403,
    "body": {"error": {"code": "AuthorizationFailed"}},
}


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([{**PUT, "status": 503, "times": None}], r"503[^\n]*try again in some minutes"),
        ([{**PUT, "status": 403}, NO_RIGHT], r"403[^\n]*ask for the role"),
        (
            [{"after": 1, **listing("other")}],
            "not there as sent: empty, model.onnx.data, sub/small",
        ),
    ],
    ids=["stays away", "no new signature", "lost"],
)
def test_an_upload_in_vain_is_one_line(
    store: blobs.Store,
    azure: Azure,
    files: dict[str, Path],
    faults: list[dict[str, Any]],
    message: str,
) -> None:
    for rule in faults:
        azure.fault(**rule)
    with mock.patch.object(blobs, "TRIES", 2), pytest.raises(UserError) as refused:
        send(store, files)
    assert re.fullmatch(rf"workspace W: {message}.*", str(refused.value))
    assert "sig=" not in str(refused.value)


def test_folders_of_a_store_with_folders_are_no_files(store: blobs.Store, azure: Azure) -> None:
    store.container.upload_blob("p/sub", b"", metadata={"hdi_isfolder": "true"})
    store.container.upload_blob("p/sub/file", b"hello")
    assert list(store.listed("p/")) == ["sub/file"]


def test_a_blob_that_changes_while_it_is_fetched_is_one_line(
    store: blobs.Store, azure: Azure, files: dict[str, Path], tmp_path: Path
) -> None:
    send(store, files)
    changed = tmp_path / "changed"
    changed.write_bytes(b"-" * SIZES["model.onnx.data"])

    def told(more: int) -> None:
        if more:
            send(store, {"model.onnx.data": changed})

    with pytest.raises(UserError, match=r"^workspace W: 412 [^\n]*it was changed meanwhile"):
        blobs.download(store, "p/", ["model.onnx.data"], tmp_path / "a", told)
    assert not (tmp_path / "a/model.onnx.data").exists()
