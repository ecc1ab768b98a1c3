"""Ends every connection to elsewhere, in any Python that finds this on its path, and notes it.

Python imports a module of this name when it starts. It sees what goes through Python's sockets;
`test_leaks.py` looks at what native code does with strace.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

NOTES = "OLIVEPRESS_CONNECTIONS"  # environment variable: the file that they are noted in
# Where Azure's client asks for a login when nobody is signed in, as tests have it do: ended too,
# and no failure. Clouds answer at it; it is of the machine's own network.
METADATA = "169.254.169.254"
CONNECTS = {"socket.connect", "socket.connect_ex", "socket.sendto", "socket.sendmsg"}
LOOKS_UP = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


def is_here(host: object) -> bool:
    """Whether a host is this machine, without asking anybody."""
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    name = name.partition("%")[0].removeprefix("::ffff:")
    here = ("", "localhost", "::", "::1", "0.0.0.0", os.uname().nodename)
    return name.startswith("127.") or name in here


def watch(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook: https://docs.python.org/3.11/library/audit_events.html has the events."""
    if event in CONNECTS:
        host = args[1][0] if isinstance(args[1], tuple) else None  # a path is of this machine
    elif event in LOOKS_UP:
        host = args[0]
    else:
        return
    if is_here(host):
        return
    if host != METADATA:
        with open(os.environ[NOTES], "a") as notes:
            notes.write(f"{event} {host} of {' '.join(sys.argv)[:200]}\n")
    raise OSError(errno.ENETUNREACH, f"{event} {host}: tests connect to this machine alone")


if NOTES in os.environ:
    sys.addaudithook(watch)
