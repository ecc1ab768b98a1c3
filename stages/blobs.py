"""Files to and from Azure Blob storage: resumable, verified, and in bounded memory.

A file goes up as blocks whose names hold their MD5 (Put Block and Put Block List,
https://learn.microsoft.com/rest/api/storageservices/put-block), so what a killed upload left at the
service is not sent again. It comes down by ranges into a file beside its final name, so what a
killed download left is not fetched again. At most BLOCK x WORKERS bytes are held in memory.
"""

from __future__ import annotations

import base64
import hashlib
import io
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from stages.azure import explain, explained, failures
from stages.errors import UserError
from stages.reading import CONTROL
from stages.stage import progress

if TYPE_CHECKING:
    from azure.storage.blob import BlobProperties, ContainerClient

BLOCK = 4 << 20  # the largest range that the service gives an MD5 for
MOST_BLOCKS = 50_000  # in a blob
WORKERS = 4
TRIES = 6
LONGEST_WAIT = 60.0  # seconds before another try, whatever the service asks for
PROGRESS_SECONDS = 0.5
LONGEST_NAME = 200  # bytes of a part of a name: of 255, with what a part of a file has behind it
PASSING = {408, 429, 500, 502, 503, 504}
SPOILT = "Md5Mismatch"  # with 400: what arrived is not what was sent

_new_md5 = partial(hashlib.md5, usedforsecurity=False)  # the service's own checksum
S = TypeVar("S")
T = TypeVar("T")
Told = Callable[[int], None]  # is given how many more bytes are where they should be


class Store:
    """A container that is asked again when the service is busy, cut off, or wants a new login.

    Args:
        connect: gives the container, signed for some hours; called again after a 401 or 403.
        what: its name in errors, for instance `workspace W`.
    """

    def __init__(self, connect: Callable[[], ContainerClient], what: str) -> None:
        self.connect = connect
        self.what = what
        self.container = connect()
        self._renewing = Lock()

    def call(self, action: Callable[[ContainerClient], T]) -> T:
        """The result of `action`, which is tried up to TRIES times.

        Raises:
            UserError: it failed for good, in one line.
        """
        renewed = False
        for tried in range(1, TRIES + 1):
            used = self.container
            try:
                return action(used)
            except failures() as error:
                status = getattr(error, "status_code", None)
                refused = status in (401, 403) and not renewed
                spoilt = getattr(error, "error_code", None) == SPOILT
                passing = status is None or status in PASSING or spoilt
                said = explain(error, self.what)
                if tried == TRIES or not (refused or passing):
                    raise UserError(said) from None
                if refused:
                    renewed = True
                    self._renew(used)
                else:
                    wait = _wait(error, tried)
                    print(f"{said}; again in {wait:.0f} s", flush=True)
                    time.sleep(wait)
        raise AssertionError

    def _renew(self, used: ContainerClient) -> None:
        """A new signature in place of the one that `used` has, for all threads."""
        with self._renewing, explained(self.what):
            if self.container is used:
                self.container = self.connect()

    def listed(self, prefix: str) -> dict[str, BlobProperties]:
        """Every blob below a prefix that ends with a slash, by its name below it."""
        blobs = self.call(
            lambda there: list(there.list_blobs(name_starts_with=prefix, include=["metadata"]))
        )
        # A store with folders of its own lists them too, as blobs of no bytes.
        files = [blob for blob in blobs if not (blob.metadata or {}).get("hdi_isfolder")]
        return {blob.name.removeprefix(prefix): blob for blob in files}


def shown(total: int) -> Told:
    """Prints progress as bytes arrive, not more often than every PROGRESS_SECONDS."""
    done, last = 0, 0.0

    def told(more: int) -> None:
        nonlocal done, last
        done += more
        if time.monotonic() - last > PROGRESS_SECONDS or done >= total:
            last = time.monotonic()
            progress(done, total, f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

    return told


def _wait(error: Any, tried: int) -> float:
    """Seconds: what the service asks for (Retry-After), else twice as long each time."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = headers.get("Retry-After") or ""
    wait = float(asked) if asked.isdigit() else random.uniform(0.5, 1.0) * 2 ** (tried - 1)
    return min(wait, LONGEST_WAIT)


def upload(store: Store, prefix: str, files: Mapping[str, Path], told: Told) -> None:
    """Make the blobs below `prefix` hold the files: name below it -> path.

    What is there already, whole or in blocks, is not sent again. Other blobs are left alone.

    Raises:
        UserError: it failed for good; or afterwards names or sizes at the service differ.
    """
    there = store.listed(prefix)
    for name, path in sorted(files.items()):
        size = path.stat().st_size
        blob = there.get(name)
        if blob and blob.size == size and blob.content_settings.content_md5 == _md5(path):
            told(size)
        else:
            _upload_file(store, prefix + name, path, told)
    found = {name: blob.size for name, blob in store.listed(prefix).items()}
    wanted = {name: path.stat().st_size for name, path in files.items()}
    wrong = sorted(name for name in wanted if found.get(name) != wanted[name])
    if wrong:
        raise UserError(f"{store.what}: not there as sent: {', '.join(wrong)}; try again")


def _upload_file(store: Store, name: str, path: Path, told: Told) -> None:
    from azure.core.exceptions import ResourceNotFoundError
    from azure.storage.blob import BlobBlock, ContentSettings

    def left(there: ContainerClient) -> set[str]:
        try:
            return {b.id for b in there.get_blob_client(name).get_block_list("uncommitted")[1]}
        except ResourceNotFoundError:
            return set()

    sent = store.call(left)
    whole = _new_md5()
    size = max(BLOCK, -(-path.stat().st_size // MOST_BLOCKS))
    keys: list[str] = []

    def blocks() -> Iterator[tuple[str, bytes]]:
        with path.open("rb") as file:
            while data := file.read(size):
                whole.update(data)
                digest = _new_md5(data).hexdigest()
                keys.append(base64.b64encode(f"{len(keys):06d}{digest}".encode()).decode())
                yield keys[-1], data

    def send(block: tuple[str, bytes]) -> int:
        key, data = block
        if key not in sent:
            # As a stream, of which each piece has the time limit that all of `bytes` would have.
            store.call(
                lambda there: there.get_blob_client(name).stage_block(
                    key, io.BytesIO(data), len(data), validate_content=True
                )
            )
        return len(data)

    _in_batches(send, blocks(), told)
    settings = ContentSettings(content_md5=bytearray(whole.digest()))
    names = [BlobBlock(key) for key in keys]
    store.call(
        lambda there: there.get_blob_client(name).commit_block_list(
            names, content_settings=settings
        )
    )


def _in_batches(action: Callable[[S], T], items: Iterable[S], done: Callable[[T], object]) -> None:
    """WORKERS items at once, so that no more are in memory; `done` gets results in their order."""
    rest = iter(items)
    with ThreadPoolExecutor(WORKERS) as pool:
        while batch := list(islice(rest, WORKERS)):
            for result in pool.map(action, batch):
                done(result)


def download(store: Store, prefix: str, names: list[str], folder: Path, told: Told) -> None:
    """Bring blobs below `prefix` into `folder`, going on where an earlier try stopped.

    A blob that has an MD5 of the whole at the service is checked against it.

    Raises:
        UserError: it failed for good; a name that would be outside the folder; or what came is not
            what the service says it is: that file is removed, and the next try begins it anew.
    """
    for name in names:
        check_name(store.what, name)
    there = store.listed(prefix)
    for name in names:
        path, blob = folder / name, there[name]
        if path.exists() and _is_of(blob, path):
            told(blob.size)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _download_file(store, prefix + name, blob, path, told)


def check_name(what: str, name: str) -> None:
    """Raise a UserError for a blob's name that is no path in a folder."""
    parts = name.split("/")
    outside = name.startswith("/") or not {"", ".", ".."}.isdisjoint(parts)
    unfit = "\\" in name or CONTROL.search(name)
    if outside or unfit or max(len(part.encode()) for part in parts) > LONGEST_NAME:
        raise UserError(f"{what}: {name!r} is no name for a file in a folder; refused")


def _is_of(blob: BlobProperties, path: Path) -> bool:
    """Whether a file has the blob's size and, where the service has one, its MD5."""
    digest = blob.content_settings.content_md5
    return blob.size == path.stat().st_size and (not digest or _md5(path) == digest)


def _download_file(store: Store, name: str, blob: BlobProperties, path: Path, told: Told) -> None:
    from azure.core import MatchConditions

    # The etag in its name: what was fetched of another state of the blob is not gone on with.
    state = re.sub(r"\W", "", blob.etag)  # the service's word, which is to be a part of a path
    part = path.with_name(f"{path.name}.{state[:40]}.part")
    with part.open("ab") as file:
        told(file.tell())

        def fetch(offset: int) -> bytes:
            return store.call(
                lambda there: there.download_blob(
                    name,
                    offset=offset,
                    length=min(BLOCK, blob.size - offset),
                    etag=blob.etag,
                    match_condition=MatchConditions.IfNotModified,
                    validate_content=True,
                ).readall()
            )

        def keep(data: bytes) -> None:
            file.write(data)
            file.flush()
            told(len(data))

        _in_batches(fetch, range(file.tell(), blob.size, BLOCK), keep)
    if not _is_of(blob, part):
        part.unlink()
        raise UserError(
            f"{store.what}: {name}: what came has not the size and MD5 that the service says; "
            "try again"
        )
    part.rename(path)


def _md5(path: Path) -> bytearray:
    with path.open("rb") as file:
        return bytearray(hashlib.file_digest(file, _new_md5).digest())
