"""Chat templates, rendered in a process of its own, which can be ended.

A chat template is a program in Jinja that a stranger wrote. Jinja's sandbox keeps it from files and
from Python, but not from looping for a year, in a loop of its own or within one call such as
10**10**10, where no thread can be stopped. The kernel ends a process.

What it is given is what transformers' `apply_chat_template` gives (its docs, "Writing a chat
template"), less the clock: some ask `strftime_now` for the date, if there is one, and the same rows
would be other texts tomorrow.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5  # for one conversation, which takes 0.1 ms
MEGABYTES = 512  # of the process, which takes some 30
MOST = 1 << 24  # characters of a conversation's text


class Template:
    """A chat template.

    Args:
        source: its text.
        special: tokens by name, such as `bos_token`, which it is given.
    """

    def __init__(self, source: str, special: dict[str, Any]) -> None:
        self._source, self._special = source, special

    def render(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation.

        Args:
            add_generation_prompt: with the beginning of the answer.

        Raises:
            ValueError: the template is damaged, refuses these messages, or takes too much.
        """
        known = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        known |= {"messages": list(messages)} | self._special
        found = _renderer.ask([self._source, known, SECONDS, MEGABYTES])
        if "error" in found:
            raise ValueError(found["error"])
        return found["text"]


class _Renderer:
    """The process, which is begun when it is needed, and ends when nobody can ask it any more."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Have none, as one that was forked: the process stays with who began it."""
        self._process: subprocess.Popen[str] | None = None
        self._alone = threading.Lock()

    def ask(self, line: list[Any]) -> dict[str, str]:
        """What `main` answers to a line."""
        with self._alone:
            process = self._process = self._process or self._begun()
            assert process.stdin and process.stdout
            try:
                process.stdin.write(f"{json.dumps(line)}\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())
            except (OSError, ValueError):  # it has ended
                self._process = None
                with contextlib.suppress(OSError), process:  # what is not written goes nowhere
                    process.kill()
                if process.returncode == -signal.SIGALRM:
                    return {"error": f"it takes more than {SECONDS:g} s"}
                return {"error": f"its process ended with {process.returncode}"}

    def _begun(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the server, which answers what it has begun
        )


_renderer = _Renderer()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)


class Generation(Extension):
    """`{% generation %}`, with which templates mark what an assistant says, marks nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(1)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = lambda value, **rest: json.dumps(
        value, ensure_ascii=False, **rest
    )
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def main() -> None:
    """Answer each line with a line: the text, or why there is none.

    SIGALRM, which nothing handles here, ends the process when one takes too long.
    """
    for line in sys.stdin:
        source, known, seconds, megabytes = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            _limit(megabytes)
            text = _compiled(source).render(known)
            found = {"text": text} if len(text) <= MOST else {"error": "its text is too long"}
        except MemoryError:
            found = {"error": f"it takes more than {megabytes} MB"}
        except Exception as error:  # what a template can raise has no end
            found = {"error": " ".join(str(error)[:400].split()) or type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(found), flush=True)


def _limit(megabytes: int) -> None:
    """Have Linux give this process no more memory."""
    if Path("/proc/self").exists():
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = megabytes << 20
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


if __name__ == "__main__":
    main()
