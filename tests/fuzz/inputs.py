"""Bytes and values near enough to good ones to get past the first check of a reader."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

NASTY = [
    *("", " ", "\x00", "\n", "\r\n", "\ufeff", "\u2028", "\x1b[2J\x1b]0;x\x07", "\ud800", "\u202e"),
    *(
        "..",
        "../..",
        "/etc/passwd",
        "C:\\x",
        "a/../../b",
        "-rf",
        "--help",
        ".git",
        "con",
        "a" * 5000,
    ),
    *("$(touch canary)", "`touch canary`", "; touch canary #", "| touch canary", "${adapters}"),
    *("{prompt}", "{0}", "{prompt.__class__}", "{prompt!r:>9999999999}", "%s%n", "{{7*7}}", "{%"),
    *("https://localhost/x", "file:///etc/passwd", "remote://x/y", "null", "NaN", "1e999", "0x_"),
    *(
        "!!python/object/apply:os.system [id]",
        "*a",
        "&a",
        "<<",
        "2001-99-99",
        "~",
        "=",
        "__proto__",
    ),
]
NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, 1e308, -0.0, 5e-324]
BITS = [
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\n\n", b"\\ud800", b"\\"),
    *(b"{", b"}", b"[" * 300, b"]", b'"', b",", b":", b"NaN", b"-Infinity", b"1e999", b"9" * 5000),
    *(b"\x1b[2J", b"!!bool x", b"!!int ''", b"0x_", b"2001-99-99", b"<<: *a", b"&a ", b"*a"),
    *(b"\x80\x04K.", b"PK\x03\x04", struct.pack("<Q", 2**60), b'"a": 1, "a": 2', b"? ", b"- "),
]

texts: SearchStrategy[str] = st.sampled_from(NASTY) | st.text(max_size=20)
# Of text that can be written as UTF-8, with what terminals and parsers stumble over.
numbers: SearchStrategy[Any] = st.sampled_from(NUMBERS) | st.integers() | st.floats()
scalars: SearchStrategy[Any] = st.none() | st.booleans() | numbers | texts
values: SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every part of a value."""
    inside: Any = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    found = [path] if path else []
    for key, part in inside:
        found += _places(part, (*path, key))
    return found


@st.composite
def warped(draw: DrawFn, good: Any) -> Any:
    """A good value of which some parts are other values, gone, or under another key."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            return draw(values)
        *path, last = draw(st.sampled_from(places))
        parent = value
        for key in path:
            parent = parent[key]
        match draw(st.sampled_from(["other", "other", "gone", "moved"])):
            case "other":
                parent[last] = draw(values)
            case "gone":
                del parent[last]
            case "moved":
                part = parent.pop(last)
                if isinstance(parent, dict):
                    parent[draw(texts)] = part
    return value


def spoil(chance: Random, good: bytes) -> bytes:
    """Good bytes with some cut out, put in, changed or doubled."""
    data = good
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(data))
        end = min(len(data), at + chance.randint(0, 40))
        match chance.choice(["cut", "put", "put", "change", "double", "end"]):
            case "cut":
                data = data[:at] + data[end:]
            case "put":
                bits = chance.choice([*BITS, chance.randbytes(chance.randint(1, 8))])
                data = data[:at] + bits + data[at:]
            case "change":
                data = data[:at] + chance.randbytes(1) + data[at + 1 :]
            case "double":
                data = data[:end] + data[at:end] + data[end:]
            case "end":
                data = data[:at]
    return data


def spoilt(good: bytes) -> SearchStrategy[bytes]:
    """Good bytes, spoilt in some way."""
    return st.integers(0, 2**32).map(lambda number: spoil(Random(number), good))


def as_json(value: Any) -> bytes:
    """As Python writes it, NaN and halves of characters included."""
    return json.dumps(value).encode()


def json_like(good: Any) -> SearchStrategy[bytes]:
    """The bytes of a JSON file that should hold a value like a good one."""
    text = as_json(good)
    return warped(good).map(as_json) | spoilt(text) | st.binary(max_size=60) | values.map(as_json)


def safetensors(header: Any, data: bytes) -> bytes:
    """A safetensors file: the length of the header, the header, the data."""
    text = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(text)) + text + data


def safetensors_like(header: dict[str, Any], data: bytes) -> SearchStrategy[bytes]:
    """A safetensors file whose header, lengths or bytes may be wrong."""
    good = safetensors(header, data)
    headers = warped(header).map(as_json) | spoilt(as_json(header))
    return headers.map(lambda text: safetensors(text, data)) | spoilt(good) | st.binary(max_size=60)


# What no strategy is likely to draw. Of each kind of file, as bytes.
BOMB = b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9) if n else b"1")
    for n in range(20)
)
EXTREMES = {
    "empty": b"",
    "nested objects": b'{"a":' * 100_000,
    "nested and closed": b"[" * 100_000 + b"]" * 100_000,
    "nested in a row": b'{"prompt": ' + b"[" * 100_000,
    "a number without end": b'{"a": ' + b"9" * 100_000 + b"}",
    "no numbers": b'{"a": NaN, "b": Infinity, "c": -Infinity}\n',
    "half a character": b'{"prompt": "\\ud800", "response": "\\udfff"}\n',
    "a key twice": b'{"prompt": "a", "prompt": "b", "response": "c"}\n',
    "a key twice in yaml": b"base: 1\nbase: 2\n",
    "aliases": BOMB,
    "an alias of itself": b"a: &a [*a]\n",
    "a merge of itself": b"a: &a\n  <<: *a\n",
    "NUL": b"\x00" * 1000,
    "byte order marks": b"\xef\xbb\xbf" * 3 + b"{}\n",
    "UTF-16": "{}".encode("utf-16"),
    "carriage returns": b"{}\r\r\n\r",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system.",
    "an archive of pickles": b"PK\x03\x04" + b"\x00" * 100,
    "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "a nested header": safetensors(b'{"a":' + b"[" * 100_000, b""),
    "a tensor of 2^60 numbers": safetensors(
        {"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}, b""
    ),
    "a tensor of nothing by much": safetensors(
        {"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""
    ),
    "tensors on each other": safetensors(
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        b"\x00" * 4,
    ),
}
