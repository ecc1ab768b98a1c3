"""base.source hf: the real client and a hub on loopback, through the stage's command line."""

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

import numpy as np
import pytest
import yaml
from hub import LocalHub, Refusal, Repository, serve
from safetensors.numpy import save_file
from tiny import REPO, assert_refused, make_project, run_stage

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MOVED = "f" * 40
TOKEN = "hf_" + "OliveTree" * 4
OTHER = "hf_" + "Somebody" * 4
BIG = "extra.safetensors"  # 4 MB
NEEDED = {
    "LICENSE",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    BIG,
    "tokenizer.json",
    "tokenizer_config.json",
}
UNNEEDED = [
    "README.md",
    ".gitattributes",
    "pytorch_model.bin",
    "modeling_tiny.py",
    "plot.png",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "original/model.safetensors",
    "tokenizer/tokenizer.json",
]


@dataclass
class Place:
    """A project whose base is some/tiny at COMMIT, and the hub that has it."""

    project: Path
    hub: LocalHub

    @property
    def home(self) -> Path:
        return self.project / "hf"

    @property
    def base(self) -> Path:
        return self.project / "models/base"

    def fetch(self) -> subprocess.CompletedProcess[str]:
        return run_stage(self.project, "fetch")

    def fetched(self) -> dict[str, bytes]:
        """Fetch with success; content of models/base by name."""
        done = self.fetch()
        assert done.returncode == 0, done.stdout + done.stderr
        return {path.name: path.read_bytes() for path in self.base.iterdir()}

    def ask_for(self, repo: str, revision: str = COMMIT) -> None:
        path = self.project / "params.yaml"
        values = yaml.safe_load(path.read_text("utf-8"))
        values["base"] |= {"source": "hf", "id": repo, "revision": revision}
        path.write_text(yaml.safe_dump(values), "utf-8")

    def kept(self, pattern: str) -> list[Path]:
        return sorted(self.home.glob(f"hub/models--some--tiny/{pattern}"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("hub"))
    shutil.rmtree(project / "models/base")
    (project / "tiny").rename(project.parent / "tiny")
    return project


@pytest.fixture(scope="module")
def files(model: Path) -> dict[str, bytes]:
    folder = model.parent / "tiny"
    save_file({"more": np.random.default_rng(0).random((1000, 500))}, folder / BIG)
    (folder / "LICENSE").write_text("free")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def place(
    model: Path, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    for name in [n for n in os.environ if n.lower().endswith("_proxy") or n.startswith("HF_")]:
        monkeypatch.delenv(name)
    more = dict.fromkeys(UNNEEDED, b"not needed here")
    moved = files | {"config.json": b"{}"}
    with serve(LocalHub(known={TOKEN, OTHER})) as hub:
        hub.repositories["some/tiny"] = Repository({COMMIT: files | more, MOVED: moved}, MOVED)
        place = Place(Path(shutil.copytree(model, tmp_path / "project")), hub)
        place.ask_for("some/tiny")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(place.home))
        yield place


def busy(part: str, status: int = 503, times: int = 1, **headers: str) -> Refusal:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Refusal(part, status, named, times)


def test_only_what_is_needed_of_the_pinned_commit(place, files):
    """`main` is elsewhere; files are neither asked for by branch nor through Xet."""
    assert place.fetched() == files
    assert place.hub.fetched() == NEEDED == set(files)
    assert all(COMMIT in asked.path for asked in place.hub.asked)
    assert not [asked for asked in place.hub.asked if "xet" in asked.path]
    assert not any(path.is_symlink() for path in place.base.iterdir())
    # The client finds there what it would have made itself.
    assert len(place.kept(f"snapshots/{COMMIT}/*")) == len(NEEDED)
    assert not place.kept("blobs/*.incomplete")


def test_second_fetch_asks_for_the_list_alone(place, files):
    place.fetched()
    place.hub.asked.clear()
    place.hub.repositories["some/tiny"].main = COMMIT
    assert place.fetched() == files
    assert len(place.hub.asked) == 1


def test_cut_file_is_gone_on_with(place, files):
    place.hub.cut[BIG] = 2_000_000
    assert place.fetched() == files
    assert [asked.range for asked in place.hub.gets(BIG)] == [None, "bytes=2000000-"]
    assert sum(asked.sent for asked in place.hub.gets(BIG)) == len(files[BIG])


def test_file_that_stops_coming_is_gone_on_with(place, files, monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    place.hub.hold[BIG] = 2_000_000
    assert place.fetched() == files
    assert [asked.range for asked in place.hub.gets(BIG)] == [None, "bytes=2000000-"]


def test_killed_fetch_is_gone_on_with(place, files):
    place.hub.hold[BIG] = 2_000_000
    command = [sys.executable, "-m", "stages.fetch"]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, cwd=place.project, env=env) as stage:
        until = time.monotonic() + 60
        # Python keeps back the last bytes, less than its buffer of 8 kB.
        while not any(part.stat().st_size > 1_990_000 for part in place.kept("blobs/*.incomplete")):
            assert time.monotonic() < until and stage.poll() is None
            time.sleep(0.02)
        stage.send_signal(signal.SIGKILL)
    place.hub.released.set()
    (part,) = place.kept("blobs/*.incomplete")
    have = part.stat().st_size
    assert not place.base.exists() and not place.kept("snapshots/*")
    assert place.fetched() == files
    first, second = place.hub.gets(BIG)
    assert (first.range, second.range) == (None, f"bytes={have}-")
    assert first.sent == 2_000_000 and second.sent == len(files[BIG]) - have
    for name in NEEDED - {BIG}:
        assert sum(asked.sent for asked in place.hub.gets(name)) == len(files[name])


def test_half_a_download_is_no_cache(place, monkeypatch):
    place.hub.refusals = [busy("name=model.safetensors", 404)]
    assert place.fetch().returncode == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused(place.project, place.fetch(), "is not in the cache, and HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("token", "status", "message"),
    [
        (None, 401, "accept its licence on {url}/some/tiny, then run `hf auth login`"),
        (OTHER, 403, "accept its licence on {url}/some/tiny, then run `hf auth login`"),
        ("hf_" + "Unknown" * 5, 401, "401 Unauthorized; run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_gated_model_says_what_to_do(place, monkeypatch, token, status, message):
    tiny = place.hub.repositories["some/tiny"]
    tiny.gated, tiny.token = True, TOKEN
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    done = place.fetch()
    assert_refused(place.project, done, message.format(url=place.hub.url))
    assert len(done.stderr.splitlines()) == 1
    assert place.hub.asked[-1].status == status
    assert token is None or token not in done.stdout + done.stderr


def test_token_opens_a_gated_model_and_is_kept_nowhere(place, files, monkeypatch):
    tiny = place.hub.repositories["some/tiny"]
    tiny.gated, tiny.token = True, TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    place.hub.cut[BIG] = 2_000_000  # a request more, and something to say
    place.hub.refusals = [busy(BIG, Retry_After="0")]
    done = place.fetch()
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr and "s3cr3t" not in done.stdout + done.stderr
    for path in place.project.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    # The host of the large files is another, which the token is not for.
    tokens = {("/cdn/" in asked.path, asked.token) for asked in place.hub.asked}
    assert tokens == {(False, TOKEN), (True, None)}


def test_hub_out_of_reach(place, files, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = place.fetch()
    assert_refused(place.project, done, "is not in the cache and the hub cannot be reached")
    assert len(done.stderr.splitlines()) == 1
    monkeypatch.setenv("HF_ENDPOINT", place.hub.url)
    place.fetched()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert place.fetched() == files


def test_hf_hub_offline_is_obeyed(place, files, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = place.fetch()
    assert_refused(place.project, done, "is not in the cache, and HF_HUB_OFFLINE is set")
    assert len(done.stderr.splitlines()) == 1 and not place.hub.asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    place.fetched()
    place.hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert place.fetched() == files
    assert not place.hub.asked


def test_hub_that_never_answers(place, files, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    place.hub.silent = True
    assert_refused(place.project, place.fetch(), "the hub cannot be reached (ReadTimeout)")
    place.hub.silent = False
    place.fetched()
    place.hub.silent = True
    assert place.fetched() == files


def test_busy_hub_is_asked_again(place, files):
    place.hub.refusals = [
        busy("/revision/", 429, Retry_After="0"),
        busy(f"name={BIG}", 503, 2, Retry_After="0"),
        busy("resolve-cache", 502, Retry_After="0"),
    ]
    assert place.fetched() == files
    assert not any(refusal.times for refusal in place.hub.refusals)


def test_hub_that_stays_busy(place):
    place.hub.refusals = [busy("", 503, 10**6, Retry_After="0")]
    done = place.fetch()
    assert_refused(place.project, done, "503 Service Unavailable; try again later")


@pytest.mark.parametrize("name", [BIG, "config.json"])
def test_damaged_file_is_refused_and_not_kept(place, files, name):
    place.hub.damaged.add(name)
    done = place.fetch()
    assert_refused(place.project, done, f"{name} came damaged", "try again")
    assert not place.base.exists() and not place.kept("blobs/*.incomplete")
    place.hub.damaged.clear()
    assert place.fetched() == files


def test_hub_that_tells_of_another_content_later(place, files):
    """Its list has the digests that are kept to; what else it says of a file is not asked for."""
    place.hub.swapped = dict.fromkeys(["config.json", "model.safetensors"], bytes(100_000))
    assert place.fetched() == files
    assert {asked.method for asked in place.hub.asked} == {"GET"}
    assert len(place.kept("blobs/*")) == len(files)


def test_damage_in_the_cache_is_found(place, files, monkeypatch):
    place.fetched()
    shutil.rmtree(place.base)

    def damage() -> None:
        content = bytearray(files[BIG])
        content[len(content) // 2] ^= 1
        (place.home / f"hub/models--some--tiny/snapshots/{COMMIT}/{BIG}").write_bytes(content)

    damage()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = place.fetch()
    assert_refused(place.project, done, f"{BIG}: damaged in the hub's cache, and removed")
    assert not place.base.exists()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert place.fetched() == files
    damage()
    assert place.fetched() == files
    assert len(place.hub.gets(BIG)) == 3


def test_full_disk_is_found_before_the_download(place):
    place.hub.sizes["model.safetensors"] = 10**15
    assert_refused(place.project, place.fetch(), "1000000.00 GB are needed and")
    assert len(place.hub.asked) == 1


@pytest.mark.parametrize(
    ("repo", "revision", "token", "message"),
    [
        ("some/none", COMMIT, None, "base.id: some/none is not on the hub, or is private"),
        ("some/none", COMMIT, TOKEN, "base.id: some/none is not on the hub, or is private"),
        ("some/tiny", "e" * 40, None, f"base.revision: some/tiny has no commit {'e' * 40}"),
    ],
)
def test_hub_says_no(place, monkeypatch, repo, revision, token, message):  # noqa: PLR0917
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    place.ask_for(repo, revision)
    done = place.fetch()
    assert_refused(place.project, done, message)
    assert len(done.stderr.splitlines()) == 1


def test_pickles_alone_are_refused_before_the_download(place):
    place.hub.repositories["some/tiny"].commits[COMMIT] = {
        "config.json": b"{}",
        "pytorch_model.bin": b"cos\nsystem",
    }
    done = place.fetch()
    assert_refused(place.project, done, "some/tiny at", "pickles", "pytorch_model.bin")
    assert len(place.hub.asked) == 1
