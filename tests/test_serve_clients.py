"""`olivepress serve` with clients that people have: OpenAI's package, and the command `llm`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest

from conftest import BIN, sh
from tests.serving import ask, text_of

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "a-key"


@pytest.fixture
def url(served_url: str) -> str:
    return served_url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def test_openai_package(client: openai.OpenAI, url: str) -> None:
    """Models, an answer, a stream, completions: as objects of its own types."""
    assert [each.id for each in client.models.list()] == ["base", "one", "two"]
    said: list = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(
        model="one", messages=said, temperature=0, max_tokens=20
    )
    expected = text_of(ask(url, model="one", max_tokens=20))
    assert answer.choices[0].message.content == expected
    assert answer.usage and 0 < answer.usage.completion_tokens <= 20
    stream = client.chat.completions.create(
        model="one", messages=said, temperature=0, max_tokens=20, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    events = list(stream)
    text = "".join(each.choices[0].delta.content or "" for each in events if each.choices)
    assert text == expected and events[-1].usage == answer.usage
    told = client.chat.completions.create(
        model="one", messages=said, max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert told.choices[0].logprobs and told.choices[0].logprobs.content
    raw = client.completions.create(model="base", prompt=["a", "b"], max_tokens=3, n=2)
    assert [each.index for each in raw.choices] == [0, 1, 2, 3]
    with client.chat.completions.stream(model="one", messages=said, temperature=0) as helper:
        assert helper.get_final_completion().choices[0].message.content == expected


def test_openai_package_understands_the_errors(client: openai.OpenAI) -> None:
    said: list = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=said)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "long " * 100}]
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="base", messages=said,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )  # fmt: skip
    assert tools.value.param == "tools"


def test_llm_command(url: str, tmp_path: Path) -> None:
    """Simon Willison's `llm`, with the server as in docs/serve.md."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: travel\n  model_name: one\n  api_base: {url}/v1\n  api_key_name: press\n"
    )
    env = {"LLM_USER_PATH": str(tmp_path), "NO_COLOR": "1"}
    sh(str(BIN / "llm"), "keys", "set", "press", "--value", KEY, cwd=tmp_path, **env)
    options = ("-o", "temperature", "0", "-o", "max_tokens", "20")
    for way in ((), ("--no-stream",)):
        said = sh(str(BIN / "llm"), "-m", "travel", *options, *way, "Hello", cwd=tmp_path, **env)
        assert said.stdout.rstrip("\n") == text_of(ask(url, model="one", max_tokens=20)).rstrip(
            "\n"
        )
