"""Follow a job: its state, its log line by line, and its end; or cancel it."""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages import azure
from stages.errors import UserError
from tasks.command import KEPT_LINES, own_words

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml._restclient.runhistory.models import RunDetails

POLL_SECONDS = 2.0
LOST_SECONDS = 600.0  # without any answer; the job goes on
ENDED = ("Completed", "Failed", "Canceled")
LOGS = "user_logs/"  # what the command prints; the service's own logs stay there


@dataclass
class Log:
    """What a job printed, as far as it was shown."""

    shown: dict[str, int] = field(default_factory=dict)
    """Bytes, by the log's name."""
    rest: dict[str, bytes] = field(default_factory=dict)
    """The line that is not yet whole."""

    def news(self, addresses: dict[str, str], whole: bool) -> list[str]:
        """Lines that came since the last time.

        Args:
            addresses: of the logs, by name, with signatures.
            whole: whether nothing will follow, so that the last line is taken as it is.
        """
        lines: list[str] = []
        for name in sorted(name for name in addresses if name.startswith(LOGS)):
            start = self.shown.get(name, 0)
            data = _read(addresses[name], start)
            self.shown[name] = start + len(data)
            *full, rest = (self.rest.get(name, b"") + data).split(b"\n")
            if whole and rest:
                full, rest = [*full, rest], b""
            self.rest[name] = rest
            lines += [line.decode("utf-8", "replace").rstrip("\r") for line in full]
        return lines


def _read(address: str, start: int) -> bytes:
    """A blob from a byte on; nothing when it is not longer."""
    from azure.core.exceptions import HttpResponseError
    from azure.storage.blob import BlobClient

    blob = BlobClient.from_blob_url(address, retry_total=0, **azure.TIMEOUTS)  # type: ignore[arg-type]
    try:
        return blob.download_blob(offset=start).readall()
    except HttpResponseError as error:
        if error.status_code in (404, 416):  # not written yet, not longer
            return b""
        raise


def follow(client: MLClient, name: str, stage: str) -> None:
    """Print a job's state and log until it ends.

    An empty line says that the service answered. When it does not the next try goes on from the
    same byte.

    Raises:
        UserError: the job did not complete, in its own words; no answer for LOST_SECONDS.
    """
    log, state = Log(), None
    said: deque[str] = deque(maxlen=KEPT_LINES)
    heard = time.monotonic()
    while True:
        try:
            found = azure.run_details(client, name)
            lines = log.news(found.log_files or {}, found.status in ENDED)
            heard = time.monotonic()
        except azure.failures() as error:
            if not _passing(error) or time.monotonic() - heard > LOST_SECONDS:
                raise UserError(
                    f"{azure.explain(error, f'job {name}')}; it goes on, and the next olivepress "
                    "run finds it"
                ) from None
            time.sleep(POLL_SECONDS)
            continue
        if found.status != state:
            state = found.status
            print(f"job {name}: {state}\nprogress 0/1 {state}", flush=True)
        for line in [*lines, ""]:
            print(line, flush=True)
            said.append(line)
        if state in ENDED:
            return _judge(found, name, own_words(stage, said, f"job {name}"))
        time.sleep(POLL_SECONDS)


def _passing(error: Exception) -> bool:
    """Whether a failure may be over at the next try."""
    status = getattr(error, "status_code", None)
    return status is None or status in (408, 429) or status >= 500


def _judge(found: RunDetails, name: str, words: str) -> None:
    """Raise a UserError for a job that did not complete: its own words, or the service's."""
    if found.status == "Completed":
        return
    if found.status == "Canceled":
        raise UserError(f"job {name} was cancelled")
    error: Any = getattr(found.error, "error", None)
    code, message = getattr(error, "code", None), getattr(error, "message", None) or ""
    if "exit" in message and code == "UserError":  # the command's own failure
        raise UserError(words)
    first = next((line for line in message.splitlines() if line.strip()), "it does not say why")
    if re.search(r"(?i)image ?build|conda", f"{code} {message}"):
        first = f"its environment could not be built: {first}"
    elif re.search(r"(?i)quota", f"{code} {message}"):
        first = f"no quota for its machine: {first} (ask for more, or take another azure.cluster)"
    raise UserError(f"job {name} {str(found.status).lower()}: {first}")


def cancel(client: MLClient, name: str) -> None:
    """Ask the service to end a job, if there is one that has not ended.

    Raises:
        UserError: it could not be asked.
    """
    from azure.core.exceptions import ResourceNotFoundError

    with azure.explained(f"job {name} goes on, as it could not be cancelled"):
        try:
            status = client.jobs.get(name).status
        except ResourceNotFoundError:  # stopped before it was submitted
            return
        if status not in ENDED:
            client.jobs.begin_cancel(name)
