"""Who is answered when: one thread that reads prompts and adds a token to every answer in turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serve.adapters import Adapter
from serve.batch import CHUNK, Row
from serve.sampling import Choice, Sampler
from serve.text import Writer


class Model(Protocol):
    """What computes: see `serve.batch.Batch`."""

    slots: int

    def read(
        self, slot: int, ids: list[int], start: int, adapter: Adapter | None
    ) -> np.ndarray: ...
    def step(self, rows: list[Row], reading: dict[int, int]) -> np.ndarray: ...
    def move(self, slot: int, to: int, length: int) -> None: ...
    def free(self, slot: int) -> None: ...


@dataclass
class Piece:
    """What a token added to an answer."""

    index: int
    """Of the answer in its request."""
    text: str
    choice: Choice | None
    """None for an end without a token that counts."""
    finish: str | None = None
    """stop or length; the last piece has it."""
    error: str | None = None


@dataclass(eq=False)
class Sequence:
    """One answer that is wanted."""

    index: int
    prompt: list[int]
    adapter: Adapter | None
    sampler: Sampler
    writer: Writer
    stops: frozenset[int]
    """Tokens that end it."""
    most: int
    """Tokens that it may have."""
    tell: Callable[[list[Piece]], None]
    """Called in the scheduler's thread; it must not block."""
    slot: int = -1
    read: int = 0
    """Tokens of the prompt that the cache has."""
    made: int = 0
    token: int = 0
    cancelled: bool = False

    @property
    def cached(self) -> int:
        """Tokens that the cache has: the last one that was made comes with the next step."""
        return self.read + max(self.made - 1, 0)


class Busy(Exception):
    """As many wait as may."""


class Stopping(Exception):
    """The server ends and takes no more."""


class Scheduler:
    """Runs sequences on a model, first come first served, at most `model.slots` at once.

    Args:
        waiting: sequences that may wait for a slot.
    """

    def __init__(self, model: Model, waiting: int) -> None:
        self.model, self.most_waiting = model, waiting
        self.steps = 0
        """Calls of the model that added tokens."""
        self._waiting: deque[Sequence] = deque()
        self._reading: deque[Sequence] = deque()
        self._writing: list[Sequence] = []
        self._free = list(range(model.slots))
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return self.model.slots - len(self._free)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, sequences: list[Sequence]) -> None:
        """Take all sequences of a request, or none.

        Raises:
            Busy, Stopping.
        """
        with self._changed:
            if self._stopping or not self.alive:
                raise Stopping
            if len(self._waiting) + len(sequences) > self.most_waiting + len(self._free):
                raise Busy
            self._waiting.extend(sequences)
            self._changed.notify()

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Nobody wants these any more: their slots are free at the next step."""
        with self._changed:
            for each in sequences:
                each.cancelled = True  # nothing to one that has ended
            self._waiting = deque(each for each in self._waiting if not each.cancelled)
            self._changed.notify()

    def stop(self) -> None:
        """Take no more, drop what runs, and wait for the thread to end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._reading or self._writing):
                    self._changed.wait()
                if self._stopping:
                    return
                self._admit()
            self._read()
            self._step()

    def _admit(self) -> None:
        """Give free slots to those who wait; the lowest, so that rows lie close together."""
        for each in [each for each in (*self._reading, *self._writing) if each.cancelled]:
            self._leave(each)
        self._free.sort()
        while self._waiting and self._free:
            one = self._waiting.popleft()
            one.slot = self._free.pop(0)
            self._reading.append(one)
        self._close_up()

    def _close_up(self) -> None:
        """Have no more idle rows below the last than others: each costs a step as much as another.

        A move copies the sequence's cache, which takes as long as a few steps.
        """
        there = sorted((*self._reading, *self._writing), key=lambda each: each.slot)
        while there and there[-1].slot + 1 > 2 * len(there):
            one = there.pop()
            to = self._free.pop(0)
            self.model.move(one.slot, to, one.cached)
            self._free.append(one.slot)
            one.slot = to
            there.insert(0, one)

    def _read(self) -> None:
        """Read prompts, `CHUNK` tokens in all, so that those who are being answered go on."""
        left = CHUNK
        while self._reading and left > 0:
            one = self._reading[0]
            ids = one.prompt[one.read : one.read + left]
            try:
                logits = self.model.read(one.slot, ids, one.read, one.adapter)
            except Exception as error:
                self._fail([one], error)
                continue
            one.read += len(ids)
            left -= len(ids)
            if one.read == len(one.prompt):
                self._reading.popleft()
                self._writing.append(one)
                self._choose([one], logits[None])

    def _step(self) -> None:
        writing = list(self._writing)
        if not writing:
            return
        rows = [Row(each.slot, each.token, each.cached, each.adapter) for each in writing]
        try:
            logits = self.model.step(rows, {each.slot: each.read for each in self._reading})
        except Exception as error:
            self._fail(writing, error)
            return
        self.steps += 1
        self._choose(writing, logits)

    def _choose(self, sequences: list[Sequence], logits: np.ndarray) -> None:
        """Add a token to each, and tell those who wait for it."""
        told: dict[Callable, list[Piece]] = {}
        for one, scores in zip(sequences, logits, strict=True):
            try:
                piece = self._next(one, scores)
            except Exception as error:
                self._fail([one], error)
                continue
            told.setdefault(one.tell, []).append(piece)
            if piece.finish:
                self._leave(one)
        for tell, pieces in told.items():
            tell(pieces)

    def _next(self, one: Sequence, scores: np.ndarray) -> Piece:
        choice = one.sampler.choose(scores)
        if choice.token in one.stops:
            return Piece(one.index, one.writer.rest(), None, "stop")
        one.token = choice.token
        one.made += 1
        text = one.writer.add(choice.token)
        if one.writer.stopped:
            return Piece(one.index, text, choice, "stop")
        if one.made >= one.most:
            return Piece(one.index, text + one.writer.rest(), choice, "length")
        return Piece(one.index, text, choice)

    def _leave(self, one: Sequence) -> None:
        if one in self._writing:
            self._writing.remove(one)
        if one in self._reading:
            self._reading.remove(one)
        self.model.free(one.slot)
        with self._changed:
            self._free.append(one.slot)

    def _fail(self, sequences: list[Sequence], error: Exception) -> None:
        """Something that should not happen in the model ends those that it happened to."""
        for one in sequences:
            self._leave(one)
            one.tell([Piece(one.index, "", None, "error", f"the model failed: {error}"[:500])])
