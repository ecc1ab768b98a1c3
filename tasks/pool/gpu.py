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
    """The name of this machine's concurrency limit in Prefect."""
    return f"olivepress-gpu-{re.sub(r'[^A-Za-z0-9-]', '-', platform.node())}"


def announce() -> None:
    """Tell the server how many stages may use a GPU here at once: one for each."""
    if there := count():
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name(limit_name(), there)


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
