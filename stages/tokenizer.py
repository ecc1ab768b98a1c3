"""The base model's tokenizer, which a stranger wrote: loaded without code, its template bounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import UserError, shortened
from stages.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; code that came with it is never run.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with explained(f"{folder}: its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = False,
) -> str:
    """What the tokenizer's chat template makes of messages, as text; see `Template.render`.

    Raises:
        UserError: the template fails, or takes too much.
    """
    with explained("the base model's chat template fails"):
        template = Template(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
        return template.render(messages, add_generation_prompt)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what a stranger's file makes a library raise into a UserError of one line."""
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {shortened(why, 300)}") from None
