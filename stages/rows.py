"""JSON Lines in, checked rows out; and how a row becomes the text that a model reads."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stages.errors import UserError
from stages.reading import opened, unique_keys
from stages.tokenizer import conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

SHOWN_PROBLEMS = 10
SHOWN_COLUMNS, SHOWN_LETTERS = 20, 60
LINE_BYTES = 16 << 20  # no model reads so long a row
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One example: `line` counts from 1, as editors do."""

    line: int
    prompt: str
    response: str


def read_rows(
    path: Path, prompt_column: str = "prompt", response_column: str = "response", section: str = ""
) -> list[Row]:
    """Read a JSON Lines file: UTF-8, one object a line, both columns holding text.

    Other columns are ignored. Blank lines, CRLF and a byte order mark are tolerated.

    Args:
        section: the block of params.yaml that names the columns, if one does; errors mention it.

    Raises:
        UserError: the file is missing, a folder, or has no rows; or rows are not UTF-8, not JSON,
            not objects, lack a column, or hold there no text. The first 10 are named as file:line.
    """

    def parse(line: int, row: dict) -> Row:
        prompt = _text(row, prompt_column, section and f"{section}.prompt_column")
        response = _text(row, response_column, section and f"{section}.response_column")
        return Row(line, prompt, response)

    return _read(path, parse)


def read_prepared(path: Path) -> list[tuple[int, dict]]:
    """The (line number, row) pairs of a file that `prepare` wrote.

    Raises:
        UserError: as `read_rows`.
    """
    return _read(path, lambda line, row: (line, row))


def read_calibration(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Read texts for a quantizer: rows with `text`, or with `prompt` and `response`.

    A pair becomes the conversation that the tokenizer's chat template makes of it, or two
    paragraphs where the tokenizer has no template.

    Raises:
        UserError: as `read_rows`.
    """
    return ["".join(halves) for halves in read_halves(path, tokenizer)]


def read_halves(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The texts of `read_calibration` as what is given and what a model should go on with.

    Nothing is given for a row with `text`.
    """
    template = "chat" if tokenizer.chat_template else "{prompt}\n\n{response}"

    def parse(line: int, row: dict) -> tuple[str, str]:
        if "text" in row or not {"prompt", "response"} & row.keys():
            return "", _text(row, "text")
        return render(tokenizer, template, _text(row, "prompt"), _text(row, "response"))

    return _read(path, parse)


def unique(rows: list[Row]) -> list[Row]:
    """The rows without repeats of a (prompt, response) pair, the first of each kept.

    Rows that answer one prompt in several ways are all kept: that is common in chat data, and
    they are all on one side of the split.
    """
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        first.setdefault((row.prompt, row.response), row)
    return list(first.values())


def render(
    tokenizer: PreTrainedTokenizerBase, template: str, prompt: str, response: str
) -> tuple[str, str]:
    """The text that a model is given, and the text that it should emit, up to where it stops.

    Both are to be tokenized with `add_special_tokens=False`, since all special tokens are in them.

    Args:
        template: `chat` for the tokenizer's chat template. The response then ends with the first
            special token after it, such as <|end|>: generation stops there, so what templates put
            behind it is never seen. Or a text with {prompt} and {response}, which gets the
            tokenizer's beginning-of-sequence token, if it adds one by itself, and its end token.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not continue its own prompt,
            fails, or takes too long.
    """
    if template != "chat":
        before, _, after = template.partition("{response}")
        start = str(tokenizer.decode(tokenizer("").input_ids))
        end = str(tokenizer.eos_token)
        return start + before.replace("{prompt}", prompt), response + after + end
    if not tokenizer.chat_template:
        raise UserError(
            "the base model's tokenizer has no chat template; "
            "set prepare.template to a text with {prompt} and {response}"
        )
    user = {"role": "user", "content": prompt}
    assistant = {"role": "assistant", "content": response}
    start = conversation(tokenizer, [user], add_generation_prompt=True)
    full = conversation(tokenizer, [user, assistant])
    if not full.startswith(start):
        raise UserError(
            "the tokenizer's chat template writes a finished conversation otherwise than it starts "
            "one; set prepare.template to a text with {prompt} and {response}"
        )
    return start, _to_stop(full[len(start) :], response, tokenizer)


def _to_stop(text: str, response: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Cut `text` behind the first special token that follows `response`."""
    answer = text.find(response.strip()) + len(response.strip())
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    ends = [text.find(token, answer) + len(token) for token in special if token in text[answer:]]
    return text[: min(ends)] if ends else text + str(tokenizer.eos_token)


def _read(path: Path, parse: Callable[[int, dict], T]) -> list[T]:
    """Parse every line, or raise one UserError for all lines that cannot be."""
    rows: list[T] = []
    problems: list[str] = []
    bad = 0
    for number, offset, line in _lines(path):
        try:
            rows.append(parse(number, _object(line, offset)))
        except ValueError as error:
            bad += 1
            if bad <= SHOWN_PROBLEMS:
                problems.append(f"{path}:{number}: {error}")
    if bad > SHOWN_PROBLEMS:
        problems.append(f"{path}: and {bad - SHOWN_PROBLEMS} more rows like these")
    if problems:
        raise UserError("\n".join(problems))
    if not rows:
        raise UserError(f"{path}: no rows; expected one JSON object a line")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number, byte offset in the file, bytes) of each line that is not blank."""
    offset = 0
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
            if len(line) > LINE_BYTES:
                raise UserError(f"{path}:{number}: more than {LINE_BYTES:,} bytes in one line")
            mark = len(BOM) if number == 1 and line.startswith(BOM) else 0
            if line[mark:].strip():
                yield number, offset + mark, line[mark:]
            offset += len(line)


def _object(line: bytes, offset: int) -> dict:
    """Decode one line; ValueError says what it is instead of a JSON object."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("UTF-16; save the file as UTF-8")
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {offset + error.start} of the file") from None
    except json.JSONDecodeError as error:
        hint = "; expected one object a line" if line.lstrip().startswith(b"[") else ""
        raise ValueError(f"not JSON at column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{_kind(value)} and not an object, like {{...}}")
    return value


def _text(row: dict, column: str, setting: str = "") -> str:
    """The text in a column; ValueError says what is there instead."""
    if column not in row:
        keys = [key[:SHOWN_LETTERS] for key in islice(row, SHOWN_COLUMNS)]
        near = difflib.get_close_matches(column.lower(), [key.lower() for key in keys], 1)
        meant = [key for key in keys if [key.lower()] == near]
        hint = f", did you mean {meant[0]!r}?" if meant else f"; it has {', '.join(keys) or 'none'}"
        where = f" ({setting} in params.yaml says which to read)" if setting else ""
        raise ValueError(f"no column {column!r}{hint}{where}")
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {_kind(value)} and not text")
    if not value.strip():
        raise ValueError(f"column {column!r} is {'blank' if value else 'empty'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {column!r} holds half a character at {error.start}") from None
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
