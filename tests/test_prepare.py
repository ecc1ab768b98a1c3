"""The prepare stage: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import assert_refused, make_project, questions, refused, run_stage, write_rows

from stages.prepare import for_evaluation, main

GOOD = b'{"prompt": "Hi", "response": "Hello"}\n'
OUT = Path("data/prepared/travel")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("prepare"))


def prepare(project: Path):
    return run_stage(project, "prepare", "--adapter", "travel")


def in_vain(project: Path, *parts: str) -> None:
    refused(project, lambda params: main(params, "travel"), *parts)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def test_writes_both_sides_calibration_and_report(project):
    rows = questions(60)
    write_rows(project / "data/travel.jsonl", [*rows, rows[0], rows[1] | {"response": "Far."}])
    done = prepare(project)
    assert done.returncode == 0, done.stderr
    assert "62 rows, 1 repeated, 1 prompts with several responses" in done.stdout
    train, held_out = lines(project / OUT / "train.jsonl"), lines(project / OUT / "eval.jsonl")
    assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in held_out)
    assert len(train) + len(held_out) == 61
    assert all(for_evaluation(row["prompt"], 10) for row in held_out)
    assert train[0]["text_prompt"] == f"<|user|>{train[0]['prompt']}<|end|><|assistant|>"
    assert train[0]["text_response"] == f"{train[0]['response']}<|end|>"
    calibration = [row["text"] for row in lines(project / OUT / "calibration.jsonl")]
    assert set(calibration) <= {r["text_prompt"] + r["text_response"] for r in train}
    report = json.loads((project / OUT / "report.json").read_text())
    # One token a byte, and 4 special tokens.
    lengths = [len(r["prompt"] + r["response"]) + 4 for r in [*train, *held_out]]
    assert report["tokens"]["max"] == max(lengths)
    assert report["tokens"]["min"] == min(lengths)
    assert report["train"] == len(train)
    assert report["prompt_template"] == "<|user|>{prompt}<|end|><|assistant|>"
    assert (project / "models/lineage/prepare@travel.json").exists()


def test_rows_with_unicode_line_separators_reach_training_and_evaluation(project):
    from transformers import AutoTokenizer

    from stages.evaluate import choose
    from stages.finetune import encode

    odd = [{"prompt": f"How\u2028far{i}\u0085?", "response": f"It is\u2029{i}."} for i in range(60)]
    write_rows(project / "data/travel.jsonl", odd)
    done = prepare(project)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(project / "models/base")
    sequences, _ = encode(project / OUT / "train.jsonl", tokenizer, 256)
    held_out = choose(project / OUT / "eval.jsonl", 60)
    assert len(sequences) + len(held_out) == 60
    assert all("\u2028" in row["prompt"] and "\u2029" in row["response"] for row in held_out)
    assert "\u2028" in tokenizer.decode(sequences[0])


def test_new_rows_move_no_old_one():
    few, many = ({p: for_evaluation(p, 10) for p in map(str, range(n))} for n in (500, 2000))
    assert few.items() <= many.items()
    assert 150 < sum(many.values()) < 250


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b"prompt,response\n", "data/travel.jsonl:2: not JSON"),
        (GOOD + b'{"question": "a", "response": "b"}\n', "data/travel.jsonl:2: no column 'prompt'"),
        (GOOD + b'{"prompt": "a", "response": ""}\n', "data/travel.jsonl:2: column 'response'"),
        (GOOD + b'{"prompt": "a", "response": 3}\n', "data/travel.jsonl:2: column 'response'"),
        (GOOD + b'{"prompt": "\xe9"}\n', "data/travel.jsonl:2: not UTF-8 at byte 50"),
        (b"", "data/travel.jsonl: no rows"),
    ],
)
def test_bad_rows_are_refused_and_what_was_there_stays(project, content, message):
    (project / "data/travel.jsonl").write_bytes(content)
    (project / OUT).mkdir(parents=True, exist_ok=True)
    (project / OUT / "kept").touch()
    in_vain(project, message)
    assert (project / OUT / "kept").exists()


def test_long_row_is_named_with_its_length_and_the_limit(project):
    long = [{"prompt": "a" * 200, "response": "b" * 200}]
    write_rows(project / "data/travel.jsonl", questions(3) + long)
    message = "data/travel.jsonl:4: 404 tokens, and the base model takes 256"
    in_vain(project, message)


def test_split_without_rows_says_how_many_are_needed(project):
    write_rows(project / "data/travel.jsonl", [{"prompt": "a", "response": "b"}])
    message = "none of 1 rows is in the eval split, chosen by a hash (prepare.eval_percent is 10)"
    in_vain(project, message, "about 44 rows are needed")


def test_chat_template_that_is_missing(tmp_path):
    project = make_project(tmp_path)
    write_rows(project / "data/travel.jsonl", questions(3))
    (project / "models/base/chat_template.jinja").unlink()
    in_vain(project, "no chat template; set prepare.template")


def test_unknown_adapter_and_missing_data(project):
    done = run_stage(project, "prepare", "--adapter", "nope")
    assert_refused(project, done, "adapters.nope: no such adapter")
    (project / "data/travel.jsonl").unlink()
    in_vain(project, "data/travel.jsonl: not found")
    (project / "data/travel.jsonl").mkdir()
    in_vain(project, "data/travel.jsonl: is a folder")
    shutil.rmtree(project / "data/travel.jsonl")
