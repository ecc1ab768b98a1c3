"""Prefect's server on PostgreSQL: the same runs and states, and a history that outlives it."""

from __future__ import annotations

import base64
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from conftest import sh
from tasks import server
from tests.postgres import Postgres, programs

pytestmark = pytest.mark.skipif(
    not programs(), reason="PostgreSQL is not installed: apt-get install postgresql"
)


@pytest.fixture
def database() -> Iterator[Postgres]:
    with Postgres("fsync=off", "full_page_writes=off") as running:
        yield running


@pytest.fixture
def env(tmp_path: Path, database: Postgres) -> dict[str, str]:
    """For the server: settings of docs/server.md."""
    return {
        "PREFECT_API_URL": "",  # the project's own server, whatever other tests have started
        "PREFECT_HOME": str(tmp_path / "no-profile"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.url,
        "PREFECT_SERVER_API_AUTH_STRING": "team:a-secret",
        "PREFECT_API_AUTH_STRING": "team:a-secret",
    }


def start(toy: Path, env: dict[str, str]) -> str:
    """Start a server as a person does; its API's address."""
    return sh("olivepress", "ui", cwd=toy, **env).stdout.strip() + "/api"


def run(toy: Path, env: dict[str, str]) -> set[str]:
    """`olivepress run`: the states of its stages."""
    rows = json.loads(sh("olivepress", "run", "--json", cwd=toy, **env).stdout)["stages"]
    return {row["state"] for row in rows}


def history(api: str) -> dict[str, str]:
    """The state of every flow run that the server knows."""
    sign_in = base64.b64encode(b"team:a-secret").decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {sign_in}"}
    request = urllib.request.Request(f"{api}/flow_runs/filter", b"{}", headers)
    with urllib.request.urlopen(request) as reply:
        return {found["id"]: found["state_name"] for found in json.load(reply)}


def test_runs_are_kept_in_postgresql(toy: Path, env: dict[str, str], database: Postgres) -> None:
    try:
        client = env | {"PREFECT_API_URL": start(toy, env)}
        assert run(toy, client) == {"Completed"}
        before = history(client["PREFECT_API_URL"])
        assert list(before.values()) == ["Completed"]

        stranger = client | {"PREFECT_API_AUTH_STRING": "team:a-guess"}
        refused = sh("olivepress", "run", cwd=toy, check=False, **stranger)
        assert refused.returncode == 1 and refused.stderr == (
            f"olivepress: {client['PREFECT_API_URL']} wants a sign-in: set "
            "PREFECT_API_AUTH_STRING to its USER:PASSWORD\n"
        )

        assert server.stop(toy)
        with mock.patch.dict(os.environ, env):
            assert history(server.ensure(toy)) == before
    finally:
        server.stop(toy)
    assert database.query("SELECT count(*) FROM flow_run") == "1"
    assert not list((toy / ".prefect").glob("*.db"))
    assert " | ERROR " not in (toy / ".prefect/server.log").read_text()
