"""The one kind of error that is a user's to mend: shown as a message, never as a traceback."""

from stages.redact import without_secrets


class UserError(Exception):
    """What was wrong, where (file and line, key, stage), and what to do.

    A message may quote what a stranger wrote, or what a service said: secrets are hidden, and what
    could move the cursor of a terminal, or is no whole character, is shown by its escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(without_secrets(message)))


def printable(text: str) -> str:
    """The text with all but letters, signs, spaces and line ends as escapes, such as `\\x1b`."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def shortened(value: object, most: int = 80) -> str:
    """The value as Python writes it, cut in the middle; one that refers to itself ends too."""
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    return short.repr(value)
