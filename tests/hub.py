"""A Hugging Face hub on loopback: models only, a log of every request, faults on demand.

It answers as huggingface.co does to huggingface_hub 1.33 (`file_download.py`, `utils/_http.py`):
the list of files with digests, `resolve` that sends large files to signed addresses of a second
host and announces Xet, byte ranges, tokens, and the errors with their X-Error-Code. On sockets and
not on a framework, so that an answer can be cut at an exact byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from huggingface_hub.utils.sha import git_hash

BLOCK = 1 << 16


@dataclass
class Asked:
    """A request, and what became of it; `sent` counts bytes of the body."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


@dataclass
class Refusal:
    """Answers of `status` to the next `times` requests whose line has `part`."""

    part: str
    status: int
    headers: dict[str, str]
    times: int


@dataclass
class Repository:
    """Files by commit; `gated` ones are listed for all and given to `token` only."""

    commits: dict[str, dict[str, bytes]]
    main: str
    gated: bool = False
    token: str | None = None


@dataclass
class LocalHub:
    """What the hub has, what it was asked, and how it fails.

    Args:
        known: tokens of users.
        cut: name -> bytes after which the connection is closed, once.
        hold: name -> bytes after which nothing comes until `released`, once.
        damaged: names of files that come with one byte changed.
        sizes: name -> size in the list, where that is not the true one.
        silent: no request is answered.
        swapped: name -> content that the hub tells of to HEAD, and sends from then on.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    hold: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    silent: bool = False
    swapped: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    cdn: str = ""

    def gets(self, name: str) -> list[Asked]:
        """Requests for the content of a file that sent some of it, or tried to."""
        ends = re.compile(rf"[/=]{re.escape(name)}$")
        return [
            asked
            for asked in self.asked
            if asked.method == "GET" and ends.search(asked.path) and asked.status in (200, 206)
        ]

    def fetched(self) -> set[str]:
        """Names of the files of which content was sent."""
        paths = [asked.path for asked in self.asked if asked.method == "GET" and asked.sent]
        return {re.split("[/=]", path)[-1] for path in paths if "/api/models/" not in path}


def is_large(name: str, content: bytes) -> bool:
    """As the hub's .gitattributes says for weights and such, and its limit for the rest."""
    return name.endswith((".safetensors", ".bin", ".onnx", ".pth")) or len(content) > 10_000_000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub  # set by `serve`

    def do_HEAD(self) -> None:
        self.handle_request()

    def do_GET(self) -> None:
        self.handle_request()

    def handle_request(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.log = Asked(self.command, self.path, self.headers.get("Range"), token)
        self.hub.asked.append(self.log)
        if self.hub.silent:
            self.hub.released.wait()
            self.close_connection = True
            return
        for refusal in self.hub.refusals:
            if refusal.times and refusal.part in f"{self.command} {self.path}":
                refusal.times -= 1
                return self.answer(refusal.status, b"busy", refusal.headers)
        self.route(urlsplit(self.path).path.strip("/").split("/"))

    def route(self, parts: list[str]) -> None:  # noqa: PLR0911
        host = (self.headers.get("Host") or "").partition(":")[0]
        if host == "localhost":
            return self.send_from_cdn(*parts[1:])
        if self.log.token and self.log.token not in self.hub.known:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        cached = parts[:3] == ["api", "resolve-cache", "models"]
        listing = parts[:2] == ["api", "models"]
        parts = parts[3:] if cached else parts[2:] if listing else parts
        name, repository = "/".join(parts[:2]), self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            if self.log.token is None:  # a stranger is not told what is missing and what private
                return self.refuse(401, "RepoNotFound", "Invalid username or password.")
            return self.refuse(404, "RepoNotFound", "Repository not found")
        revision = parts[2] if cached else parts[3]
        commit = repository.main if revision == "main" else revision
        files = repository.commits.get(commit)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if listing:
            return self.list_files(name, commit, files, repository)
        if repository.gated and self.log.token != repository.token:
            status = 403 if self.log.token else 401
            return self.refuse(status, "GatedRepo", f"Access to model {name} is restricted.")
        self.resolve(name, commit, "/".join(parts[3 if cached else 4 :]), files, cached)

    def list_files(
        self, name: str, commit: str, files: dict[str, bytes], repository: Repository
    ) -> None:
        if "blobs=true" not in self.path:
            siblings: list[dict] = [{"rfilename": file} for file in files]
        else:
            siblings = [self.described(file, content) for file, content in files.items()]
        said = {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings}
        said["gated"] = "manual" if repository.gated else False
        self.answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def described(self, file: str, content: bytes) -> dict:
        size = self.hub.sizes.get(file, len(content))
        if not is_large(file, content):
            return {"rfilename": file, "size": size, "blobId": git_hash(content)}
        lfs = {"sha256": sha256(content), "size": size, "pointerSize": 134}
        return {"rfilename": file, "size": size, "blobId": git_hash(content[:134]), "lfs": lfs}

    def resolve(
        self, name: str, commit: str, file: str, files: dict[str, bytes], cached: bool
    ) -> None:
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = self.content_of(file, files)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_large(file, content):
            headers |= {
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{sha256(content)}"',
                "ETag": f'"{git_hash(content[:134])}"',
                "X-Xet-Hash": sha256(content)[::-1],
                "Link": f"<{self.hub.url}/api/models/{name}/xet-read-token/{commit}>; "
                'rel="xet-auth"',
                "Location": f"{self.hub.cdn}/cdn/{name}/{commit}?Signature=s3cr3t&name={file}",
            }
            return self.answer(302, b"Found", headers)
        headers["ETag"] = f'"{git_hash(content)}"'
        if not cached:
            headers["Location"] = f"/api/resolve-cache/models/{name}/{commit}/{file}"
            return self.answer(307, b"Temporary Redirect", headers)
        self.send_file(file, content, headers)

    def send_from_cdn(self, owner: str, name: str, commit: str) -> None:
        if self.log.token:  # two ways of signing at once are refused by the store behind it
            return self.answer(400, b"InvalidArgument", {})
        file = self.path.rpartition("name=")[2]
        content = self.content_of(file, self.hub.repositories[f"{owner}/{name}"].commits[commit])
        self.send_file(file, content, {"ETag": f'"{sha256(content)[:32]}"'})

    def content_of(self, file: str, files: dict[str, bytes]) -> bytes:
        head = any(asked.method == "HEAD" and file in asked.path for asked in self.hub.asked)
        return self.hub.swapped.get(file, files[file]) if head else files[file]

    def send_file(self, file: str, content: bytes, headers: dict[str, str]) -> None:
        if file in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        status, start = 200, 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.log.range or ""):
            status, start = 206, int(asked[1])
            if start >= len(content):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.answer(status, content[start:], headers, file)

    def refuse(
        self, status: int, code: str | None, message: str, more: dict[str, str] | None = None
    ) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, json.dumps({"error": message}).encode(), headers | (more or {}))

    def answer(
        self, status: int, content: bytes, headers: dict[str, str], file: str | None = None
    ) -> None:
        self.log.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut.pop(file, None) if file else None
        hold = self.hub.hold.pop(file, None) if file else None
        stop = next((stop for stop in (cut, hold) if stop is not None), len(content))
        try:
            self.send_body(content[:stop])
            if hold is not None:
                self.hub.released.wait()
            if stop < len(content):
                self.close_connection = True
        except OSError:  # the client has gone
            self.close_connection = True

    def send_body(self, content: bytes) -> None:
        for start in range(0, len(content), BLOCK):
            self.wfile.write(block := content[start : start + BLOCK])
            self.log.sent += len(block)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(hub: LocalHub) -> Iterator[LocalHub]:
    """Run a hub at hub.url; the host of large files is hub.cdn, another name of the same server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}"
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
