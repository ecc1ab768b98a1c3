"""inference_model.json: by it Foundry Local finds a model in a folder, and asks it.

Its form is that of Foundry Local's own files: `Name`, and `PromptTemplate` with a text for each
role in which {Content} stands for what is said. Version 2 of its SDK reads the name alone and
renders the tokenizer's chat template itself; the tool before it fills these texts.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.tokenizer import conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "inference_model.json"
SLOT = "{Content}"
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def inference_model(
    manifest: dict[str, Any],
    provider: str,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | None = None,
) -> dict[str, Any]:
    """What inference_model.json says.

    Args:
        manifest: as olivepress.json.
        provider: as genai_config.json names it, or cpu.
        tokenizer: of the base model.
        adapter: the one that answers where none is chosen.
    """
    parts = [base_name(manifest["base"]), "olivepress", *filter(None, [adapter]), provider.lower()]
    return {
        "Name": "-".join(parts),
        "PromptTemplate": templates(tokenizer, manifest["prompt_template"]),
    }


def base_name(base: dict[str, Any]) -> str:
    """The base model in a word: of a repository, an asset, a folder or a file the last part."""
    path = PurePosixPath(str(base["id"]).partition("/versions/")[0])
    name = path.stem if base["source"] == "builtin" else path.name
    return UNSAFE.sub("-", name).strip("-.") or "model"


def templates(tokenizer: PreTrainedTokenizerBase, prompt_template: str) -> dict[str, str]:
    """A text for each role, with {Content} once.

    `prompt` is a whole question, up to where the answer begins: what the adapters were taught.
    `user`, `assistant` and `system` are one turn each, as the chat template writes it, and are left
    out where it writes none by itself, or where the adapters were taught another text. `assistant`
    is then the answer alone.
    """
    found = {"prompt": prompt_template.replace("{prompt}", SLOT), "assistant": SLOT}
    if not tokenizer.chat_template:
        return found
    try:
        asked = conversation(tokenizer, [said("user", SLOT)], add_generation_prompt=True)
        if asked != found["prompt"]:
            return found
        return found | (turns(tokenizer, "") or turns(tokenizer, str(tokenizer.eos_token)))
    except UserError:  # a template may refuse two turns
        return found


def turns(tokenizer: PreTrainedTokenizerBase, end: str) -> dict[str, str]:
    """What one turn of each role adds to a conversation; empty if turns do more than add.

    Turns of user and assistant are taken from the middle of a conversation, as templates begin with
    more than the first turn: a start token, or a system prompt of their own.

    Args:
        end: what the template writes behind a conversation that ends here, as Phi-3's does.
    """

    def text(*messages: dict[str, str]) -> str:
        return conversation(tokenizer, list(messages)).removesuffix(end)

    question, answer, slot = said("user", "Why?"), said("assistant", "So."), said("user", SLOT)
    one, two = text(question), text(question, answer)
    answered, again = text(question, said("assistant", SLOT)), text(question, answer, slot)
    user, assistant = again.removeprefix(two), answered.removeprefix(one)
    if user == again or assistant == answered or not one.endswith(user.replace(SLOT, "Why?")):
        return {}
    found = {"user": user, "assistant": assistant}
    try:
        whole = text(said("system", SLOT), question)
    except UserError:  # Gemma's template has no such role, and says so
        return found
    system = whole.removesuffix(user.replace(SLOT, "Why?"))
    if system != whole and system.count(SLOT) == 1:
        found["system"] = system
    return found


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
