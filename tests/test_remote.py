"""Push and pull, against Azurite: what moves, what is refused, and that nothing hangs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from azure.storage.blob import BlobServiceClient, ContainerClient

from conftest import BIN, EACH, TOY, hears_ctrl_c, init_project, sh, typed
from stages.errors import UserError
from tasks import bridge, remote
from tests.emulator.azurite import Azurite
from tests.emulator.client import Azure

FIRST = """
from pathlib import Path
import yaml
Path("out/first").mkdir(parents=True)
bits = yaml.safe_load(open("params.yaml"))["quantize"]["bits"]
for i in range(3):
    Path(f"out/first/{i}").write_text(f"{i} {bits}")
"""
EACH = EACH.replace("out/first", "out/first/0")
STAGES = ["first", "each@travel"]


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with Azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


def configure(project: Path, address: str, connection_string: str, name: str = "store") -> None:
    """What three `dvc remote` commands write, in a tenth of the time."""
    (project / ".dvc/config.local").write_text(
        f"[core]\n    remote = {name}\n['remote \"{name}\"']\n    url = {address}\n"
        + (f"    connection_string = {connection_string}\n" if connection_string else "")
    )


def make(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Bring the stages up to date, and say what was done with each."""
    monkeypatch.chdir(project)
    return [bridge.reproduce(project, stage, print, 60).action for stage in STAGES]


def change(project: Path, old: str, new: str) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace(old, new))


def container(azurite: Azurite, name: str) -> ContainerClient:
    service = BlobServiceClient.from_connection_string(azurite.connection_string)
    return service.create_container(name)


@pytest.fixture(scope="module")
def pushed(
    azurite: Azurite, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ContainerClient]:
    """A project of two stages, run for 4 bits and then for 8, committed and pushed."""
    folder = init_project(tmp_path_factory.mktemp("pushed") / "toy")
    files = {"dvc.yaml": TOY, "first.py": FIRST, "each.py": EACH, "in.txt": "hello\n"}
    for name, text in files.items():
        (folder / name).write_text(text)
    box = container(azurite, "box")
    configure(folder, "azure://box/toy", azurite.connection_string)
    (folder / ".gitignore").write_text("/out/\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make(folder, monkeypatch)
        change(folder, "bits: 4", "bits: 8")
        make(folder, monkeypatch)
    moved = remote.push(folder)
    assert moved.files == 10 and moved.url == "azure://box/toy"  # 3 files, a list, each: twice
    sh("git", "add", ".", cwd=folder)
    sh("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "made", cwd=folder)
    return folder, box


@pytest.fixture
def clone(
    pushed: tuple[Path, ContainerClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A colleague's clone, with their own login to the same remote; the test runs in it."""
    project = pushed[0]
    sh("git", "clone", "--quiet", str(project), "clone", cwd=tmp_path)
    shutil.copy(project / ".dvc/config.local", tmp_path / "clone/.dvc/config.local")
    monkeypatch.chdir(tmp_path / "clone")
    return tmp_path / "clone"


def test_a_clone_computes_nothing_of_now_or_before(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = typed("pull", cwd=clone)
    assert done.exit_code == 0, done.output
    assert re.search(r"pull: \d+ files, .* store azure://box/toy", done.stdout)
    assert sh("git", "status", "--porcelain", cwd=clone).stdout == ""
    assert make(clone, monkeypatch) == ["unchanged", "unchanged"]
    assert (clone / "out/first/2").read_text() == "2 8"
    change(clone, "bits: 8", "bits: 4")
    assert make(clone, monkeypatch) == ["restore", "restore"]
    assert (clone / "out/each-travel").read_text() == "0 40 4"


def test_damaged_and_absent_objects(
    pushed: tuple[Path, ContainerClient], clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged one is refused by name; what an absent one belongs to is named; both are computed.

    DVC by itself restores the damaged one as good.
    """
    project, box = pushed
    lock = bridge.made(project)
    names = {made.stage: made.entry["outs"][0]["md5"] for made in lock}
    first, each = (f"toy/files/md5/{names[s][:2]}/{names[s][2:]}" for s in STAGES)
    kept = {name: box.download_blob(name).readall() for name in (first, each)}
    try:
        box.upload_blob(each, b"0 80 9", overwrite=True)
        done = typed("pull", cwd=clone)
        assert done.exit_code == 1 and each.removeprefix("toy/") in done.stderr
        assert not (clone / "out/each-travel").exists() and (clone / "out/first/0").exists()
        box.delete_blob(each)
        again = typed("pull", cwd=clone).stdout
        assert "not in the remote: each@travel" in again and "olivepress run computes" in again
        assert make(clone, monkeypatch) == ["unchanged", "run"]
        assert (clone / "out/each-travel").read_bytes() == kept[each]
    finally:
        box.upload_blob(each, kept[each], overwrite=True)


def test_stages_alone_with_what_they_read(clone: Path, azurite: Azurite) -> None:
    few = container(azurite, "few")
    remote.pull(clone, ["first"])
    assert (clone / "out/first/0").exists() and not (clone / "out/each-travel").exists()
    configure(clone, "azure://few/a", azurite.connection_string)
    remote.push(clone, ["first"])
    sent = [blob.name for blob in few.list_blobs("a/files/")]
    assert len(sent) == 4
    shutil.rmtree(clone / "out")
    shutil.rmtree(clone / ".dvc/cache")
    moved = remote.pull(clone, ["each@travel"])
    assert (clone / "out/first/2").read_text() == "2 8"
    assert list(moved.missing) == ["each@travel"]


def test_a_killed_push_goes_on(
    clone: Path, azurite: Azurite, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = "import os\nos.makedirs('out/first')\nfor i in range(60):\n"
    big += "    open(f'out/first/{i}', 'wb').write(b'%d' % i + bytes(1 << 20))\n"
    (clone / "first.py").write_text(big)
    make(clone, monkeypatch)
    box = container(azurite, "big")
    configure(clone, "azure://big/toy", azurite.connection_string)
    process = subprocess.Popen([BIN / "olivepress", "push"], cwd=clone, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while azurite.log.read_text().count("PUT /devstoreaccount1/big/toy/files/") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    there, before = None, set()
    while there != before or not there:  # nothing is left that goes on sending
        there, before = before, {blob.name for blob in box.list_blobs("toy/files/")}
        time.sleep(0.3)
    assert 0 < len(there) < 62
    log = len(azurite.log.read_text())
    moved = remote.push(clone)
    sent = set(
        re.findall(r"PUT /devstoreaccount1/big/(toy/files/\S+)", azurite.log.read_text()[log:])
    )
    assert not sent & there and len(sent | there) == len(list(box.list_blobs("toy/files/")))
    assert moved.files == len(sent) and remote.push(clone).files == 0


def test_refused_credentials_are_not_printed(clone: Path, azurite: Azurite) -> None:
    wrong = "c2VjcmV0LXRoYXQtbXVzdC1ub3QtYmUtc2Vlbg=="
    text = azurite.connection_string.replace(azurite.account_key, wrong)
    configure(clone, "azure://box/toy", text)
    for command in ("push", "pull"):
        done = typed(command, "--json", cwd=clone)
        said = done.stdout + done.stderr
        assert done.exit_code == 1 and "credentials are not accepted" in said
        assert wrong not in said and said.count("\n") == 1


def test_what_is_not_there_is_said_with_what_to_do(
    toy: Path, azurite: Azurite, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"dvc\.lock is not there: olivepress run writes it"):
        remote.push(toy)
    (toy / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    with pytest.raises(UserError, match=r"no remote is configured: dvc remote add .* azure://"):
        remote.push(toy)
    configure(toy, "azure://nowhere/toy", azurite.connection_string)
    with pytest.raises(UserError, match="no remote is called backup; choose one of store"):
        remote.pull(toy, remote="backup")
    with pytest.raises(UserError, match="nothing is there, or no such container: push to it"):
        remote.pull(toy)
    make(toy, monkeypatch)
    with pytest.raises(UserError, match="is not there; Azure: az storage container create"):
        remote.push(toy)
    configure(toy, "s3://box/toy", "")
    with pytest.raises(UserError, match="pip install dvc-s3"):
        remote.push(toy)


def test_the_login_is_enough(
    pushed: tuple[Path, ContainerClient], clone: Path, azure: Azure
) -> None:
    """No key in the configuration: bearer tokens, through the proxy and with the CA of the test."""
    (clone / ".dvc/config.local").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n"
        f"    url = azure://{azure.world['container']}/dvc\n"
        f"    account_name = {azure.env['AZURE_STORAGE_ACCOUNT']}\n"
    )
    shutil.copytree(pushed[0] / ".dvc/cache", clone / ".dvc/cache")
    with azure.here():
        sent = json.loads(typed("push", "--json", cwd=clone).stdout)
        assert sent["files"] == 10
        shutil.rmtree(clone / ".dvc/cache")
        remote.pull(clone)
    assert (clone / "out/each-travel").read_text() == "0 80 8"


def test_a_failed_login_is_told_apart_from_a_dead_network(
    toy: Path, azure: Azure, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toy / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    configure(toy, f"azure://{azure.world['container']}/dvc", "")
    with (toy / ".dvc/config.local").open("a") as config:
        config.write(f"    account_name = {azure.env['AZURE_STORAGE_ACCOUNT']}\n")
    for name, value in (azure.env | {"AZURE_CLIENT_SECRET": "not-the-secret"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="not signed in to Azure: run `az login`"):
        remote.push(toy, probe_seconds=1.5)


@pytest.fixture
def silent(toy: Path) -> Iterator[socket.socket]:
    """A remote that takes calls and never answers."""
    (toy / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        there = f"http://127.0.0.1:{server.getsockname()[1]}/mine"
        text = f"AccountName=mine;AccountKey=c2VjcmV0;BlobEndpoint={there};"
        configure(toy, "azure://box/toy", f"DefaultEndpointsProtocol=http;{text}")
        yield server


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"probe_seconds": 1}, "no answer within 1 s"),
        ({"quiet_seconds": 1}, "1 seconds in which nothing happened"),
        ({"limit_seconds": 1.2}, "its time limit of 0.02 minutes"),
    ],
)
def test_a_remote_that_is_away(
    toy: Path, silent: socket.socket, limits: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        remote.push(toy, **limits)


def test_ctrl_c_ends_it_and_its_child(toy: Path, silent: socket.socket) -> None:
    process = subprocess.Popen(
        [BIN / "olivepress", "push"],
        cwd=toy,
        env=dict(os.environ),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509
    )
    call, _ = silent.accept()
    with call:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        call.settimeout(60)
        while call.recv(4096):  # until the child, which called, is gone
            pass
    assert process.returncode == 130 and "olivepress push goes on from there" in said
