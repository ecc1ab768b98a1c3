"""A package's chat template, rendered in a process of its own, which can be ended.

A chat template is a program in Jinja that a stranger wrote. Jinja's sandbox keeps it from files and
from Python, but not from looping for a year, in a loop of its own or within one call such as
10**10**10, where no thread can be stopped. The kernel ends a process.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5  # for one conversation, which takes 0.1 ms
MEGABYTES = 512  # of the process, which takes some 30
MOST = 1 << 24  # characters of a conversation's text


class Template:
    """A chat template.

    Args:
        source: what the package has.
        special: tokens by name, which it is given.
    """

    def __init__(self, source: str, special: dict[str, Any]) -> None:
        self._first = [source, special, SECONDS, MEGABYTES]
        self._process: subprocess.Popen[str] | None = None
        self._alone = threading.Lock()

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a conversation, up to where the answer begins.

        Raises:
            ValueError: the template is damaged, refuses these messages, or takes too much.
        """
        with self._alone:
            found = self._asked(list(messages))
        if "error" in found:
            raise ValueError(found["error"])
        return found["text"]

    def _asked(self, messages: list[dict[str, str]]) -> dict[str, str]:
        lines: list[Any] = [messages]
        if not self._process:
            lines = [self._first, messages]
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the server, which answers what it has begun
            )
            self._end = weakref.finalize(self, _end, self._process)
        process = self._process
        assert process.stdin and process.stdout
        try:
            process.stdin.writelines(f"{json.dumps(line)}\n" for line in lines)
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it has ended
            self._process = None
            self._end()
            return {"error": f"it takes more than {SECONDS} s"}


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError), process:  # what is still to be written to it goes nowhere
        process.kill()


def _environment() -> ImmutableSandboxedEnvironment:
    """The one that chat templates are written for: transformers' `apply_chat_template`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **rest: json.dumps(
        value, ensure_ascii=False, **rest
    )
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)


def main() -> None:
    """Answer each line of messages with a line: the text, or why there is none.

    SIGALRM, which nothing handles here, ends the process when one takes too long.
    """
    source, special, seconds, megabytes = json.loads(sys.stdin.readline())
    _limit(megabytes)
    template = None
    for line in sys.stdin:
        signal.alarm(seconds)
        try:
            template = template or _environment().from_string(source)
            text = template.render(messages=json.loads(line), add_generation_prompt=True, **special)
            found = {"text": text} if len(text) <= MOST else {"error": "its text is too long"}
        except MemoryError:
            found = {"error": f"it takes more than {megabytes} MB"}
        except Exception as error:  # what a template can raise has no end
            found = {"error": str(error)[:400] or type(error).__name__}
        signal.alarm(0)
        print(json.dumps(found), flush=True)


def _limit(megabytes: int) -> None:
    """Have Linux give this process no more memory."""
    if Path("/proc/self").exists():
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


if __name__ == "__main__":
    main()
