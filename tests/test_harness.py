"""lm_eval's tasks on the ONNX model and on PyTorch's, with tasks and data made here."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from exported import Lab

from conftest import typed
from tests.tiny import write_rows

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the extra lm-eval is not installed: pip install -c requirements.lock -e '.[lm-eval]'",
)
pytestmark = pytest.mark.usefixtures("one_thread")
PER_TOKEN = 1e-3  # nats, between PyTorch and ONNX in float32 on the same quantized weights
CONTEXT = 256  # tokens, of the tiny model; one token a byte
PAIRS = [
    ("The sky is", " blue"),
    ("The sky is ", "blue"),  # spaces at the end go to the continuation
    ("", "blue"),
    ("Line\n", "x"),
    ("é", "ü"),
    ("far " * 200, "too long for the context"),
    ("a", "b" * (CONTEXT - 1)),
]


@pytest.fixture(scope="module")
def tiny(labs) -> Lab:
    return labs("phi3")


@pytest.fixture(scope="module")
def torch_lm(tiny):
    return make_torch(tiny, None)


@pytest.fixture(scope="module")
def onnx_lm(tiny):
    return make_onnx(tiny, None)


def make_torch(tiny: Lab, adapter: Path | None, batch_size: int = 3):
    from passes.lora import load_adapted
    from stages.harness import TorchLM

    return TorchLM(load_adapted(tiny.quantized, adapter), tiny.folder / "base", batch_size)


def make_onnx(tiny: Lab, adapter: str | None):
    from stages.harness import OnnxLM, Session

    session = Session(tiny.onnx, {"mine": tiny.converted})
    return OnnxLM(session, tiny.folder / "base", adapter)


def ask(lm, kind: str, *args: tuple) -> list:
    """What the harness does with requests of one kind."""
    return getattr(lm, kind)([SimpleNamespace(args=a) for a in args])


def tokens(text: str) -> int:
    return len(text.encode())


def likeliest(lm, context: str) -> str:
    logits = lm._model_call(torch.tensor([lm.tok_encode(context)]))
    return lm.tokenizer.decode(int(logits[0, -1].argmax()))


@needs_extra
def test_loglikelihoods_and_greedy_flags_are_those_of_pytorch(torch_lm, onnx_lm):
    pairs = [*PAIRS, *((c, likeliest(torch_lm, c)) for c in map(str, range(40)))]
    # A byte of a longer character is no text of its own, nor is an unused row of the vocabulary.
    pairs = [pair for pair in pairs if pair[1] and "�" not in pair[1]]
    expected, found = (ask(lm, "loglikelihood", *pairs) for lm in (torch_lm, onnx_lm))
    for pair, (p, p_greedy), (q, q_greedy) in zip(pairs, expected, found, strict=True):
        assert q == pytest.approx(p, abs=PER_TOKEN * (tokens(pair[1]) + 1)), pair  # a space more
        assert q_greedy == p_greedy, pair
    assert {greedy for _, greedy in found} == {True, False}
    assert onnx_lm.max_length == torch_lm.max_length == CONTEXT


@needs_extra
def test_loglikelihood_is_its_definition(onnx_lm):
    from stages.scoring import log_softmax

    context, continuation = b"The sky is", b" blue"
    ids = onnx_lm.tok_encode((context + continuation).decode())
    assert len(ids) == len(context + continuation)
    scores = log_softmax(onnx_lm._session.logits(ids))
    expected = sum(scores[t - 1, ids[t]] for t in range(len(context), len(ids)))
    wholes = ask(onnx_lm, "loglikelihood", ("The sky is", " blue"), ("The sky is ", "blue"))
    assert [value for value, _ in wholes] == pytest.approx([expected] * 2, abs=1e-3)


@needs_extra
def test_a_long_context_loses_its_beginning(onnx_lm):
    end = " done"
    long = "".join(str(i % 10) for i in range(700))
    kept = long[-(CONTEXT + 1 - len(end)) :]  # the last token of all is not read, only scored
    whole, cut, less = ask(onnx_lm, "loglikelihood", (long, end), (kept, end), (kept[5:], end))
    assert whole == cut != less


@needs_extra
def test_a_text_is_scored_whole_in_windows(torch_lm, onnx_lm):
    from stages.scoring import log_softmax

    short, long = "It rains.", "All roads lead to Rome. " * 30
    assert tokens(long) > 2 * CONTEXT
    expected, found = (
        ask(lm, "loglikelihood_rolling", (short,), (long,), (short * 9,))
        for lm in (torch_lm, onnx_lm)
    )
    for text, p, q in zip((short, long, short * 9), expected, found, strict=True):
        assert q == pytest.approx(p, abs=PER_TOKEN * tokens(text))
    ids = [onnx_lm.tokenizer.eos_token_id, *onnx_lm.tok_encode(short)]
    scores = log_softmax(onnx_lm._session.logits(ids))
    by_hand = sum(scores[t - 1, ids[t]] for t in range(1, len(ids)))
    assert found[0] == pytest.approx(by_hand, abs=1e-3)


@needs_extra
def test_an_adapter_changes_both_models_alike(tiny, onnx_lm):
    plain = ask(onnx_lm, "loglikelihood", *PAIRS)
    expected = ask(make_torch(tiny, tiny.adapter), "loglikelihood", *PAIRS)
    found = ask(make_onnx(tiny, "mine"), "loglikelihood", *PAIRS)
    for pair, (off, _), (p, _), (q, _) in zip(PAIRS, plain, expected, found, strict=True):
        assert q == pytest.approx(p, abs=PER_TOKEN * (tokens(pair[1]) + 1)), pair
        assert abs(q - off) > 0.1, pair


@needs_extra
def test_answers_end_before_the_first_stop_and_at_their_length(torch_lm, onnx_lm, monkeypatch):
    context = "Say something"
    made = []
    generate = onnx_lm._session.tokens

    def counted(*args):
        for token in generate(*args):
            made.append(token)
            yield token

    monkeypatch.setattr(onnx_lm._session, "tokens", counted)
    (free,) = ask(onnx_lm, "generate_until", (context, {"until": [], "max_gen_toks": 40}))
    count = len(made)
    made.clear()
    stop = free[len(free) // 2]
    options = {"until": ["\0never", stop], "max_gen_toks": 40}
    answers = [ask(lm, "generate_until", (context, options)) for lm in (torch_lm, onnx_lm, onnx_lm)]
    assert answers == [[free.partition(stop)[0]]] * 3
    assert 2 < len(made) < 2 * count - 2, "went on after the stop"
    made.clear()
    short = {"until": [], "max_gen_toks": 7}
    assert ask(onnx_lm, "generate_until", (context, short)) == ask(
        torch_lm, "generate_until", (context, short)
    )
    assert len(made) == 7
    # A context that leaves no room for 40 tokens loses its beginning.
    long, kept = "0123456789" * 50, ("0123456789" * 50)[-(CONTEXT - 40) :]
    first, second = ask(onnx_lm, "generate_until", (long, options), (kept, options))
    assert first == second


def write_task(folder: Path, name: str, rows: list[dict], **config: object) -> None:
    """A task file and its data; what datasets makes of the data stays in the folder too."""
    data = write_rows(folder / f"{name}.jsonl", rows)
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | config))


@pytest.fixture(scope="module")
def project(tiny, onnx_lm, tmp_path_factory) -> Path:
    """A project with the tiny model's outputs, and tasks in tasks/."""
    root = tmp_path_factory.mktemp("project")
    (root / ".dvc").mkdir()
    for name, made in (("base", "base"), ("quantized", "q"), ("onnx", "onnx")):
        shutil.copytree(tiny.folder / made, root / "models" / name)
    shutil.copytree(tiny.adapter, root / "models/adapters/mine")
    shutil.copy(tiny.converted, root / "models/adapters/mine.onnx_adapter")
    folder = root / "mine"
    folder.mkdir()
    choices = [
        {"q": f"{i} and", "choices": [" one", " two", " six"], "label": i % 3} for i in range(6)
    ]
    accuracy = [{"metric": "acc"}]
    write_task(
        folder,
        "choice",
        choices,
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="{{choices}}",
        doc_to_target="label",
        target_delimiter="",
        metric_list=accuracy,
    )
    write_task(
        folder,
        "text",
        [{"text": "It rains on the plain."}, {"text": "To be or not."}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "word_perplexity"}],
    )
    options = {"until": ["\0"], "max_gen_toks": 8, "do_sample": False}
    (right,) = ask(onnx_lm, "generate_until", ("Say A", options))
    answers = {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "exact_match"}],
    }
    rows = [{"q": "Say A", "a": right}, {"q": "Say A", "a": "no"}, {"q": "Say A", "a": "never"}]
    write_task(folder, "answer", rows, generation_kwargs=options, **answers)
    write_task(folder, "sampled", rows, generation_kwargs={"do_sample": True}, **answers)
    write_task(folder, "endless", rows, generation_kwargs={"max_gen_toks": CONTEXT}, **answers)
    write_task(folder, "lost", rows, generation_kwargs=options, **answers)
    (folder / "lost.jsonl").unlink()
    return root


def lm_eval(project: Path, *args: str):
    return typed("lm-eval", "--include-path", "mine", *args, cwd=project)


@needs_extra
def test_the_figures_of_all_three_models_as_json(project, onnx_lm):
    done = lm_eval(project, "choice", "text", "answer", "--adapter", "none", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["models"] == ["base", "quantized", "onnx"] and report["adapter"] is None
    rows = {row["metric"]: row for row in report["rows"]}
    assert {m: (r["task"], r["samples"]) for m, r in rows.items()} == {
        "acc": ("choice", 6),
        "word_perplexity": ("text", 2),
        "exact_match": ("answer", 3),
    }
    texts = ["It rains on the plain.", "To be or not."]
    lls = ask(onnx_lm, "loglikelihood_rolling", *((text,) for text in texts))
    by_hand = math.exp(-sum(lls) / sum(len(text.split()) for text in texts))
    assert rows["word_perplexity"]["values"]["onnx"] == pytest.approx(by_hand, rel=1e-6)
    assert rows["word_perplexity"]["higher_is_better"] is False
    assert rows["exact_match"]["values"]["onnx"] == pytest.approx(1 / 3)
    # Standard error of the mean of 1, 0, 0 with n - 1.
    assert rows["exact_match"]["stderr"]["onnx"] == pytest.approx(1 / 3)
    picked = 0
    for i in range(6):
        scores = ask(onnx_lm, "loglikelihood", *((f"{i} and", c) for c in (" one", " two", " six")))
        picked += max(range(3), key=lambda k: scores[k][0]) == i % 3
    assert rows["acc"]["values"]["onnx"] == pytest.approx(picked / 6)
    for row in rows.values():
        values = row["values"]
        assert row["onnx_minus_quantized"] == values["onnx"] - values["quantized"]
        assert values["onnx"] == pytest.approx(values["quantized"], rel=0.01)
    assert rows["word_perplexity"]["values"]["base"] != rows["word_perplexity"]["values"]["onnx"]


@needs_extra
def test_the_adapter_is_on_both_but_not_on_the_base(project):
    def perplexities(*args: str) -> dict[str, float]:
        done = lm_eval(project, "text", "--json", *args)
        return json.loads(done.stdout)["rows"][0]["values"]

    without, with_it = perplexities("--adapter", "none"), perplexities()
    assert with_it["base"] == without["base"]
    assert with_it["onnx"] == pytest.approx(with_it["quantized"], rel=0.01)
    assert with_it["onnx"] != pytest.approx(without["onnx"], rel=0.1)


@needs_extra
def test_the_table_in_a_pipe(project):
    which = ["--model", "onnx", "--model", "quantized"]
    said = lm_eval(project, "choice", "text", "--limit", "1", *which)
    assert said.exit_code == 0, said.output
    title, _, head, *rows = said.stdout.splitlines()
    assert title == "adapter mine on all but the base model"
    assert re.split(" {2,}", head.strip()) == [
        "task",
        "metric",
        "n",
        "quantized",
        "onnx",
        "onnx − quantized",
    ]
    cells = [re.split(" {2,}", row.strip()) for row in rows]
    assert [row[:3] for row in cells] == [
        ["choice", "acc ↑", "1"],
        ["text", "word_perplexity ↓", "1"],
    ]
    quantized, onnx, difference = map(float, cells[1][3:])
    assert difference == pytest.approx(onnx - quantized, abs=2e-4)
    assert "\x1b[" not in said.stdout + said.stderr and "Traceback" not in said.stderr


@needs_extra
@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["lost"], ["lost: the task cannot be loaded: FileNotFoundError", "dataset_kwargs"]),
        (["sampled"], ["sampled: asks for sampled answers"]),
        (["endless"], ["the model takes 256 tokens", "max tokens to generate (256)"]),
        (["text", "--adapter", "yours"], ["--adapter yours: choose one of mine, none"]),
        (["choice", "--include-path", "nowhere"], ["nowhere: no such folder"]),
    ],
)
def test_what_cannot_be_run_is_said(project, args, parts):
    done = lm_eval(project, *args)
    assert done.exit_code == 1 and not done.stdout
    for part in ["olivepress: ", *parts]:
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@needs_extra
def test_an_unknown_task_is_answered_with_the_nearest(project, monkeypatch):
    from stages import harness_tasks

    class OwnTasks(harness_tasks.TaskManager):  # reading the harness's 14,000 takes 10 s
        def __init__(self, include_path: Path, include_defaults: bool = False) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness_tasks, "TaskManager", OwnTasks)
    done = lm_eval(project, "choise")
    assert done.exit_code == 1
    assert (
        "choise: no task of the harness or of --include-path; the nearest are choice" in done.stderr
    )


@needs_extra
def test_a_model_that_is_not_built_is_named(project, tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "models").mkdir()
    shutil.copytree(project / "models/base", tmp_path / "models/base")
    done = lm_eval(tmp_path, "choice")
    assert done.exit_code == 1
    assert "models/quantized is not there yet; olivepress run makes it" in done.stderr


def test_without_the_extra_the_command_to_install_it_is_said(tmp_path, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a)
    )
    done = lm_eval(tmp_path, "choice")
    assert done.exit_code == 1
    assert "pip install -c requirements.lock -e '.[lm-eval]'" in done.stderr
