"""Reading JSON Lines, and rendering rows with chat templates of several families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.rows import Row, read_calibration, read_prepared, read_rows, render, unique
from tests.models import save_tokenizer

GOOD = b'{"prompt": "Hi", "response": "Hello"}\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def read(path: Path, content: bytes) -> list[Row]:
    path.write_bytes(content)
    return read_rows(path, "prompt", "response", "adapters.travel")


def test_tolerates_what_editors_write(tmp_path):
    """A byte order mark, CRLF, blank lines, other columns and no final newline."""
    content = (
        b'\xef\xbb\xbf{"prompt": "Hi", "response": "Hello", "id": 7}\r\n\r\n'
        b'{"prompt": "\xe2\x80\xa8", "response": "b"}\n\n'.replace(
            b"\xe2\x80\xa8", b"a\xe2\x80\xa8"
        )
        + b'{"prompt": "c", "response": "d"}'
    )
    rows = read(tmp_path / "rows.jsonl", content)
    assert rows == [Row(1, "Hi", "Hello"), Row(3, "a\u2028", "b"), Row(5, "c", "d")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'prompt': 1}", "not JSON at column 2"),
        (b"[", "expected one object a line"),
        (b"[1]", "a list and not an object"),
        (b"null", "null and not an object"),
        (b'{"Prompt": "a", "response": "b"}', "no column 'prompt', did you mean 'Prompt'?"),
        (b'{"a": "b"}', "no column 'prompt'; it has a (adapters.travel.prompt_column in"),
        (b'{"prompt": 5, "response": "b"}', "column 'prompt' holds a number and not text"),
        (b'{"prompt": "a", "response": null}', "column 'response' holds null and not text"),
        (b'{"prompt": "", "response": "b"}', "column 'prompt' is empty"),
        (b'{"prompt": "a", "response": " \\n"}', "column 'response' is blank"),
        (b'{"prompt": "a\\ud800", "response": "b"}', "column 'prompt' holds half a character at 1"),
        (b'{"prompt": "\xff", "response": "b"}', "not UTF-8 at byte 50 of the file"),
        (b"\xff\xfe{", "UTF-16; save the file as UTF-8"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_names_file_line_and_fault(tmp_path, line, message):
    with pytest.raises(UserError) as error:
        read(tmp_path / "rows.jsonl", GOOD + line + b"\n" + GOOD)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert message in str(error.value)


def test_columns_that_no_parameter_names_are_not_said_to_be_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": "b"}')
    with pytest.raises(UserError, match=r"no column 'prompt'; it has a$"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x1c", "\v", "\f"])
def test_only_newlines_end_a_row(tmp_path, separator):
    """str.splitlines ends a line at these too, and JSON allows the first three inside text."""
    row = {"text": f"a{separator}b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    assert read_prepared(tmp_path / "rows.jsonl") == [(1, row)]


def test_ten_faults_are_shown_and_the_rest_counted(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "rows.jsonl", b"?\n" * 13 + GOOD)
    lines = str(error.value).splitlines()
    assert lines[9].startswith(f"{tmp_path}/rows.jsonl:10: ")
    assert lines[10:] == [f"{tmp_path}/rows.jsonl: and 3 more rows like these"]


def test_no_rows_no_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        read(tmp_path / "rows.jsonl", b"\n \n")
    with pytest.raises(UserError, match="not found"):
        read_rows(tmp_path / "none.jsonl", "prompt", "response")
    with pytest.raises(UserError, match="is a folder"):
        read_rows(tmp_path, "prompt", "response")


def test_repeats_go_and_several_answers_stay():
    rows = [Row(1, "a", "b"), Row(2, "a", "c"), Row(3, "a", "b"), Row(4, "d", "b")]
    assert unique(rows) == [Row(1, "a", "b"), Row(2, "a", "c"), Row(4, "d", "b")]


def test_chat_ends_where_generation_stops(tokenizer):
    prompt, response = render(tokenizer, "chat", "Hi", "Hello")
    assert (prompt, response) == ("<|user|>Hi<|end|><|assistant|>", "Hello<|end|>")


@pytest.mark.parametrize("tail", ["<|end|>\n<|endoftext|>", "<|end|>\n", " <|end|>"])
def test_nothing_is_taught_behind_the_first_stop(tokenizer, tail, monkeypatch):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] | trim }}"
        "{% if m['role'] == 'assistant' %}" + tail + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    _, response = render(tokenizer, "chat", "Hi", " Hello ")
    assert response == "Hello" + tail[: tail.index("<|end|>")] + "<|end|>"


def test_template_that_names_no_stop_gets_one(tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert render(tokenizer, "chat", "Hi", "Hello") == ("Hi\n", "Hello\n<|endoftext|>")


def test_templates_that_cannot_teach_are_refused(tokenizer, monkeypatch):
    template = "{% if add_generation_prompt %}think:{% endif %}{{ messages[-1]['content'] }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match="otherwise than it starts one"):
        render(tokenizer, "chat", "Hi", "Hello")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match=r"set prepare\.template"):
        render(tokenizer, "chat", "Hi", "Hello")


def test_text_template_takes_braces_as_they_are(tokenizer):
    texts = render(tokenizer, "Q: {prompt}\nA: {response}.", "{response} {x} %s", "{prompt}")
    assert texts == ("Q: {response} {x} %s\nA: ", "{prompt}.<|endoftext|>")


def test_calibration_takes_texts_and_pairs(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "as it is"}\n{"prompt": "Hi", "response": "Hello"}\n')
    texts = read_calibration(path, tokenizer)
    assert texts == ["as it is", "<|user|>Hi<|end|><|assistant|>Hello<|end|>"]
    path.write_text('{"prompt": "Hi"}\n{"question": "Hi"}\n')
    with pytest.raises(UserError, match=r":1: no column 'response'.*\n.*:2: no column 'text'"):
        read_calibration(path, tokenizer)
