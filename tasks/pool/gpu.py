"""Whose turn it is on this machine's GPU."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

STAGES = {"fetch", "quantize", "measure", "finetune", "evaluate"}  # that use one if it is there
DEVICES = Path("/dev")


def count() -> int:
    """NVIDIA GPUs that this process may use, without asking CUDA, which takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in DEVICES.iterdir())
    if visible is None:
        return there
    return min(there, len([one for one in visible.split(",") if one.strip() not in ("", "-1")]))


def limit_name() -> str:
    """The name in Prefect of the limit on what this process may use of this machine's GPUs.

    Workers that are given GPUs of their own by CUDA_VISIBLE_DEVICES have limits of their own.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return "-".join(re.findall(r"[A-Za-z0-9]+", f"olivepress gpu {platform.node()} {visible}"))


def announce() -> None:
    """Tell the server that one stage at a time may use the GPU here."""
    if count():
        from tasks.pool.claims import patiently

        patiently(lambda client: client.upsert_global_concurrency_limit_by_name(limit_name(), 1))


def turn(stage: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What a stage's command is run in: a turn on this machine's GPU, if it has one and wants it.

    A turn is for as long as the command runs: a stage that is restored takes none.
    """
    if stage.partition("@")[0] not in STAGES or not count():
        return contextlib.nullcontext
    return _turn


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    from prefect.concurrency.sync import concurrency

    # A lease that cannot be renewed, as the server is away, is no reason to stop hours of work.
    with concurrency(limit_name(), raise_on_lease_renewal_failure=False):
        yield
