"""A base model from the Hugging Face hub, through the hub's own cache: resumable and verified.

The client's own download (huggingface_hub 1.33) starts a file anew when it was stopped, looks at
its size only, and waits without limit for the list of files. So the content comes here, to
`blobs/DIGEST` in the cache, and `snapshots/COMMIT/NAME` is a link to it, as the client makes them;
its own would ask the hub for the digest again, and fetch what it then says. The layout is in
https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.blobs import shown
from stages.errors import UserError
from stages.fetch import WANTED, check_space, check_weights, is_wanted
from stages.reading import CONTROL, JSON_BYTES, parsed

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # it becomes a path, and is checked
TRIES = 5  # in a row that bring no new byte of a file


@dataclass(frozen=True)
class File:
    """A file of a commit.

    Args:
        size: in bytes.
        blob: its place in the cache, with its digest as name: sha256 of a large file (LFS), git's
            sha1 of any other.
    """

    name: str
    url: str
    size: int
    blob: Path

    @property
    def part(self) -> Path:
        """What there is of it so far; `hf cache prune` clears what has this name."""
        return self.blob.with_name(f"{self.blob.name}.incomplete")

    @property
    def lock(self) -> Path:
        """The client's own, so that two processes do not fetch it at the same time."""
        repo = self.blob.parents[1]
        return repo.parent / ".locks" / repo.name / f"{self.blob.name}.lock"

    def missing(self) -> int:
        """Bytes that are still to be fetched."""
        path = self.blob if self.blob.exists() else self.part
        return self.size - (path.stat().st_size if path.exists() else 0)


def download(repo: str, revision: str) -> Path:
    """Download one commit into the hub's cache, going on where an earlier try stopped.

    Returns its folder. When the hub gives nothing, what the cache has of the commit is taken.
    HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (10
    seconds each) and the login of `hf auth login` are respected.

    Raises:
        UserError: see `explain`; no usable weights in the repository; too little space; a file is
            not what the hub lists.
    """
    import httpx
    from huggingface_hub import constants

    try:
        files = wanted(repo, revision)
        check_space(Path(constants.HF_HUB_CACHE), sum(file.missing() for file in files))
        told = shown(sum(file.size for file in files))
        for file in files:
            bring(file, told)
        # Links last, so that a snapshot in the cache is a whole one.
        links = [link(file, revision) for file in files]
        return links[0].parent
    except (httpx.HTTPError, OSError, ValueError) as error:
        try:
            return cached(repo, revision)
        except OSError:
            raise UserError(explain(error, repo, revision)) from None


def wanted(repo: str, revision: str) -> list[File]:
    """The files of a commit that later stages read.

    From https://huggingface.co/docs/hub/api, asked again when the hub is busy.

    Raises:
        UserError: no usable weights, or a list without sizes and digests.
        ValueError: the answer is not the hub's.
    """
    from huggingface_hub import constants

    answer = asked(f"{constants.ENDPOINT}/api/models/{repo}/revision/{revision}")
    return listed(answer, repo, revision)


def listed(answer: bytes, repo: str, revision: str) -> list[File]:
    """The files that are wanted, of the hub's answer about a commit.

    Raises:
        UserError, ValueError: as `wanted`.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    top = {file.rfilename: file for file in siblings(answer) if "/" not in file.rfilename}
    check_weights(f"{repo} at {revision}", sorted(top))
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "blobs")
    files = []
    for name, file in sorted(top.items()):
        if is_wanted(name):
            digest = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
            if CONTROL.search(name) or "\\" in name:
                raise UserError(f"{constants.ENDPOINT}: {repo}: {name!r} is no name for a file")
            if not isinstance(file.size, int) or file.size < 0 or not DIGEST.fullmatch(str(digest)):
                raise UserError(f"{constants.ENDPOINT}: {repo}: no size or digest of {name}")
            url = hf_hub_url(repo, name, revision=revision)
            files.append(File(name, url, file.size, blobs / digest))
    return files


def asked(url: str) -> bytes:
    """The hub's answer about a repository, asked again when it is busy.

    Raises:
        ValueError: it does not end.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    stream = http_stream_backoff(
        "GET",
        f"{url}?blobs=true",
        headers=build_hf_headers(),
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
        retry_on_exceptions=(),
    )
    data = b""
    with stream as reply:
        hf_raise_for_status(reply)
        for part in reply.iter_bytes():
            data += part
            if len(data) > JSON_BYTES:
                raise ValueError(f"more than {JSON_BYTES:,} bytes about one repository")
    return data


def siblings(answer: bytes) -> list[RepoSibling]:
    """The files that the hub's answer lists; ValueError when it is not the hub's."""
    from huggingface_hub import ModelInfo

    value = parsed(answer)
    try:
        found = ModelInfo(**value).siblings or []
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not an answer of the hub: {error}") from None
    if not all(isinstance(file.rfilename, str) for file in found):
        raise ValueError("not an answer of the hub: a file without a name")
    return found


def bring(file: File, told: Callable[[int], None]) -> None:
    """Bring a file to the cache, unless it is there.

    Raises:
        UserError: what came is not what the hub lists; it is removed, so that the next try begins
            it anew.
    """
    from huggingface_hub.utils import WeakFileLock

    file.blob.parent.mkdir(parents=True, exist_ok=True)
    file.lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(file.lock):
        if file.blob.exists():
            if is_named_by_content(file.blob):
                return told(file.size)
            print(f"{file.blob}: damaged in the hub's cache; {file.name} is fetched again")
            file.blob.unlink()
        receive(file, told)
        if not is_named_by_content(file.part, file.blob.name):
            file.part.unlink()
            raise UserError(
                f"base.id: {file.url} came damaged: its digest is not the {file.blob.name} of the "
                "hub's list; it was removed, so try again"
            )
        file.part.rename(file.blob)


def link(file: File, revision: str) -> Path:
    """Put a file that is in the cache into the folder of a commit."""
    from huggingface_hub.utils import WeakFileLock

    place = file.blob.parents[1] / "snapshots" / revision / file.name
    target = Path("../../blobs", file.blob.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(file.lock):
        if not place.is_symlink() or place.readlink() != target:
            place.unlink(missing_ok=True)
            place.symlink_to(target)
    return place


def receive(file: File, told: Callable[[int], None]) -> None:
    """Fetch the rest of a file, again after each cut, while that brings something."""
    import httpx

    file.part.touch()
    told(file.part.stat().st_size)
    idle = 0
    while (have := file.part.stat().st_size) < file.size:
        try:
            append(file, have, told)
        except httpx.TransportError as error:
            now = file.part.stat().st_size
            idle = 0 if now > have else idle + 1
            if idle == TRIES:
                raise
            print(f"{file.name}: {type(error).__name__}; going on at {now:,} bytes")
            time.sleep(idle)


def append(file: File, have: int, told: Callable[[int], None]) -> None:
    """Append what follows the first `have` bytes; the client waits and asks again at 429 and 5xx.

    Not by the client's `http_get`, which hands on 10 MB at a time and so loses up to that at a cut.
    """
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    # Not compressed, so that offsets are those of the file.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
    asked = http_stream_backoff(
        "GET", file.url, headers=headers, timeout=limit, retry_on_exceptions=()
    )
    with asked as reply, file.part.open("ab") as out:
        hf_raise_for_status(reply)
        if have and reply.status_code != httpx.codes.PARTIAL_CONTENT:  # the whole file comes
            out.truncate(0)
            told(-have)
        for data in reply.iter_bytes():
            if out.tell() + len(data) > file.size:
                out.truncate(0)
                raise UserError(f"base.id: {file.url}: more than the {file.size:,} bytes listed")
            out.write(data)
            told(len(data))
    if file.part.stat().st_size <= have:
        raise httpx.RemoteProtocolError("nothing came")


def is_named_by_content(path: Path, name: str | None = None) -> bool:
    """Whether a blob has the digest that is its name, or `name`; true of names of other kinds."""
    name = name or path.name
    head = f"blob {path.stat().st_size}\0".encode()
    new = {64: hashlib.sha256, 40: lambda: hashlib.sha1(head, usedforsecurity=False)}.get(len(name))
    if not new:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, new).hexdigest() == name


def cached(repo: str, revision: str) -> Path:
    """The folder of a commit in the cache, with no request.

    Raises:
        OSError: it is not there, or not whole.
        UserError: a file is damaged; it is removed.
    """
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=["*/*"],
            local_files_only=True,
        )
    )
    for link in sorted(path for path in folder.iterdir() if path.is_symlink()):
        blob = folder / link.readlink()
        if not is_named_by_content(blob):
            link.unlink()
            blob.unlink()
            raise UserError(
                f"{link}: damaged in the hub's cache, and removed; go online to fetch it again"
            )
    return folder


def explain(error: Exception, repo: str, revision: str) -> str:
    """Say in one line why the hub did not give a repository, and what to do."""
    from huggingface_hub import constants, errors

    known: dict[type[Exception], str] = {
        errors.GatedRepoError: f"base.id: {repo} is gated: accept its licence on "
        f"{constants.ENDPOINT}/{repo}, then run `hf auth login` (or set HF_TOKEN)",
        errors.RevisionNotFoundError: f"base.revision: {repo} has no commit {revision}",
        errors.RepositoryNotFoundError: f"base.id: {repo} is not on the hub, or is private: run "
        "`hf auth login` for that",
        errors.OfflineModeIsEnabled: f"base.id: {repo} at {revision} is not in the cache, and "
        "HF_HUB_OFFLINE is set",
    }
    for kind, text in known.items():
        if isinstance(error, kind):
            return text
    if isinstance(error, errors.HfHubHTTPError):
        status, reason = error.response.status_code, error.response.reason_phrase
        login = "run `hf auth login`, or set HF_TOKEN, anew" if status == 401 else "try again later"
        return f"base.id: the hub refused {repo}: {status} {reason}; {login}"
    if isinstance(error, OSError) and error.errno:
        return f"base.id: {repo}: {error.strerror}: {error.filename}"
    return (
        f"base.id: {repo} is not in the cache and the hub cannot be reached "
        f"({type(error).__name__}); go online, or set base.source to local or builtin"
    )
