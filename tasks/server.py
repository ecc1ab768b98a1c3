"""The Prefect server this project uses: one that is configured and answers, or its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

from stages.errors import UserError
from stages.stage import new_output

START_SECONDS = 180  # a new database takes 20 to 40 s on two slow cores
STOP_SECONDS = 20
PID_FILE = "server.pid"  # where `prefect server stop` looks too
FIRST_PORT = 4200
PORTS = 100
UNREADABLE = (FileNotFoundError, KeyError, TypeError, ValueError)  # what TOML can be that we read
CONFIG = """\
# Written by `olivepress` for the server it started; every prefect command in this folder reads it.
home = {home}

[api]
url = "http://127.0.0.1:{port}/api"

[server.api]
port = {port}

[server]
analytics_enabled = false

[server.concurrency]
lease_storage = "prefect.server.concurrency.lease_storage.filesystem"  # outlives a restart
"""


def ensure(root: Path) -> str:
    """The address of a server that answers; starts one in the background when none is configured.

    Returns:
        The API's address, for instance `http://127.0.0.1:4200/api`. It is also set as
        PREFECT_API_URL, and written to prefect.toml when the server is this project's own.

    Raises:
        UserError: the configured server does not answer or wants another sign-in, or a new one
            did not start.
    """
    chosen = os.environ.get("PREFECT_API_URL") or _profile_url()
    if chosen:
        if not answers(chosen):
            raise UserError(
                f"PREFECT_API_URL is {chosen}, and nothing answers there; start that server, "
                "or unset it to have one started here"
            )
        if not _signed_in(chosen):
            raise UserError(
                f"{chosen} wants a sign-in: set PREFECT_API_AUTH_STRING to its USER:PASSWORD"
            )
        return chosen
    own = _own_url(root)
    if not own or not is_own(root, own):
        own = _begin(root)
    os.environ["PREFECT_API_URL"] = own
    os.environ["PREFECT_HOME"] = str(_home(root))
    return own


def _begin(root: Path) -> str:
    """Start this project's server, unless another command does, or one that was killed meanwhile.

    Two servers on a new database break it.
    """
    home = _home(root)
    home.mkdir(exist_ok=True)
    with (home / "start.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        own = _own_url(root)
        deadline = time.monotonic() + START_SECONDS
        while own and time.monotonic() < deadline:
            there = answers(own)
            if there and is_own(root, own):
                return own
            if there or not _lives(home / PID_FILE):
                break
            time.sleep(0.25)
        return _start(root)


def _lives(pid_file: Path) -> bool:
    """Whether the process of a server that was started is there, answering or not."""
    import psutil  # 0.1 s, and a server is seldom begun

    try:
        pid = int(pid_file.read_text("utf-8"))
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and "server" in process.cmdline()
    except (OSError, ValueError, psutil.Error):
        return False


def ui_url(api_url: str) -> str:
    return api_url.removesuffix("/api")


def answers(api_url: str, timeout: float = 15.0) -> bool:
    """Whether a Prefect server answers there, `timeout` in seconds: one that is busy takes some."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=timeout) as reply:
            return reply.read().strip() == b"true"
    except (urllib.error.URLError, OSError, ValueError):
        return False


def is_own(root: Path, api_url: str) -> bool:
    """Whether the server that answers there keeps this project's history.

    When one was killed, that of another clone may have its port.
    """
    try:
        with urllib.request.urlopen(f"{api_url}/admin/settings", timeout=15.0) as reply:
            return bool(json.load(reply)["home"] == str(_home(root)))
    except urllib.error.HTTPError as error:  # it wants a sign-in before it says
        return error.code == 401 and _lives(_home(root) / PID_FILE)
    except (urllib.error.URLError, OSError, ValueError, KeyError):
        return False


def _signed_in(api_url: str) -> bool:
    """Whether the server takes requests as the settings sign them; /health is open to all."""
    try:
        with urllib.request.urlopen(f"{api_url}/admin/version", timeout=START_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        if error.code != 401:
            return True
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except PrefectHTTPStatusError as error:
        return error.response.status_code != 401
    return True


def stop(root: Path) -> bool:
    """Stop the server that was started here; False when there was none."""
    url, pid_file = _own_url(root), _home(root) / PID_FILE
    if not pid_file.exists():
        return False
    if url and is_own(root, url):  # else it was killed, and its number may be another's by now
        pid = int(pid_file.read_text("utf-8"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while answers(url) and time.monotonic() < deadline:
            time.sleep(0.2)
        if answers(url):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    pid_file.unlink(missing_ok=True)
    (root / "prefect.toml").unlink(missing_ok=True)
    return True


def _home(root: Path) -> Path:
    return root / ".prefect"


def _own_url(root: Path) -> str | None:
    try:
        return tomllib.loads((root / "prefect.toml").read_text("utf-8"))["api"]["url"]
    except UNREADABLE:
        return None


def _profile_url() -> str | None:
    """PREFECT_API_URL of the user's active Prefect profile, as `prefect config set` stores it."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text("utf-8"))
        active = os.environ.get("PREFECT_PROFILE") or profiles["active"]
        return profiles["profiles"][active]["PREFECT_API_URL"]
    except UNREADABLE:
        return None


def free_port(first: int = FIRST_PORT) -> int:
    """The first port from `first` on that nothing listens on.

    Raises:
        UserError: `PORTS` ports in a row are in use.
    """
    for port in range(first, first + PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port from {first} to {first + PORTS - 1} for the Prefect server")


def _start(root: Path) -> str:
    """Start a server that outlives this process, its output going to `.prefect/server.log`.

    `prefect server start --background` is no help here: it leaves the server writing to pipes that
    nobody reads, so the first warning that the server logs ends it.
    """
    home = _home(root)
    home.mkdir(exist_ok=True)
    port = free_port()
    deadline = time.monotonic() + START_SECONDS
    process = _process(root, port)
    while time.monotonic() < deadline:
        url = f"http://127.0.0.1:{port}/api"
        if is_own(root, url):
            return url
        if process.poll() is not None:
            if free_port(port) == port:
                break
            port = free_port(port)  # another took it in the meantime
            process = _process(root, port)
        time.sleep(0.25)
    process.kill()
    (home / PID_FILE).unlink(missing_ok=True)
    (root / "prefect.toml").unlink(missing_ok=True)
    raise UserError(
        f"the Prefect server did not start on port {port}; {home / 'server.log'} ends with:\n"
        + "\n".join((home / "server.log").read_text("utf-8", "replace").splitlines()[-5:])
    )


def _process(root: Path, port: int) -> subprocess.Popen:
    """Begin a server, and write down where it will be."""
    home = _home(root)
    with new_output(root / "prefect.toml") as path:  # every prefect command here reads it
        path.write_text(CONFIG.format(home=json.dumps(str(home)), port=port), "utf-8")
    env = {**os.environ, "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    env.pop("PREFECT_API_URL", None)
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tasks.prefect_server", "server", "start"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            cwd=root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal is not meant for the server
        )
    (home / PID_FILE).write_text(str(process.pid), "utf-8")
    return process
