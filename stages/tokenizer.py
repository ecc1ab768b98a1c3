"""The base model's tokenizer, which a stranger wrote: loaded without code, its template held back.

A chat template is a program in Jinja. transformers runs it in Jinja's sandbox, where it reaches no
file and no attribute that Python keeps to itself; but it may loop for a year, or make a text of
10 GB out of one line.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import UserError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # for one conversation, which takes 0.1 ms
MEGABYTES = 512  # beyond what the process holds


class TooLong(Exception):
    """The time is over."""


def load(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; code that came with it is never run.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with explained(f"{folder}: its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any
) -> str:
    """What the tokenizer's chat template makes of messages, as text.

    Raises:
        UserError: the template fails, or takes more than SECONDS or MEGABYTES.
    """
    with explained("the base model's chat template fails"), bounded(SECONDS, MEGABYTES):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what a stranger's file makes a library raise into a UserError of one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except TooLong:
        raise UserError(f"{what}: it takes more than {SECONDS:g} s") from None
    except MemoryError:
        raise UserError(f"{what}: it takes more than {MEGABYTES} MB") from None
    except BaseException as error:  # a panic of Rust is no Exception
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {shortened(why, 300)}") from None


@contextmanager
def bounded(seconds: float, megabytes: int) -> Iterator[None]:
    """Raise TooLong or MemoryError in a block that takes more.

    The time holds in the main thread alone, where a stage works; the memory on Linux.
    """
    with _alarm(seconds), _limit(megabytes):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TooLong

    handler = signal.signal(signal.SIGALRM, ring)
    # Again and again: Python drops what is raised while it collects garbage.
    before = signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)  # that of a test, for instance
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def _limit(megabytes: int) -> Iterator[None]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + (megabytes << 20)
    if before != resource.RLIM_INFINITY:
        most = min(most, before)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
