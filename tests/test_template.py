"""Chat templates: the text that transformers makes of them, on any day, and a process that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from stages import rows
from stages.template import Template
from stages.tokenizer import conversation
from tests.models import save_tokenizer

# In the ways in which templates are written.
MARKED = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}{% generation %}{{ message['content'] ~ '!' }}{% endgeneration %}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content | trim + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
WITH_TOOLS = """{{ unk_token }}{% if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if documents is defined and documents %}{{ documents | length }}{% endif %}
{% for message in messages if message.content is string %}
  {% if loop.index0 > 5 %}{% break %}{% endif %}
{{ '<|' ~ message['role'] ~ '|>' }}{{ message | tojson(indent=2) }}{{ eos_token }}
{% endfor %}"""
OLD_ROLES = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant take turns') }}{% endif %}
{{ eos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% endfor %}"""
DATED = (
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("source", [None, MARKED, WITH_TOOLS, OLD_ROLES])
def test_the_text_is_that_of_transformers(
    tokenizer: Any, source: str | None, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source:
        monkeypatch.setattr(tokenizer, "chat_template", source)
    user = {"role": "user", "content": " Où est <b>'Évora'</b>? \n"}
    said = {"role": "system" if source is OLD_ROLES else "assistant", "content": "Là-bas."}
    for messages in ([user], [said, user] if source is OLD_ROLES else [user, said]):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asks
        )
        assert conversation(tokenizer, messages, asks) == expected


def test_the_rows_are_the_same_tomorrow(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.2's template, for one, writes today's date into every prompt if it can get it."""
    monkeypatch.setattr(tokenizer, "chat_template", DATED + "{{ messages[0].content }}")
    assert rows.render(tokenizer, "chat", "Where?", "There.")[0] == "26 Jul 2024Where?"


ASK = "import stages.template as it; print(it.Template({!r}, {{}}).render([]), flush=True); {}"
PID = "print(it._renderer._process.pid, flush=True)"


def test_the_process_ends_with_the_one_that_asked() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK.format("a", PID)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    text, pid = found.stdout.split()
    assert text == "a" and not found.stderr
    psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], 10)
    assert not psutil.pid_exists(int(pid))


def test_a_template_without_end_does_not_outlive_a_killed_one() -> None:
    """Nobody is there to end it then but the kernel."""
    endless = "it.SECONDS = 2; it.Template('{{ 10 ** (9**9) }}', {}).render([])"
    one = subprocess.Popen(
        [sys.executable, "-c", ASK.format("a", f"{PID}; {endless}")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert one.stdout
    assert one.stdout.readline() == "a\n"
    process = psutil.Process(int(one.stdout.readline()))
    while process.cpu_times().user < 0.5:
        time.sleep(0.05)
    one.kill()
    one.wait()
    gone, there = psutil.wait_procs([process], timeout=30)
    assert gone and not there


def test_a_forked_process_has_a_renderer_of_its_own() -> None:
    """Were it the same one, each could read the answer to the other's question."""
    template = Template("{{ messages[0].content }}", {})
    assert template.render([{"role": "user", "content": "one"}]) == "one"
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, template.render([{"role": "user", "content": "two"}]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"two"
    assert template.render([{"role": "user", "content": "three"}]) == "three"


def test_one_that_ends_otherwise_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import template

    good = Template("a", {})
    assert good.render([]) == "a"
    process = template._renderer._process
    assert process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="its process ended with -9"):
        good.render([])
    assert good.render([]) == "a"
