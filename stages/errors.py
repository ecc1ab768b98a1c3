"""Errors that are shown as a message, never as a traceback: the user's, and the machine's."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stages.redact import without_secrets

NO_SPACE = re.compile(r"No space left|Disk quota exceeded|os error (28|122)\b|\[Errno (28|122)\]")
READ_ONLY = re.compile(r"Read-only file system|os error 30\b|\[Errno 30\]")
NO_MEMORY = "memory ran out"
_NO_MEMORY = re.compile(
    r"std::bad_alloc|[Cc]an(no|')t allocate memory|out of memory|Failed to allocate memory"
    r"|Memory allocation still failed|cannot map zero-fill pages|os error 12\b|^MemoryError",
    re.MULTILINE,
)
# Each thread has a stack; the libraries say the same for too many processes.
NO_THREADS = f"{NO_MEMORY}, or no more threads are allowed (ulimit -u)"
_NO_THREADS = re.compile(r"can't start new thread|[Tt]hread creation failed|pthread_create failed")


class UserError(Exception):
    """What was wrong, where (file and line, key, stage), and what to do.

    A message may quote what a stranger wrote, or what a service said: secrets are hidden, and what
    could move the cursor of a terminal, or is no whole character, is shown by its escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(without_secrets(message)))


def printable(text: str, keep: str = "\n") -> str:
    """The text with all but letters, signs, spaces and what to keep as escapes, such as `\\x1b`."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def on_one_line(text: str) -> str:
    """What a stranger wrote, such as the name of a file, with line ends as escapes too."""
    return printable(text, keep="")


def shortened(value: object, most: int = 80) -> str:
    """The value as Python writes it, cut in the middle; one that refers to itself ends too."""
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    return short.repr(value)


def lack(error: BaseException) -> str | None:
    """In one line what the machine lacks, if that is why: disk, the right to write, memory.

    Libraries have errors of their own, with the system's words or number in the text.
    """
    for each in _causes(error):
        text, path = str(each), getattr(each, "filename", None)
        if NO_SPACE.search(text):
            return f"no space left on the disk: {path or 'while writing'}"
        if READ_ONLY.search(text):
            return f"cannot be written, the file system is read-only: {path or 'an output'}"
        if isinstance(each, PermissionError):
            return f"cannot be written or read, permission denied: {path or text}"
        if said := NO_MEMORY if isinstance(each, MemoryError) else no_memory(text):
            return said
    return None


def no_memory(text: str) -> str | None:
    """In a few words that memory ran out, if a library says so, also one that ends the process."""
    if _NO_THREADS.search(text):
        return NO_THREADS
    return NO_MEMORY if _NO_MEMORY.search(text) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
