"""Files that others may have written: read in bounded memory, and what is wrong is a UserError.

What JSON and YAML leave open is closed here: a key that is there twice (parsers differ in which
they take), YAML aliases that unfold to more than anybody wrote, and files that are none, such as a
pipe that never ends.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from stages.errors import UserError, shortened

if TYPE_CHECKING:
    from safetensors import safe_open
    from yaml import Node

JSON_BYTES = 32 << 20  # the index of a model of 100,000 tensors has 9 MB
YAML_BYTES = 256 << 10  # 4 s at worst; params.yaml has 5 KB
ALIASES = 1000  # values that aliases may add to those that are written out
# Control characters, line and paragraph ends, halves of characters: in no name and in no path.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# A leading - would make it an option of a command.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
# How pickles begin (protocol 2 and later), and PyTorch's archives of them.
PICKLED = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")


ESCAPED = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError)


class Missing(UserError):
    """There is no such file."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file, open for reading.

    Raises:
        Missing: it is not there.
        UserError: it is a folder, a pipe or a device; or it may not be read.
    """
    try:
        # Without O_NONBLOCK, a pipe that nobody writes to is waited for.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(f"{path}: not found") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a character in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {why}") from None
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise UserError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no plain file'}")
    with os.fdopen(number, "rb") as file:
        yield file


def content(path: Path, most: int) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: as `opened`; it has more than `most` bytes.
    """
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path}: more than {most:,} bytes, so not what it should be")
    return data


def json_object(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as `content`; not JSON, not an object, or a key is there twice.
    """
    data = content(path, most)
    try:
        value = parsed(data)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def parsed(data: bytes) -> Any:
    """What JSON in UTF-8 says; ValueError says what is wrong with it."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
        if b"\\u" in data:  # half a character can be written no other way
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("text in it holds half a character") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads`; ValueError when a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shortened(twice)} is there twice")
    return found


def yaml_file(path: Path, most: int = YAML_BYTES) -> Any:
    """What a YAML file says.

    Raises:
        UserError: as `content` and `yaml_value`.
    """
    return yaml_value(content(path, most), str(path))


def yaml_value(text: str | bytes, where: str) -> Any:
    """What YAML says: numbers, texts, lists and mappings.

    Raises:
        UserError: not UTF-8, not YAML, a key is there twice, or aliases unfold without end.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text if isinstance(text, str) else text.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node, {}, len(text) + ALIASES)
        return loader.construct_document(node)  # type: ignore[no-untyped-call]
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deep") from None
    # PyYAML lets through what Python raises for `0x_`, `2001-99-99`, `!!bool x`, `!!int ''` or
    # `"\UFFFFFFFF"`.
    except (yaml.YAMLError, *ESCAPED) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _unfolded(node: Node, sizes: dict[int, int], most: int) -> int:
    """The nodes of a tree with its aliases unfolded; ValueError when they are more than `most`."""
    import yaml

    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: holds itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    inside: list[Node] = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: the key {shortened(key.value)} is there twice")
                seen.add((key.tag, key.value))
        inside = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    sizes[id(node)] = 1 + sum(_unfolded(part, sizes, most) for part in inside)
    if sizes[id(node)] > most:
        raise ValueError(f"line {node.start_mark.line + 1}: aliases that unfold without end")
    return sizes[id(node)]


@contextmanager
def tensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file, its header read and compared with its size; the weights are not.

    Raises:
        UserError: as `opened`; it is no safetensors file, or not whole.
    """
    from safetensors import SafetensorError, safe_open

    with opened(path) as file:
        if PICKLED.match(file.read(4)):
            raise UserError(
                f"{path}: a pickle under the name of a safetensors file: it can run code when it "
                "is read; save it as safetensors"
            )
    try:
        found = safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut off: {error}") from None
    with found:
        yield found
