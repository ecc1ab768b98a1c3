"""`olivepress serve` as a client sees it, over HTTP."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from conftest import typed
from serve.text import Text
from stages.generation import Session
from tests.serving import another_adapter, ask, refusal, served, text_of

if TYPE_CHECKING:
    from exported import Lab

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def url(served_url: str) -> str:
    return served_url


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end as the API says."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in events]


def test_models_are_the_base_and_each_adapter(url: str) -> None:
    listed = httpx.get(f"{url}/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["base", "one", "two"]
    assert listed["object"] == "list" and all(each["object"] == "model" for each in listed["data"])
    assert httpx.get(f"{url}/v1/models/one").json()["parent"] == "base"
    assert refusal(httpx.get(f"{url}/v1/models/none"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("model", ["base", "one", "two"])
def test_answers_are_those_of_genai(url: str, served_package: Path, model: str) -> None:
    """The same tokens as onnxruntime-genai's own generator on the same files, with each adapter."""
    adapter = None if model == "base" else model
    session, writer = Session(served_package), Text(served_package, 256).writer([])
    tokens = session.tokens(session.encode(session.render("Hello")), adapter, 30)
    expected = "".join(map(writer.add, tokens))
    answer = ask(url, model=model, max_tokens=30)
    assert text_of(answer) == expected
    assert answer.json()["model"] == model
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == len("Hello") + 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_models_differ(url: str) -> None:
    assert len({text_of(ask(url, model=name)) for name in ("base", "one", "two")}) == 3


def test_requests_at_once_for_different_adapters_get_their_own_answers(url: str) -> None:
    """Rows of one batch do not see each other, whichever adapters they have."""
    wanted = [
        {"model": ("base", "one", "two")[i % 3], "max_tokens": 20 + i,
         "messages": [{"role": "user", "content": "Hello" * (1 + i % 5)}]}
        for i in range(24)
    ]  # fmt: skip
    alone = [text_of(ask(url, **each)) for each in wanted]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda each: text_of(ask(url, **each)), wanted))
    assert together == alone


def test_a_stream_is_the_same_answer_in_pieces(url: str) -> None:
    whole = ask(url, max_tokens=30)
    events = chunks(ask(url, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(each["object"] == "chat.completion.chunk" for each in events)
    *pieces, last = events
    assert last["choices"] == [] and last["usage"] == whole.json()["usage"]
    deltas = [each["choices"][0] for each in pieces]
    assert "".join(each["delta"].get("content", "") for each in deltas) == text_of(whole)
    assert len(deltas) > 10
    finish = [each["finish_reason"] for each in deltas]
    assert finish[-1] == "length" and set(finish[:-1]) == {None}


def test_completions(url: str) -> None:
    """The raw text of the chat template gives what the chat gives; lists and tokens are prompts."""
    body = {
        "model": "one",
        "temperature": 0,
        "max_tokens": 10,
        "prompt": "<|user|>Hello<|end|><|assistant|>",
    }
    answer = httpx.post(f"{url}/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == text_of(ask(url, model="one", max_tokens=10))
    several = httpx.post(
        f"{url}/v1/completions", json=body | {"prompt": ["a", body["prompt"]], "n": 2}
    )
    texts = [each["text"] for each in several.json()["choices"]]
    assert [each["index"] for each in several.json()["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] and texts[2] == texts[3] == answer["choices"][0]["text"]
    tokens = httpx.post(f"{url}/v1/completions", json=body | {"prompt": [5, 6, 7], "stream": True})
    assert chunks(tokens)[-1]["choices"][0]["finish_reason"] == "length"
    short = httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": "a"}).json()
    assert short["usage"]["completion_tokens"] <= 16


def test_stop_texts(url: str) -> None:
    whole = text_of(ask(url, max_tokens=40))
    stop = whole[5:8]
    before = whole[: whole.index(stop)]
    answer = ask(url, max_tokens=40, stop=[stop, "not in it"])
    assert text_of(answer) == before and answer.json()["choices"][0]["finish_reason"] == "stop"
    events = chunks(ask(url, max_tokens=40, stop=stop, stream=True))
    said = "".join(each["choices"][0]["delta"].get("content", "") for each in events)
    assert said == before and events[-1]["choices"][0]["finish_reason"] == "stop"


def test_seed_n_and_temperature(url: str) -> None:
    """A seed gives the same answers again, and each of n another; without one they differ."""
    body = {"n": 3, "seed": 5, "temperature": 1.5, "max_tokens": 20}
    first, again = ask(url, **body), ask(url, **body)
    texts = [text_of(first, choice) for choice in range(3)]
    assert texts == [text_of(again, choice) for choice in range(3)] and len(set(texts)) == 3
    assert first.json()["usage"]["completion_tokens"] <= 60
    free = {text_of(ask(url, temperature=1.5, max_tokens=20)) for _ in range(3)}
    assert len(free) == 3
    narrow = {text_of(ask(url, temperature=1.5, top_p=1e-6, max_tokens=20)) for _ in range(2)}
    assert narrow == {text_of(ask(url, max_tokens=20))}


def test_logprobs_and_bias(url: str) -> None:
    answer = ask(url, logprobs=True, top_logprobs=3, max_tokens=4).json()["choices"][0]
    tokens = answer["logprobs"]["content"]
    assert len(tokens) == 4
    for each in tokens:
        assert each["top_logprobs"][0]["logprob"] == each["logprob"] < 0  # the likeliest was chosen
        assert len(each["top_logprobs"]) == 3
    first = next(each for each in tokens if len(each["bytes"]) == 1)["bytes"][0]
    assert all(len(each["bytes"]) == 1 for each in tokens)  # this tokenizer has one a byte
    ids = {str(4 + at): -100 for at in range(256)}
    other = ask(url, logprobs=True, max_tokens=1, logit_bias=ids).json()["choices"][0]
    assert first not in [
        byte for each in other["logprobs"]["content"] for byte in each["bytes"][:1]
    ]
    old = {
        "model": "base",
        "prompt": "a",
        "logprobs": 2,
        "max_tokens": 3,
        "temperature": 1,
        "seed": 1,
    }
    told = httpx.post(f"{url}/v1/completions", json=old).json()["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == 3
    assert told["text_offset"] == [sum(map(len, told["tokens"][:at])) for at in range(3)]
    for token, alternatives in zip(told["tokens"], told["top_logprobs"], strict=True):
        assert token in alternatives


REFUSED: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "other"}, 404, "model"),
    ({"model": 5}, 400, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "Hello"}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.role"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
    ({"messages": [{"role": "user", "content": "long " * 100}]}, 400, "messages"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": "1"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"n": 0}, 400, "n"),
    ({"n": 128}, 400, "n"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 400, None),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    ({"seed": 1 << 70}, 400, "seed"),
    ({"stream": "yes"}, 400, "stream"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"no_such_thing": 1}, 400, "no_such_thing"),
]


@pytest.mark.parametrize(("body", "status", "param"), REFUSED, ids=lambda it: str(it)[:40])
def test_what_is_wrong_is_refused_by_name(
    url: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    base = {"model": "base", "messages": [{"role": "user", "content": "Hello"}]}
    text = json.dumps(base | body)  # with half characters as their escapes
    sent = httpx.post(
        f"{url}/v1/chat/completions", content=text, headers={"Content-Type": "application/json"}
    )
    error = refusal(sent, status)
    assert (error["param"] or "").split(".")[0] == (param or "").split(".")[0], error
    assert ask(url).status_code == 200  # and it goes on


def test_what_asks_for_nothing_else_is_accepted(url: str) -> None:
    same = {
        "tools": [], "response_format": {"type": "text"}, "user": "me", "store": False,
        "metadata": {"a": "b"}, "stop": None, "max_completion_tokens": 8, "top_p": None,
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": part} for part in ("Hel", "lo")]},
            {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "Go on."},
        ],
    }  # fmt: skip
    assert text_of(ask(url, **same))


BODIES = [
    (b"{bad", 400, "JSON"),
    (b"", 400, ""),
    (b"[]", 400, "object"),
    (b"[" * 100_000, 400, ""),
    (b'{"model": NaN}', 400, "model"),
    (b'{"model": "base", "messages": [{"role": "user", "content": "\xff"}]}', 400, ""),
    (b"x" * (50 << 20), 413, "bytes"),
    (b'{"model": "base", "messages": [' + b"5," * 500_000 + b"5]}", 400, "messages"),
]


@pytest.mark.parametrize(("body", "status", "word"), BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_none(url: str, body: bytes, status: int, word: str) -> None:
    headers = {"Content-Type": "application/json"}
    sent = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert word in refusal(sent, status)["message"]
    assert ask(url).status_code == 200


def test_other_ways_to_ask_wrongly(url: str) -> None:
    refusal(httpx.post(f"{url}/v1/chat/completions", content="{}"), 415)
    refusal(httpx.get(f"{url}/v1/nothing"), 404)
    refusal(httpx.get(f"{url}/v1/chat/completions"), 405)
    refusal(httpx.get(f"{url}/healthz", headers={"Host": "elsewhere.example"}), 403)
    assert httpx.get(f"{url}/healthz", headers={"Host": "localhost:1"}).json() == {"status": "ok"}


def test_adapters_come_and_go(
    served_package: Path, labs: Callable[[str], Lab], tmp_path: Path
) -> None:
    """Loaded at first use; more by a request, or by a file in the folder; gone when asked to."""
    folder = tmp_path / "package"
    shutil.copytree(served_package, folder)
    extra = another_adapter(labs("phi3"), tmp_path / "extra.onnx_adapter", seed=5)
    with served(folder) as (url, _):
        state = lambda: {e["id"]: e["loaded"] for e in httpx.get(f"{url}/v1/models").json()["data"]}  # noqa: E731
        assert state() == {"base": True, "one": False, "two": False}
        first = text_of(ask(url, model="one"))
        assert state()["one"] and not state()["two"]
        load = {"lora_name": "extra", "lora_path": str(extra)}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=load).json()["id"] == "extra"
        added = text_of(ask(url, model="extra"))
        assert added != first
        shutil.copy(extra, folder / "adapters/dropped.onnx_adapter")
        assert text_of(ask(url, model="dropped")) == added
        shutil.copy(extra, folder / "adapters/one.onnx_adapter")  # changed under the server
        assert text_of(ask(url, model="one")) == added
        gone = httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "extra"})
        assert gone.json()["deleted"]
        refusal(ask(url, model="extra"), 404)
        refusal(httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "extra"}), 404)
        broken = tmp_path / "broken.onnx_adapter"
        broken.write_bytes(b"\0" * 100)
        for name, path in (
            ("b", broken),
            ("base", extra),
            ("../x", extra),
            ("c", tmp_path / "no"),
            ("one", extra),
        ):
            sent = httpx.post(
                f"{url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}
            )
            refusal(sent, 400)
        load = {"lora_name": "extra", "lora_path": str(extra)}
        again = httpx.post(f"{url}/v1/load_lora_adapter", json=load)
        assert again.status_code == 200 and text_of(ask(url, model="extra")) == added
        for path in ("a\0.onnx_adapter", "/dev/zero.onnx_adapter"):
            load = {"lora_name": "odd", "lora_path": path}
            refusal(httpx.post(f"{url}/v1/load_lora_adapter", json=load), 400)
        os.mkfifo(tmp_path / "pipe.onnx_adapter")
        load = {"lora_name": "odd", "lora_path": str(tmp_path / "pipe.onnx_adapter")}
        refusal(httpx.post(f"{url}/v1/load_lora_adapter", json=load), 400)
        assert "odd" not in state()
        for name in ("no name.onnx_adapter", "base.onnx_adapter"):  # left out, and harm nobody
            shutil.copy(extra, folder / "adapters" / name)
        (folder / "adapters/link.onnx_adapter").symlink_to(extra)
        assert set(state()) == {"base", "dropped", "extra", "one", "two"}
        (folder / "adapters/bad.onnx_adapter").write_bytes(b"nothing")
        assert "bad.onnx_adapter" in refusal(ask(url, model="bad"), 500)["message"]
        assert text_of(ask(url, model="two"))


def test_a_key(served_package: Path) -> None:
    with served(served_package, OLIVEPRESS_API_KEY="secret-key") as (url, process):
        assert refusal(ask(url), 401)["code"] == "invalid_api_key"
        for given in ("Bearer wrong", "secret-key", "Basic secret-key", "Bearer \xff"):
            sent = httpx.get(f"{url}/v1/models", headers={"Authorization": given.encode("latin-1")})
            refusal(sent, 401)
        headers = {"Authorization": "Bearer secret-key"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        refusal(httpx.get(f"{url}/card"), 401)
        assert httpx.get(f"{url}/healthz").status_code == httpx.get(url).status_code == 200
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert "secret-key" not in log


def test_others_need_a_key_to_be_let_in(served_package: Path) -> None:
    said = typed("serve", str(served_package), "--host", "0.0.0.0", cwd=served_package)
    assert said.exit_code == 1 and "OLIVEPRESS_API_KEY" in said.output


def test_page_card_lineage_and_metrics(url: str) -> None:
    page = httpx.get(url)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "://" not in page.text  # no other host
    assert httpx.get(f"{url}/card").text == "# The card\n"
    assert httpx.get(f"{url}/lineage").json()["export"]
    ask(url, model="two", max_tokens=5)
    figures = httpx.get(f"{url}/metrics").text
    assert 'olivepress_requests_total{model="two",status="200"}' in figures
    assert "olivepress_sequences_running 0.0" in figures
    assert httpx.get(f"{url}/openapi.json").json()["paths"].keys() >= {"/v1/chat/completions"}


def test_what_cannot_be_served(served_package: Path, tmp_path: Path) -> None:
    """One line that says what is wrong, and no traceback."""

    def broken(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(served_package, folder)
        return folder

    (no_config := broken("no-config")).joinpath("genai_config.json").unlink()
    (no_model := broken("no-model")).joinpath("model.onnx").write_bytes(b"damaged")
    (no_tokenizer := broken("no-tokenizer")).joinpath("tokenizer.json").write_text("{}")
    (old := broken("old")).joinpath("adapter_inputs.json").write_text("{}")
    (link := broken("link")).joinpath("adapters/x.onnx_adapter").symlink_to("/etc/passwd")
    cases = {
        tmp_path / "nothing": "no such folder", no_config: "genai_config.json",
        no_model: "model.onnx", no_tokenizer: "tokenizer.json", old: "earlier version",
        link: "no plain file",
    }  # fmt: skip
    for folder, word in cases.items():
        said = typed("serve", str(folder), "--port", "0", cwd=tmp_path)
        assert said.exit_code == 1 and word in said.output, said.output
        assert "Traceback" not in said.output and said.output.count("\n") == 1


def test_a_port_that_is_taken(served_package: Path, url: str) -> None:
    said = typed("serve", str(served_package), "--port", url.rpartition(":")[2], cwd=served_package)
    assert said.exit_code == 1 and "--port" in said.output
