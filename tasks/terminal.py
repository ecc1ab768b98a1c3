"""What a person sees during a run: a line for each stage, and live progress on a terminal."""

from __future__ import annotations

import threading

from rich.console import Console, RenderableType
from rich.status import Status

STYLES = {
    **{"Completed": "green", "Cached": "cyan", "Failed": "bold red", "Skipped": "yellow"},
    **{"met": "green", "over a limit": "yellow", "failed": "bold red"},  # of candidates
}


class Terminal:
    """One line a stage when it ends; below, on a terminal only, what is running and how far."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.quiet = False
        self._running: dict[str, str] = {}
        self._status: Status | None = None
        self._lock = threading.Lock()

    def started(self, stage: str) -> None:
        with self._lock:
            self._running[stage] = ""
            self._refresh()

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        with self._lock:
            self._running[stage] = f" {100 * done // max(total, 1)}% {note}".rstrip()
            self._refresh()

    def done(self, stage: str) -> None:
        """Take down what is shown of it."""
        with self._lock:
            self._running.pop(stage, None)
            self._refresh()

    def ended(self, stage: str, state: str, reason: str, seconds: float) -> None:
        """Print the stage's one line."""
        self.done(stage)
        with self._lock:
            if not self.quiet:
                style = STYLES.get(state, "")
                first = reason.splitlines()[0] if reason else ""
                self.console.print(
                    f"[{style}]{state:<9}[/] {stage:<20} {seconds:7.1f} s  ", end="", style=None
                )
                self.console.print(first, markup=False, style="dim")

    def note(self, text: str) -> None:
        """Print a line that is about no stage's end."""
        with self._lock:
            if not self.quiet:
                self.console.print(text, markup=False, style="dim")

    def show(self, table: RenderableType) -> None:
        """Print a table, after an empty line."""
        with self._lock:
            if not self.quiet:
                self.console.print()
                self.console.print(table)

    def _refresh(self) -> None:
        if self.quiet or not self.console.is_terminal:
            return
        text = " · ".join(name + how for name, how in self._running.items())
        if not text and self._status:
            self._status.stop()
            self._status = None
        elif text and self._status:
            self._status.update(text)
        elif text:
            self._status = self.console.status(text)
            self._status.start()


terminal = Terminal()
