"""A clone in which runs are begun and killed, with a server of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

from conftest import BIN, REPO
from tests.chaos import processes, project
from tests.chaos.processes import MARK

RUN_SECONDS = 600


class Clone:
    """A clone in which runs are killed.

    Args:
        folder: where it is made, unless it is there.
        kind: `quick` or `real`.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.env = {
            **{name: it for name, it in os.environ.items() if not name.startswith("PREFECT_")},
            **{MARK: str(folder), "PYTHONPATH": str(REPO), "PREFECT_WORKER_QUERY_SECONDS": "1"},
            # A shell would set it, and prefect.yaml says with it where a worker's runs are.
            **{"PATH": f"{BIN}:{os.environ['PATH']}", "PWD": str(folder)},
        }
        kept = Path(f"{folder}.json")
        if not kept.exists():
            project.make(folder, kind)
            self.ready("run")
            began = time.monotonic()
            done = self.run()  # from scratch: so long there is something to kill
            assert done.returncode == 0, done.stdout + done.stderr
            known = {"seconds": time.monotonic() - began, "made": project.made(folder)}
            shutil.copy(folder / "dvc.lock", f"{folder}.lock")
            kept.write_text(json.dumps(known))
        reference = json.loads(kept.read_text())
        self.made: dict[str, str] = reference["made"]
        self.seconds: float = reference["seconds"]

    def _lose(self) -> None:
        """Lose every output and all of DVC's cache."""
        for name in (*project.FOLDERS, ".dvc/cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "dvc.lock").unlink(missing_ok=True)

    def run(self) -> subprocess.CompletedProcess[str]:
        """One plain `olivepress run`, as a person types it."""
        return subprocess.run(
            ["olivepress", "run"],
            cwd=self.folder, env=self.env, capture_output=True, text=True, check=False,
            timeout=RUN_SECONDS,
        )  # fmt: skip

    def begin(self, driver: str) -> subprocess.Popen:
        """Begin the run that is to be killed."""
        command = {
            "run": ["olivepress", "run"],
            "repro": ["dvc", "repro"],
            "worker": ["prefect", "deployment", "run", "optimize/local", "--watch"],
        }[driver]
        return self._start(command, driver)

    def _start(self, command: list[str], name: str) -> subprocess.Popen:
        with Path(f"{self.folder}.{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def ready(self, driver: str) -> None:
        """Have a server, and for a worker's run the worker and the deployment."""
        if driver == "repro":
            return
        if "server" not in self.kinds():
            self._command("olivepress", "ui")
        if driver != "worker" or "worker" in self.kinds():
            return
        self._start(
            ["prefect", "worker", "start", "--pool", "local-pool", "--type", "process"], "worker"
        )
        for _ in range(30):
            done = self._command("prefect", "--no-prompt", "deploy", "--all")
            if "successfully" in done.stdout:
                return
        raise AssertionError(done.stdout + done.stderr)

    def _command(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False
        )

    def forget(self, dice: random.Random) -> None:
        """Be a clone that has yet to make its outputs, or one that only has to restore them."""
        if dice.random() < 0.7:
            return self._lose()
        for name in project.FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.copy(f"{self.folder}.lock", self.folder / "dvc.lock")

    def kinds(self) -> set[str]:
        return {one.kind for one in processes.of(self.folder)}

    def close(self) -> None:
        for one in processes.of(self.folder):
            one.kill()
