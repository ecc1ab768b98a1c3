"""A PostgreSQL server of one's own: Debian's programs on a folder in /tmp and a loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from stages.stage import killed_with_parent
from tasks.server import free_port

START_SECONDS = 30  # about 1 s on two cores


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`, of the newest version; None if not installed.

    Debian keeps them apart from PATH, one folder for each version.
    """
    found = sorted(
        Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=lambda p: float(p.parent.name)
    )
    on_path = shutil.which("initdb")
    return found[-1] if found else Path(on_path).parent if on_path else None


class Postgres:
    """A server with one role, `prefect`, and one database of that name; no passwords.

    Args:
        settings: of postgresql.conf, for instance `fsync=off`.

    Raises:
        RuntimeError: it is not installed, or did not start.
    """

    def __init__(self, *settings: str) -> None:
        found = programs()
        if not found:
            raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
        self.programs = found
        self.settings = settings
        self.port = free_port(5440)
        self.url = f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/prefect"

    def __enter__(self) -> Postgres:
        # Not in a test's folder, which only its user may enter: the server does not run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._as: dict[str, Any] = {"cwd": self.folder}
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._as |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data = self.folder / "data"
        made = ("--auth=trust", "--username=prefect", "--encoding=UTF8", "--no-sync", str(data))
        self._do("initdb", *made)
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(self.programs / "postgres", "-D", data, "-k", self.folder),
                    *("-p", str(self.port), "-c", "listen_addresses=127.0.0.1"),
                    *(word for setting in self.settings for word in ("-c", setting)),
                ],
                stdout=log,
                stderr=log,
                preexec_fn=killed_with_parent,  # noqa: PLW1509
                **self._as,
            )
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if self._try("pg_isready", *self.there).returncode == 0:
                self._do("createdb", *self.there, "--username=prefect", "prefect")
                return self
            time.sleep(0.1)
        log_text = (self.folder / "log").read_text()
        self.__exit__(None, None, None)
        raise RuntimeError(f"PostgreSQL did not start:\n{log_text}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.send_signal(signal.SIGINT)  # ends sessions too
        self.process.wait(60)
        shutil.rmtree(self.folder)

    @property
    def there(self) -> tuple[str, ...]:
        """What its client programs take to find it."""
        return "--host=127.0.0.1", f"--port={self.port}"

    def query(self, sql: str) -> str:
        """What a query of one value says."""
        options = (*self.there, "--username=prefect", "--no-align", "--tuples-only")
        return self._do("psql", *options, f"--command={sql}", "prefect").strip()

    def _do(self, program: str, *args: str) -> str:
        done = self._try(program, *args)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")
        return done.stdout

    def _try(self, program: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = [self.programs / program, *args]
        return subprocess.run(command, capture_output=True, text=True, check=False, **self._as)
