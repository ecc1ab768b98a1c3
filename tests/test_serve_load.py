"""`olivepress serve` with more to do than it can, with clients that misbehave, and at its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import httpx
import pytest

from serve import connection
from tests.serving import HELLO, ask, eventually, refusal, served, slow, text_of

pytestmark = pytest.mark.usefixtures("one_thread")


def address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def test_too_many_wait(served_package: Path) -> None:
    """Those beyond the bound get 429 at once; all others are answered, in turn."""
    with slow(served_package, 0.01, slots=2, waiting=3) as (url, engine):
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: ask(url, max_tokens=30), range(12)))
        refused = [each for each in answers if each.status_code == 429]
        assert all(refusal(each, 429)["code"] == "server_busy" for each in refused)
        assert all(each.headers["retry-after"] for each in refused)
        assert 5 <= 12 - len(refused) < 12
        assert len({text_of(each) for each in answers if each.status_code == 200}) == 1
        eventually(lambda: engine.scheduler.running == 0)
        assert ask(url).status_code == 200


def test_a_client_that_goes_away_frees_its_slot(served_package: Path) -> None:
    body = HELLO | {"max_tokens": 200}
    with slow(served_package, 0.05, slots=1, waiting=4) as (url, engine):
        for streamed in (True, False):
            steps = engine.scheduler.steps
            with (
                pytest.raises(httpx.ReadTimeout),
                httpx.stream(
                    "POST",
                    f"{url}/v1/chat/completions",
                    json=body | {"stream": streamed},
                    timeout=0.5,
                ) as answer,
            ):
                for _, _ in zip(answer.iter_lines(), range(8), strict=False):
                    pass
                raise httpx.ReadTimeout("enough")
            eventually(lambda: engine.scheduler.running == 0, seconds=5)
            assert engine.scheduler.steps - steps < 100
            assert ask(url).status_code == 200
        # One that waits and goes away is never begun.
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, url, max_tokens=30)
            eventually(lambda: engine.scheduler.running == 1)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
            eventually(lambda: engine.scheduler.waiting == 0)
            assert first.result().status_code == 200


def test_one_who_reads_slowly_stops_nobody(served_package: Path) -> None:
    """A client that takes nothing from its socket: others are answered meanwhile."""
    with slow(served_package, 0.005, slots=4, waiting=4) as (url, engine):
        host, port = address(url)
        much = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 200, "n": 2}
        body = json.dumps(HELLO | much).encode()
        with socket.socket() as mute:
            mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            mute.connect((host, port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            mute.sendall(head.encode() + body)
            eventually(lambda: engine.scheduler.running == 2)
            assert ask(url, max_tokens=20).status_code == 200
            eventually(
                lambda: engine.scheduler.running == 0
            )  # it was written to its end all the same
            assert ask(url).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: local"])
def test_a_connection_without_a_whole_request_ends(served_package: Path, said: bytes) -> None:
    with (
        mock.patch.object(connection, "HEADER_SECONDS", 0.5),
        slow(served_package, 0.1) as (url, _),
        httpx.Client(base_url=url, timeout=60) as other,
        socket.create_connection(address(url)) as silent,
    ):
        silent.settimeout(10)
        silent.sendall(said)
        # Meanwhile one who asks, and waits for longer than that.
        answer = other.post("/v1/chat/completions", json=HELLO | {"max_tokens": 12})
        assert answer.status_code == 200 and answer.elapsed.total_seconds() > 0.5
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1000) == b""


@pytest.fixture
def small_buffers() -> Iterator[list[asyncio.Transport]]:
    """The server's side of a connection holds a few kilobytes; otherwise it may be megabytes.

    Yields the transports of all connections, in the order in which they were made.
    """
    begun = connection.Connection.connection_made
    made: list[asyncio.Transport] = []

    def with_small_buffer(self: connection.Connection, transport: asyncio.Transport) -> None:
        ours = transport.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made.append(transport)
        begun(self, transport)

    with mock.patch.object(connection.Connection, "connection_made", with_small_buffer):
        yield made


@pytest.mark.parametrize("times", [5, 2000])
def test_a_connection_that_is_never_read_ends(
    served_package: Path, small_buffers: list[asyncio.Transport], times: int
) -> None:
    """Also if what is left of the answer is little."""
    with (
        mock.patch.object(connection, "READ_SECONDS", 0.5),
        slow(served_package, 0.001) as (url, _),
        socket.socket() as mute,
    ):
        size = len(httpx.get(url).content)
        get(mute, url, times)
        eventually(lambda: len(small_buffers) == 2 and small_buffers[1].is_closing())
        mute.settimeout(10)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while part := mute.recv(1 << 20):
                got += len(part)
        assert got < size * times
        assert ask(url).status_code == 200


@pytest.mark.usefixtures("small_buffers")
def test_a_connection_that_is_read_slowly_goes_on(served_package: Path) -> None:
    """A page takes longer than nothing may be read, but something is read all the time."""
    with (
        mock.patch.object(connection, "READ_SECONDS", 0.75),
        slow(served_package, 0.001) as (url, _),
        socket.socket() as lazy,
    ):
        size = len(httpx.get(url).content)
        get(lazy, url, 3)
        lazy.settimeout(10)
        began, got = time.monotonic(), 0
        while got < size * 3:
            part = lazy.recv(512)
            assert part, f"ended after {got} bytes"
            got += len(part)
            time.sleep(0.05)
        assert time.monotonic() - began > 3 * 0.75


def get(client: socket.socket, url: str, times: int) -> None:
    """Ask for the page, in one go, by a client that takes little at once."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(address(url))
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * times)


def test_500_connections(served_package: Path) -> None:
    """Some that say nothing, and a request on each of the others: answered, or refused in shape."""
    with served(served_package) as (url, _):
        silent = [socket.create_connection(address(url)) for _ in range(250)]
        try:
            with ThreadPoolExecutor(250) as pool:
                answers = list(pool.map(lambda _: ask(url, max_tokens=2), range(250)))
        finally:
            for each in silent:
                each.close()
        assert {each.status_code for each in answers} <= {200, 429}
        assert (
            sum(each.status_code == 200 for each in answers) >= 72
        )  # those with a slot or a place
        assert ask(url).status_code == 200


def test_sigterm_finishes_what_is_running(served_package: Path) -> None:
    with served(served_package) as (url, process):
        expected = ask(url, max_tokens=240).text
        got: list[str] = []
        started = threading.Event()

        def read() -> None:
            body = HELLO | {"max_tokens": 240, "stream": True}
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=body, timeout=60
            ) as answer:
                for line in answer.iter_lines():
                    started.set()
                    got.append(line)

        thread = threading.Thread(target=read)
        thread.start()
        assert started.wait(30)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert "data: [DONE]" in got
        assert process.wait(timeout=30) == 0
        said = [json.loads(each[6:])["choices"][0] for each in got if each.startswith("data: {")]
        text = "".join(each["delta"].get("content", "") for each in said)
        assert text == json.loads(expected)["choices"][0]["message"]["content"]
    time.sleep(0.1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
