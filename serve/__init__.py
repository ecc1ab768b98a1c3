"""A package behind an HTTP API: one loaded base, its adapters as models by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Settings:
    """What `olivepress serve` takes."""

    slots: int = 8
    """Answers that are written at once."""
    waiting: int = 64
    """Answers that may wait for a slot; a request beyond them gets status 429."""
    context: int = 4096
    """Tokens of prompt and answer together, if the model takes as many."""
    adapters: int = 64
    """Adapters that stay in memory."""
