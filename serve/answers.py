"""Answers in the form of OpenAI's API, whole or as they come.

https://platform.openai.com/docs/api-reference/chat/object, …/chat/streaming, …/completions/object
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from serve.errors import ApiError
from serve.scheduler import Piece
from serve.text import Text

DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """What is common to all parts of the answers to one request."""

    model: str
    chat: bool
    text: Text
    prompt_tokens: int
    choices: int
    logprobs: bool = False
    usage_at_end: bool = False
    """Whether a stream tells the tokens used."""
    made: list[int] = field(default_factory=list)
    """Tokens of each answer so far."""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.made = [0] * self.choices
        self._said = [0] * self.choices

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def usage(self) -> dict[str, int]:
        completion = sum(self.made)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    async def whole(self, pieces: AsyncIterable[Piece]) -> dict[str, Any]:
        """The answers in one object."""
        texts = [""] * self.choices
        finish = ["stop"] * self.choices
        chosen: list[list[Piece]] = [[] for _ in texts]
        async for piece in pieces:
            self.count(piece)
            texts[piece.index] += piece.text
            if self.logprobs:
                chosen[piece.index].append(piece)
            finish[piece.index] = piece.finish or finish[piece.index]
        choices = []
        for index, text in enumerate(texts):
            choice: dict[str, Any] = {"index": index, "logprobs": None}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            if self.logprobs:
                choice["logprobs"] = self.told(chosen[index])
            choices.append(choice | {"finish_reason": finish[index]})
        name = "chat.completion" if self.chat else "text_completion"
        return self._object(name, choices) | {"usage": self.usage()}

    def count(self, piece: Piece) -> None:
        """Count a piece's token; say what went wrong, if something did."""
        if piece.error:
            raise ApiError(500, piece.error)
        if piece.choice:
            self.made[piece.index] += 1

    async def stream(self, pieces: AsyncIterable[Piece]) -> AsyncIterator[bytes]:
        """The answers as server-sent events."""
        if self.chat:
            for index in range(self.choices):
                yield self._event(index, {"role": "assistant", "content": ""}, None)
        try:
            async for piece in pieces:
                self.count(piece)
                if piece.text or (self.logprobs and piece.choice):
                    told = self.told([piece]) if self.logprobs else None
                    yield self._event(piece.index, {"content": piece.text}, None, told)
                if piece.finish:
                    yield self._event(piece.index, {}, piece.finish)
        except ApiError as error:  # too late for a status
            yield event(error.body())
            return
        if self.usage_at_end:
            yield event(self._object(self._chunk, []) | {"usage": self.usage()})
        yield DONE

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _event(
        self, index: int, delta: dict[str, str], finish: str | None, logprobs: Any = None
    ) -> bytes:
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        body = self._object(self._chunk, [choice])
        return event(body | {"usage": None} if self.usage_at_end else body)

    def told(self, pieces: list[Piece]) -> dict[str, Any]:
        """How likely each token was; the two APIs have each its own form for it."""
        chosen = [piece.choice for piece in pieces if piece.choice]
        if self.chat:
            return {
                "content": [
                    self._token(one.token, one.logprob)
                    | {"top_logprobs": [self._token(*each) for each in one.top]}
                    for one in chosen
                ],
                "refusal": None,
            }
        offsets = []
        for piece in pieces:
            if piece.choice:
                offsets.append(self._said[piece.index])
                self._said[piece.index] += len(self.text.token(piece.choice.token)[0])
        return {
            "tokens": [self.text.token(one.token)[0] for one in chosen],
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": [
                {self.text.token(t)[0]: p for t, p in (*one.top, (one.token, one.logprob))}
                for one in chosen
            ],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self.text.token(token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode() + b"\n\n"
