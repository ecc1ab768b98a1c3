"""Text and tokens: the model's tokenizer, its chat template, and texts that end an answer."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from serve.errors import ApiError
from stages.errors import UserError
from stages.generation import MANIFEST, prompt_template, read_config
from stages.reading import JSON_BYTES, Missing, content, json_object
from stages.template import Template

PROBE = "\N{OBJECT REPLACEMENT CHARACTER}"  # a question that no template has in it
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def too_long(context: int, has: str, param: str | None = None) -> ApiError:
    """The API's error for a prompt that the model does not take."""
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens; the prompt has {has}, "
        "and an answer needs at least one token",
        param,
        "context_length_exceeded",
    )


def _byte_of() -> dict[str, int]:
    """GPT-2's letters for bytes (`bytes_to_unicode` of its encoder.py), the other way round."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [*map(chr, shown), *(chr(256 + at) for at in range(len(hidden)))]
    return dict(zip(letters, [*shown, *hidden], strict=True))


BYTE_OF = _byte_of()


class Text:
    """What a package says of its text.

    Args:
        context: tokens that the model takes.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, context: int) -> None:
        self._context = context
        config = read_config(folder)["model"]
        eos = config.get("eos_token_id", [])
        self.stops = frozenset([eos] if isinstance(eos, int) else eos)
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_str(content(path, JSON_BYTES).decode())
        except Missing:
            raise UserError(f"{folder}: no tokenizer.json") from None
        except UserError:
            raise
        except Exception as error:  # what tokenizers raises has no class of its own
            raise UserError(f"{path}: cannot be loaded: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._longest = max(map(len, vocabulary), default=1)
        self._chat = _template(folder)
        self.taught = self._taught(folder)

    def _taught(self, folder: Path) -> str | None:
        """The text that adapters were taught to answer, where it is not the chat template's."""
        if not (folder / MANIFEST).exists():
            return None
        taught = prompt_template(folder)
        if self._chat is None:
            return taught
        probe = [{"role": "user", "content": PROBE}]
        try:
            asked = self._chat.render(probe, add_generation_prompt=True)
        except ValueError as error:
            raise UserError(f"{folder}: its chat template refuses a question: {error}") from None
        return None if asked == taught.replace("{prompt}", PROBE) else taught

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids.

        Args:
            special: let the tokenizer add what it puts around a text, such as a first token.

        Raises:
            ApiError: it has more tokens than the model takes, whatever they are; or it is no text.
        """
        if len(text) > self._longest * self._context:  # the tokenizer would stop all others
            raise too_long(self._context, f"{len(text)} characters")
        try:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        except (UnicodeEncodeError, TypeError):
            raise ApiError(400, "the text has half a character in it (a lone surrogate)") from None

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a conversation, up to where the answer begins.

        Raises:
            ApiError: the model has no chat template, or it refuses these messages.
        """
        if self._chat is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
        try:
            return self._chat.render(messages, add_generation_prompt=True)
        except ValueError as error:
            why = f"the model's chat template refuses these messages: {error}"
            raise ApiError(400, why[:500], "messages") from None

    def conversation(self, messages: Sequence[dict[str, str]], adapted: bool) -> str:
        """As `chat`; but one question to an adapter is put into the text it was taught with."""
        if adapted and self.taught and [each["role"] for each in messages] == ["user"]:
            return self.taught.replace("{prompt}", messages[0]["content"])
        return self.chat(messages)

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019
    def token(self, number: int) -> tuple[str, bytes]:
        """The text of one token, and its bytes, which may be a part of a character."""
        text = self._tokenizer.decode([number], skip_special_tokens=False)
        piece = self._tokenizer.id_to_token(number) or ""
        if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # byte fallback
            return text, bytes([int(found[1], 16)])
        if "\ufffd" in text and all(letter in BYTE_OF for letter in piece):
            return text, bytes(BYTE_OF[letter] for letter in piece)
        return text, text.encode("utf-8", "replace")

    def writer(self, stops: Sequence[str]) -> Writer:
        return Writer(self._tokenizer, stops)


class Writer:
    """The text of an answer, token by token.

    What may be the beginning of a stop text is kept back until it is known.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._kept = ""
        self.stopped = False
        """Whether a stop text has come; nothing after it is given out."""

    def add(self, token: int) -> str:
        """What can be given out now that `token` has come."""
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # bytes that are no text, of a tokenizer that has a token for each
            self._stream = DecodeStream(skip_special_tokens=True)
            text = self._stream.step(self._tokenizer, token)
        return self._given(text or "")

    def _given(self, text: str) -> str:
        if not self._stops:
            return text
        text = self._kept + text
        if found := [at for at in map(text.find, self._stops) if at >= 0]:
            self.stopped, self._kept = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._kept = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was kept back, when no token follows."""
        kept, self._kept = self._kept, ""
        return kept


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _template(folder: Path) -> Template | None:
    """The chat template if there is one."""
    try:
        settings = json_object(folder / "tokenizer_config.json")
    except Missing:
        settings = {}
    special = {name: _name(settings[name]) for name in SPECIAL if settings.get(name)}
    source = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        source = content(folder / "chat_template.jinja", JSON_BYTES).decode("utf-8", "replace")
    return Template(source, special) if isinstance(source, str) else None


def _name(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token
