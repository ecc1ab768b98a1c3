"""A package that is loaded: its models by name, and answers to requests for them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np

from serve import Settings
from serve.adapters import BASE, Adapter, Shelf
from serve.batch import Batch
from serve.errors import ApiError
from serve.requests import Sampling
from serve.sampling import Sampler
from serve.scheduler import Busy, Piece, Scheduler, Stopping
from serve.scheduler import Sequence as Wanted
from serve.text import Text, too_long
from stages.errors import UserError
from stages.generation import CannotRunHere, adapters_of, provider, read_config
from stages.reading import Missing, json_object


class Engine:
    """One base model with its adapters.

    Raises:
        UserError: the package cannot be served.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        if (name := provider(folder)) != "cpu":
            raise CannotRunHere(f"{folder} is for {name}; olivepress serve runs models for the cpu")
        adapters_of(folder)  # says what is wrong with a name at once
        self.folder, self.settings = folder, settings
        self.context = min(settings.context, context_length(folder))
        self.text = Text(folder, self.context)
        self.batch = Batch(folder, settings.slots, self.context)
        self.adapters = Shelf(folder, self.batch.parameters, settings.adapters)
        self.scheduler = Scheduler(self.batch, settings.waiting)
        self.created = int(time.time())

    def models(self) -> list[str]:
        return [BASE, *self.adapters.paths()]

    async def adapter(self, model: str) -> Adapter | None:
        """The adapter that a model's name means, read if it is not in memory.

        Raises:
            ApiError: no such model, or its file cannot be read.
        """
        if model == BASE:
            return None
        try:
            return await asyncio.to_thread(self.adapters.get, model)
        except KeyError:
            known = ", ".join(self.models())
            message = f"The model {model[:80]!r} does not exist; there are {known}"
            raise ApiError(404, message, "model", "model_not_found") from None
        except UserError as error:
            raise ApiError(500, str(error), "model") from None

    def check(self, prompt: Sequence[int], asked: int | None, param: str) -> int:
        """Tokens that an answer to a prompt may have.

        Raises:
            ApiError: there is no room for one.
        """
        if not prompt:
            raise ApiError(400, f"{param}: is empty", param)
        if len(prompt) >= self.context:
            raise too_long(self.context, f"{len(prompt)}", param)
        room = self.context - len(prompt)
        return room if asked is None else min(asked, room)

    def bias(self, request: Sampling) -> tuple[np.ndarray, np.ndarray]:
        """`logit_bias` as tokens and values."""
        for key in request.logit_bias:
            if not (key.isascii() and key.isdigit() and int(key) < self.batch.vocabulary):
                raise ApiError(400, f"logit_bias: {key!r} is no token", "logit_bias")
        tokens = np.array([int(key) for key in request.logit_bias], np.int64)
        return tokens, np.array([*request.logit_bias.values()], np.float32)

    def begin(
        self,
        request: Sampling,
        prompts: Sequence[list[int]],
        adapter: Adapter | None,
        most: Sequence[int],
        told: int | None,
    ) -> Ongoing:
        """Have `request.n` answers to each prompt written.

        Raises:
            ApiError: too many wait, or the server ends.
        """
        count = request.n * len(prompts)
        if count > self.settings.slots + self.settings.waiting:
            raise ApiError(400, f"n: {count} answers are more than may wait", "n")
        ongoing, bias = Ongoing(self.scheduler), self.bias(request)
        for at, (prompt, tokens) in enumerate(zip(prompts, most, strict=True)):
            for number in range(request.n):
                index = at * request.n + number
                writer = self.text.writer(request.stops)
                sampler = Sampler(
                    request.temperature, request.top_p, request.presence_penalty,
                    request.frequency_penalty, bias, request.seed, index, told,
                )  # fmt: skip
                ongoing.wanted.append(
                    Wanted(
                        index, prompt, adapter, sampler, writer, self.text.stops, tokens,
                        ongoing.tell,
                    )
                )  # fmt: skip
        try:
            self.scheduler.submit(ongoing.wanted)
        except Busy:
            message = "As many requests wait as may; try again"
            raise ApiError(429, message, code="server_busy", headers={"Retry-After": "1"}) from None
        except Stopping:
            raise ApiError(503, "The server is stopping", code="server_stopping") from None
        return ongoing


class Ongoing:
    """The answers to one request, piece by piece as they come."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.wanted: list[Wanted] = []
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[list[Piece]]()

    def tell(self, pieces: list[Piece]) -> None:
        """Take pieces from the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there
            self._loop.call_soon_threadsafe(self._queue.put_nowait, pieces)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        left = len(self.wanted)
        while left:
            for piece in await self._queue.get():
                left -= piece.finish is not None
                yield piece

    def close(self) -> None:
        """Free the slots of what nobody will read."""
        self._scheduler.cancel(self.wanted)


def context_length(folder: Path) -> int:
    """Tokens that a model takes without another scaling of its positions.

    One with LongRoPE (Ding et al. 2024) has two, for sequences below and above the length that it
    was trained with; rows of one batch share one.
    """
    length = int(read_config(folder)["model"]["context_length"])
    try:
        config = json_object(folder / "config.json")
    except Missing:
        return length
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original = config.get("original_max_position_embeddings")
    if isinstance(scaling, dict):
        original = scaling.get("original_max_position_embeddings") or original
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind == "longrope" and isinstance(original, int) and original > 0:
            return min(length, original)
    return length
