"""No secret in what is kept or shown, no connection to elsewhere, no door open to others."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from conftest import BIN, WATCH, hears_ctrl_c, sh, typed
from lab import copy_project
from stages.errors import UserError
from stages.redact import without_secrets
from tasks import overrides
from tasks.dvc_command import Dvc
from tasks.git import git
from tests.watch.sitecustomize import is_here

# Environment variable -> a secret that is looked for afterwards.
CANARIES = {
    "AZURE_CLIENT_SECRET": "canary-azure-client-secret",
    "HF_TOKEN": "hf_canaryCanaryCanaryCanary",
    "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=https;AccountName=a;"
    "AccountKey=Y2FuYXJ5Y29ubmVjdGlvbg==;EndpointSuffix=core.windows.net",
    "PREFECT_API_AUTH_STRING": "somebody:canary-api-password",
    "SSH_PRIVATE_KEY": "-----BEGIN KEY-----\ncanaryLineOne\ncanaryLineTwo\n-----END KEY-----",
}
# What must be found nowhere; the last four stand in configuration that Git and DVC read.
HIDDEN = [
    *("canary-azure-client-secret", "canaryCanaryCanary", "Y2FuYXJ5Y29ubmVjdGlvbg"),
    *("canary-api-password", "canaryLineOne", "canaryLineTwo"),
    *("canary-git-password", "canaryGitToken", "canary-dvc-password", "Y2FuYXJ5ZHZjcmVtb3Rl"),
]
GIT_REMOTE = "https://somebody:canary-git-password@127.0.0.1:1/x.git"
# Where a person put them, and this file, which is in a copy of the project too.
OWN = {".git/config", ".dvc/config.local", "tests/test_leaks.py"}
SPEAKS = """
import os, sys
print("environment", dict(os.environ))
print("Authorization: Basic", os.environ["AZURE_CLIENT_SECRET"])
sys.exit("first: refused by https://canaryGit" "Token@127.0.0.1/ " + os.environ["SSH_PRIVATE_KEY"])
"""


def put_secrets(folder: Path) -> None:
    """Into the configuration of Git and DVC, as people do."""
    sh("git", "remote", "add", "origin", GIT_REMOTE, cwd=folder)
    (folder / ".dvc/config.local").write_text(
        "[core]\n    remote = store\n"
        "['remote \"store\"']\n    url = azure://box/x\n    connection_string = "
        "DefaultEndpointsProtocol=http;AccountName=a;AccountKey=Y2FuYXJ5ZHZjcmVtb3Rl;"
        "BlobEndpoint=http://127.0.0.1:1/a;\n"
        "['remote \"web\"']\n    url = https://me:canary-dvc-password@127.0.0.1:1/x\n"
    )
    (folder / ".dvc/config.local").chmod(0o600)


def leaks(*roots: Path) -> list[str]:
    """FILE: SECRET for each that is found, in any file but those of `OWN`."""
    found = []
    for root in roots:
        for path in root.rglob("*"):
            if path.is_file() and not str(path).endswith(tuple(OWN)):
                data = path.read_bytes()
                found += [f"{path}: {word}" for word in HIDDEN if word.encode() in data]
    return found


def test_a_secret_of_several_lines_is_hidden_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for value in CANARIES.values():
        for line in value.splitlines():
            assert not [word for word in HIDDEN if word in without_secrets(f"it is {line}, so")]


@pytest.mark.parametrize(
    "text",
    [
        "fatal: unable to access 'https://canaryGitToken@github.com/a/b'",
        "https://:canary-git-password@host/x",
        "Authorization: Basic canaryGitToken",
    ],
)
def test_addresses_and_headers_lose_their_secrets(text: str) -> None:
    assert "canary" not in without_secrets(text) and "***" in without_secrets(text)
    assert "canary" not in str(UserError(text))


def test_git_says_no_password(tmp_path: Path) -> None:
    sh("git", "init", "--quiet", cwd=tmp_path)
    with pytest.raises(UserError) as error:
        git(tmp_path, "fetch", GIT_REMOTE)
    assert "canary" not in str(error.value) and "127.0.0.1" in str(error.value)


def test_a_stage_that_prints_its_environment_tells_no_secret(toy: Path, api: str) -> None:
    """Not on the terminal, nor in Prefect's logs, states, artifacts and database."""
    from prefect.settings import PREFECT_HOME

    put_secrets(toy)
    (toy / "first.py").write_text(SPEAKS)
    said = [
        typed(*command, cwd=toy, PREFECT_API_URL=api, **CANARIES)
        for command in (["run", "-v"], ["push"], ["push", "--remote", "web"], ["status"])
    ]
    assert [done.exit_code for done in said] == [1, 1, 1, 0]
    shown = "".join(done.stdout + done.stderr for done in said)
    assert "***" in shown and not [word for word in HIDDEN if word in shown]
    home = Path(str(PREFECT_HOME.value()))
    assert (home / "prefect.db").exists() and not leaks(toy, home)


def test_servers_listen_on_this_machine_alone(api: str) -> None:
    port = urlsplit(api).port
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    open_ = [
        at for process in ours for at in process.net_connections("inet") if at.status == "LISTEN"
    ]
    named = [at for at in psutil.net_connections("inet") if at.status == "LISTEN"]
    served = [at for at in named if at.laddr.port == port]
    assert served and {at.laddr.ip for at in [*open_, *served]} <= {"127.0.0.1", "::1"}


def loosely(root: Path, bits: int) -> list[str]:
    """The files and folders below a folder that have one of the mode bits."""
    paths = (path for path in root.rglob("*") if not path.is_symlink())
    return [str(path) for path in paths if stat.S_IMODE(path.stat().st_mode) & bits]


def test_nothing_that_is_made_can_be_written_by_others(lab: Path) -> None:
    assert not loosely(lab, 0o002)


def test_dvcs_database_is_in_the_clone_and_not_writable_by_others(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In /var/tmp, where DVC keeps it, another user could have another database in its place."""
    monkeypatch.delenv("DVC_SITE_CACHE_DIR")
    site = toy / ".dvc/tmp/site"
    assert typed("status", cwd=toy).exit_code == 0
    (ours,) = (site / "repo").iterdir()
    shutil.rmtree(ours)
    Dvc(toy, "dvc", 60, 60, lambda done, total, note: None).do("status")
    assert list((site / "repo").iterdir()) == [ours] and not loosely(toy, 0o002)


@pytest.mark.parametrize("by", ["environment", "configuration"])
def test_a_place_for_dvcs_database_that_a_person_chose_is_kept(
    toy: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    site = toy.parent / "site"
    if by == "environment":
        monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(site))
    else:
        monkeypatch.delenv("DVC_SITE_CACHE_DIR")
        sh("dvc", "config", "--local", "core.site_cache_dir", str(site), cwd=toy)
    assert typed("status", cwd=toy).exit_code == 0
    (ours,) = (site / "repo").iterdir()
    Dvc(toy, "dvc", 60, 60, lambda done, total, note: None).do("status")
    assert list((site / "repo").iterdir()) == [ours] and not (toy / ".dvc/tmp/site").exists()


def test_python_that_connects_to_elsewhere_is_found(
    connections: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process and in children; what the last lines take back is what fails a test."""
    before = connections.read_text()
    with pytest.raises(OSError, match="tests connect to this machine alone"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    code = "import urllib.request as r; r.urlopen('http://elsewhere.test/')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "tests connect to this machine alone" in done.stderr
    noted = connections.read_text().removeprefix(before)
    assert "192.0.2.1" in noted and "elsewhere.test" in noted
    connections.write_text(before)
    assert is_here("127.0.0.2") and is_here("::1") and not is_here("10.0.0.1")


ADDRESS = re.compile(r'(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)"')


def outside(trace: Path) -> list[str]:
    """The calls in strace's output that name an address of another machine."""
    lines = trace.read_text("utf-8", "replace").splitlines()
    return [line for line in lines if any(not is_here(host) for host in ADDRESS.findall(line))]


@pytest.fixture
def strict() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_the_demo_keeps_to_itself(tmp_path: Path, strict: None) -> None:
    """`olivepress demo`, then a run that fails and a push that fails, under strace, which sees
    native code too: no address of another machine, no secret in any file, no mode for others."""
    folder = copy_project(tmp_path / "project")
    copied = {str(path) for path in folder.rglob("*")}  # with the modes that they have here
    put_secrets(folder)
    less = {"finetune.max_steps": 32, "evaluate.max_rows": 4, "evaluate.max_new_tokens": 4}
    gates = ("max_adapter_perplexity_ratio", "min_top1_agreement", "min_exact_answer_rate")
    overrides.apply(folder, less | {f"gates.{gate}": None for gate in gates})
    script = (
        "olivepress demo; olivepress run -v -S gates.max_quantized_perplexity_ratio=0.5; "
        "olivepress push; olivepress lineage models/onnx; olivepress down"
    )
    trace = tmp_path / "trace"
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    env |= {
        **CANARIES,
        "PATH": f"{BIN}:{env['PATH']}",
        "PREFECT_HOME": str(tmp_path),
    }
    env["PYTHONPATH"] = env["PYTHONPATH"].replace(str(WATCH), "").strip(":")
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-e", calls, "-o", trace, "sh", "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=hears_ctrl_c,
    )
    said = done.stdout + done.stderr
    assert "adapter on" in said and "gates.max_quantized_perplexity_ratio" in said, said
    assert "remote store (azure://box/x)" in said and "Traceback" not in said
    assert ADDRESS.findall(trace.read_text("utf-8", "replace")), "strace saw no connection at all"
    assert not outside(trace)
    (tmp_path / "said").write_text(said)
    assert not leaks(folder, tmp_path / "said")
    assert not set(loosely(folder, 0o077 - 0o044)) - copied
    read = {path for path in loosely(folder, 0o044) if "/.dvc/cache/" not in path}
    assert not read - copied
