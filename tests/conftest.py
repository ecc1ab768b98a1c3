"""What the tests share: a Prefect server, small projects with real DVC, and the whole lab once."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from tests.browser import browser, chromium  # noqa: F401
from tests.watch import sitecustomize

if TYPE_CHECKING:
    from click.testing import Result
    from exported import Lab

    from tests.emulator.client import Azure

# The lines of a run reach the server this many seconds late; before Prefect is imported.
os.environ.setdefault("PREFECT_LOGGING_TO_API_BATCH_INTERVAL", "0.2")

REPO = Path(__file__).resolve().parents[1]
WATCH = REPO / "tests/watch"
BIN = Path(sys.executable).parent

TOY = """
stages:
  first:
    cmd: python first.py
    params: [quantize.bits]
    deps: [in.txt, first.py]
    outs: [out/first]
  each:
    foreach: ${adapters}
    do:
      cmd: python each.py ${key}
      deps: [out/first, each.py]
      outs: ["out/each-${key}"]
"""
FIRST = """
from pathlib import Path
print("progress 1/2 half way")
print("first was here")
Path("out").mkdir(exist_ok=True)
Path("out/first").write_text(Path("in.txt").read_text())
"""
EACH = """
import sys
from pathlib import Path
Path(f"out/each-{sys.argv[1]}").write_text(Path("out/first").read_text() * 2)
"""


def sh(
    *command: str, cwd: Path, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as a person would, with the environment of the tests first on PATH."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PWD": str(cwd), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def typed(*args: str, cwd: Path, **env: str) -> Result:
    """`olivepress ARGS` in this process: one of its own takes 1 to 3 s to begin."""
    from typer.testing import CliRunner

    from flows.cli import app
    from tasks.terminal import terminal

    loud = mock.patch.object(terminal, "quiet", False)
    with contextlib.chdir(cwd), mock.patch.dict(os.environ, env), loud:
        done = CliRunner().invoke(app, args, prog_name="olivepress")
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done


def reproduce(project: Path) -> None:
    """Bring every stage up to date, as `dvc repro` does; the test runs in the project."""
    from tasks import bridge

    for stage in bridge.graph(project):
        bridge.reproduce(project, stage, print, 60)


def hears_ctrl_c() -> None:
    """For a child process: undo that a job in the background of a script ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No telemetry, and DVC's hash database apart from the user's."""
    os.environ["DVC_NO_ANALYTICS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["DVC_SITE_CACHE_DIR"] = str(tmp_path_factory.mktemp("dvc-site-cache"))


@pytest.fixture(scope="session", autouse=True)
def connections(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file in which connections to elsewhere are noted, of this process and its children."""
    notes = tmp_path_factory.mktemp("connections") / "notes"
    notes.touch()
    os.environ[sitecustomize.NOTES] = str(notes)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WATCH), before]))
    sys.addaudithook(sitecustomize.watch)
    yield notes


@pytest.fixture(autouse=True)
def connects_to_nothing_outside(connections: Path) -> Iterator[None]:
    """Fail a test that connects, or whose children connect, to another machine."""
    before = connections.stat().st_size
    yield
    with connections.open() as notes:
        notes.seek(before)
        assert not (found := notes.read()), found


@pytest.fixture(autouse=True)
def same_clients_after() -> Iterator[None]:
    """A test that leaves a proxy or a sign-in behind breaks others, far from its own place."""
    before = _of_clients()
    yield
    assert _of_clients() == before


def _of_clients() -> dict[str, str]:
    kinds = ("_PROXY", "_CA_BUNDLE", "SSL_CERT_FILE"), ("AZURE_", "HF_", "MLFLOW_")
    return {
        name: value
        for name, value in os.environ.items()
        if name.upper().endswith(kinds[0]) or name.startswith(kinds[1])
    }


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small matrices: starting a second thread costs more than it does."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def init_project(folder: Path) -> Path:
    """Make `folder` a Git and DVC project with this project's parameters and DVC settings.

    The files are those that `dvc init` once wrote, as in any clone.
    """
    (folder / ".dvc").mkdir(parents=True)
    sh("git", "init", "--quiet", cwd=folder)
    for name in (".dvc/.gitignore", ".dvc/config", ".dvcignore", "params.yaml"):
        shutil.copy(REPO / name, folder / name)
    return folder


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two quick stages, the second once per adapter; the test runs in its folder."""
    folder = init_project(tmp_path / "toy")
    files = {"dvc.yaml": TOY, "first.py": FIRST, "each.py": EACH, "in.txt": "hello\n"}
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Prefect server, started the way `olivepress` starts one."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    from tasks import server

    root = tmp_path_factory.mktemp("server")
    keep = {name: os.environ.pop(name, None) for name in ("PREFECT_API_URL", "PREFECT_HOME")}
    os.environ["PREFECT_HOME"] = str(root / "no-profile")
    with pytest.MonkeyPatch.context() as patch:  # how often it looks for workers that are gone
        patch.setenv("PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS", "1")
        url = server.ensure(root)
    with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: str(root / ".prefect")}):
        yield url
    server.stop(root)
    for name, value in keep.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, api: str) -> Path:
    """A fresh copy of the project in which `olivepress run` has made everything, once.

    Tests that change it put it back. What the run said is in run.json beside it.
    """
    from lab import copy_project

    folder = copy_project(tmp_path_factory.mktemp("lab") / "project")
    said = sh("olivepress", "run", "--json", cwd=folder, PREFECT_API_URL=api).stdout
    (folder.parent / "run.json").write_text(said)
    return folder


@pytest.fixture(scope="session")
def lab_report(lab: Path) -> dict[str, Any]:
    """What `olivepress report` writes of the lab, made once."""
    from lab import olivepress

    return olivepress(lab, "report")


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lab]:
    """Tiny models by architecture, each taken through the stages once; tests leave them alone."""
    from exported import Lab

    return functools.cache(lambda name: Lab(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="session")
def served_package(tmp_path_factory: pytest.TempPathFactory, labs: Callable[[str], Lab]) -> Path:
    """A package of a tiny model with two adapters; tests leave it alone."""
    from tests.serving import make_package

    return make_package(labs("phi3"), tmp_path_factory.mktemp("served") / "package")


@pytest.fixture(scope="session")
def served_url(served_package: Path) -> Iterator[str]:
    """The address of `olivepress serve` with that package."""
    from tests.serving import served

    with served(served_package) as (url, _):
        yield url


@pytest.fixture(scope="session")
def packaged_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a package of the right form; tests change copies of it."""
    from packaged import make_packaged

    return make_packaged(tmp_path_factory.mktemp("packaged") / "project")


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azure]:
    """Azure on loopback; `azure.env` is what a subprocess needs, `azure.reset()` empties it."""
    from tests.emulator.client import Azure

    with Azure(tmp_path_factory.mktemp("azure")) as running:
        yield running
