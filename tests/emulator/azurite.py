"""Azurite, Microsoft's emulator of Azure Blob storage, as a process on a free loopback port."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / ".azurite/node_modules/.bin/azurite-blob"
LISTENS = re.compile(r"successfully listens? on https?://127\.0\.0\.1:(\d+)")
START_SECONDS = 30  # about 1 s on two cores
STOP_SECONDS = 5
# The account that Azurite has by itself, and its published key:
# https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


def with_parent() -> None:
    """For a child process: end when its parent does, even by SIGKILL. Linux only, from prctl(2)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Azurite:
    """A blob service with one account; the test is skipped where Azurite is not installed.

    Args:
        folder: where it keeps its blobs, and `azurite.log` with a line for each request.
        cert: a PEM certificate, with which it speaks https and takes bearer tokens.
        key: the certificate's PEM key.
        account: the storage account.
        account_key: its key, in base64.
    """

    def __init__(
        self,
        folder: Path,
        cert: Path | None = None,
        key: Path | None = None,
        account: str = ACCOUNT,
        account_key: str = ACCOUNT_KEY,
    ) -> None:
        self.folder, self.account, self.account_key = folder, account, account_key
        self.log = folder / "azurite.log"
        self.port = 0
        self._tls = ["--cert", str(cert), "--key", str(key), "--oauth", "basic"] if cert else []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The blob service of the account."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}/{self.account}"

    @property
    def connection_string(self) -> str:
        return (
            f"DefaultEndpointsProtocol={self.url.partition(':')[0]};AccountName={self.account};"
            f"AccountKey={self.account_key};BlobEndpoint={self.url};"
        )

    def __enter__(self) -> Azurite:
        """Start it, on the same port as before if it was stopped, and wait until it listens."""
        if not PROGRAM.exists():
            pytest.skip("Azurite is not installed: make .azurite")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(str(PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
                    *("--location", str(self.folder), "--skipApiVersionCheck"),
                    *("--disableTelemetry", *self._tls),
                ],
                env={**os.environ, "AZURITE_ACCOUNTS": f"{self.account}:{self.account_key}"},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=with_parent,  # noqa: PLW1509, it takes no lock
            )
        deadline = time.monotonic() + START_SECONDS
        while not (said := LISTENS.search(self.log.read_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"Azurite did not start: {self.log.read_text()}")
            time.sleep(0.05)
        self.port = int(said[1])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; what it keeps in its folder stays, as SIGTERM lets it write its index."""
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
