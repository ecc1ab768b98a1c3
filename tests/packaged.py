"""A project with a package of the right form, and publishing it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import init_project, sh
from stages.errors import UserError
from tasks import bridge
from tasks.publish.__main__ import main
from tasks.publish.mlflow import LIMITS
from tasks.publish.request import make
from tasks.publish.targets import Published
from tests.emulator.client import Azure

NAME = "press"
SECRET = re.compile(r"sig=(?!\*)|AccountKey=(?!\*)|Bearer [A-Za-z0-9]")
PLACE = ("subscription_id", "resource_group", "workspace_name", "registry_name")
REGISTER = {"path": "/models/press/versions/1", "method": "PUT"}  # a call to Azure
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


def make_packaged(folder: Path) -> Path:
    """Make `folder` a project whose package is up to date."""
    init_project(folder)
    files = {"dvc.yaml": PACKAGE, "first.py": FIRST, "package.py": MAKE, "in.txt": "hello\n"}
    for name, text in files.items():
        (folder / name).write_text(text)
    sh("git", "add", "--all", cwd=folder)
    sh("git", *["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"], cwd=folder)
    sh("dvc", "repro", "--quiet", cwd=folder)
    return folder


def work_in_copy(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a project to `folder`, and be in it, with no place to publish to in the environment."""
    for name in [n for n in os.environ if n.startswith(("AZURE", "MLFLOW"))]:
        monkeypatch.delenv(name)
    for name, value in LIMITS.items():  # which the target itself sets, for its whole process
        monkeypatch.setenv(name, value)
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


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
