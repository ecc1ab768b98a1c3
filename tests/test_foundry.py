"""inference_model.json, from chat templates in the forms that models come with."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from stages import foundry
from tests.models import save_tokenizer

PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
# A start token, and a system prompt of its own where there is none.
QWEN = (
    "{{ '<s>' }}{% if messages[0].role != 'system' %}[system]Be kind.[/]{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# The system's words go into the first question.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{% elif m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "<<{{ messages[0].content }}>> {% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ONE_QUESTION = (
    "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    "Q: {{ messages[0].content }} A:"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            PHI3,
            {
                "prompt": "<|user|>\n{Content}<|end|>\n<|assistant|>\n",
                "user": "<|user|>\n{Content}<|end|>\n",
                "assistant": "<|assistant|>\n{Content}<|end|>\n",
                "system": "<|system|>\n{Content}<|end|>\n",
            },
        ),
        (
            QWEN,
            {
                "prompt": "<s>[system]Be kind.[/][user]{Content}[/][assistant]",
                "user": "[user]{Content}[/]",
                "assistant": "[assistant]{Content}[/]",
                "system": "<s>[system]{Content}[/]",
            },
        ),
        (
            GEMMA,
            {
                "prompt": "[user]{Content}[/][assistant]",
                "user": "[user]{Content}[/]",
                "assistant": "[assistant]{Content}[/]",
            },
        ),
        (
            LLAMA2,
            {
                "prompt": "[INST] {Content} [/INST]",
                "user": "[INST] {Content} [/INST]",
                "assistant": " {Content}<|endoftext|>",
            },
        ),
        (ONE_QUESTION, {"prompt": "Q: {Content} A:", "assistant": "{Content}"}),
    ],
)
def test_each_role_is_what_the_chat_template_writes(tokenizer, monkeypatch, template, expected):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    question = [{"role": "user", "content": "{prompt}"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert foundry.templates(tokenizer, text) == expected


@pytest.mark.parametrize("template", [PHI3, None])
def test_a_text_of_ones_own_says_nothing_of_turns(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    expected = {"prompt": "Q: {Content}\nA:", "assistant": "{Content}"}
    assert foundry.templates(tokenizer, "Q: {prompt}\nA:") == expected


@pytest.mark.parametrize(
    ("source", "id", "name"),
    [
        ("builtin", "data/everyday.jsonl", "everyday"),
        ("hf", "microsoft/Phi-3.5-mini-instruct", "Phi-3.5-mini-instruct"),
        ("local", "my phi (2)", "my-phi-2"),
        ("local", "§", "model"),
        ("azureml", "azureml://registries/azureml/models/Phi-4/versions/4", "Phi-4"),
    ],
)
def test_the_name_is_that_of_the_base_model(tokenizer, source, id, name):
    about = {"base": {"source": source, "id": id}, "prompt_template": "{prompt}"}
    found = foundry.inference_model(about, "NvTensorRtRtx", tokenizer)
    assert found["Name"] == f"{name}-olivepress-nvtensorrtrtx"
    assert Path(found["Name"]).name == found["Name"]
