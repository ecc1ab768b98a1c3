"""`python -m tests.emulator --home DIR`: Azure on loopback until it is told to stop.

When all of it is ready it writes DIR/env.sh and DIR/env.json, what a client's environment needs.
DIR/pid is its process id, and DIR/calls.jsonl has a line for each call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import shutil
import signal
import ssl
from contextlib import suppress
from pathlib import Path

from . import certificates
from .azurite import Azurite
from .cloud import Cloud
from .tunnel import Http, Tunnel
from .world import HOSTS, World

BLOBS = "blobs"
READY = ("env.sh", "env.json")
PARENT_SECONDS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="a folder of its own")
    parser.add_argument("--with-parent", action="store_true", help="end when the parent ends")
    given = parser.parse_args()
    home = given.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    for name in (*READY, "calls.jsonl"):
        (home / name).unlink(missing_ok=True)
    (home / "pid").write_text(str(os.getpid()))
    shutil.rmtree(home / BLOBS, ignore_errors=True)
    world = World(home)
    ca, cert, key = certificates.make(home, HOSTS)
    with Azurite(home / BLOBS, cert, key, world.account, world.account_key) as azurite:
        asyncio.run(serve(world, azurite, (ca, cert, key), given.with_parent))
    for name in (*READY, "pid"):
        (home / name).unlink(missing_ok=True)


async def serve(
    world: World, azurite: Azurite, files: tuple[Path, Path, Path], with_parent: bool
) -> None:
    """Listen, say where in env.json, and wait for a signal or for the parent's end."""
    ca, cert, key = files
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    cloud = Cloud(world, f"https://127.0.0.1:{azurite.port}", ca)
    await cloud.reset()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    proxy = await loop.create_server(lambda: Tunnel(cloud.gate, HOSTS, context), "127.0.0.1", 0)
    control = await loop.create_server(lambda: Http(cloud.control), "127.0.0.1", 0)
    env = world.env(_address(proxy), ca)
    cloud.env.update(env)
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in env.items()]
    _publish(world.home / "env.sh", "".join(lines))
    known = {"env": env, "control": _address(control), **world.public()}
    _publish(world.home / "env.json", json.dumps(known, indent=1))
    parent = os.getppid()
    while not stop.is_set() and (not with_parent or os.getppid() == parent):
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), PARENT_SECONDS)
    for server in (proxy, control):
        server.close()
    await cloud.close()


def _address(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def _publish(path: Path, text: str) -> None:
    """Write it whole, for this user only: it has the client's secret."""
    part = path.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_text(text)
    part.rename(path)


if __name__ == "__main__":
    main()
