"""The figures of evaluate, against their definitions and against greedy decoding."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch

from stages.card import shown
from stages.errors import UserError
from stages.evaluate import bars, check_switch, choose, finite, speed, table
from stages.gates import check_gates, judge
from stages.params import Gates
from stages.scoring import Agreement, Example, Score, batches, encode, excerpts, score, torch_logits
from tests.models import save_model, save_tokenizer, token_sequences


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path_factory.mktemp("model"), "phi3")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def by_length(lengths: list[int]) -> list[Example]:
    ids = token_sequences(len(lengths), max(lengths))
    return [Example(row[:n], n // 2) for row, n in zip(ids, sorted(lengths), strict=True)]


def test_batches_hold_every_row_once_and_no_more_than_their_share():
    examples = by_length([2, 700, 700, 700, 30, 5000])
    groups = list(batches(examples))
    assert [e for group in groups for e in group] == examples
    assert [len(group) for group in groups] == [2, 2, 1, 1]


def test_padding_and_batching_change_nothing(model):
    examples = by_length([4, 9, 30, 31, 200])
    together = list(torch_logits(model, examples))
    for example, logits in zip(examples, together, strict=True):
        (alone,) = torch_logits(model, [example])
        assert logits.shape == (len(example.ids) - example.start, 264)
        np.testing.assert_allclose(logits, alone, atol=1e-3)


def test_perplexity_is_that_of_the_cross_entropy_over_response_tokens(model):
    examples = by_length([8, 20, 50])
    losses = []
    for example in examples:
        labels = torch.tensor([example.ids])
        labels[:, : example.start] = -100
        loss = model(input_ids=torch.tensor([example.ids]), labels=labels).loss.item()
        losses += [loss] * len(example.targets)
    figures = score(examples, torch_logits(model, examples))
    assert figures["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_exact_answers_are_what_greedy_decoding_gives(model):
    """The model's own greedy answer is exact; with its last token changed it is not."""
    prompt = token_sequences(1, 12)[0]
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
    )
    own = out[0].tolist()
    other = [*own[:-1], (own[-1] + 1) % 264]
    examples = [Example(own, 12), Example(other, 12)]
    assert score(examples, torch_logits(model, examples))["exact_answer_rate"] == 0.5


def test_agreement_is_one_and_zero_with_itself_and_kl_otherwise():
    p = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], np.float32))
    q = np.log(np.array([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1]], np.float32))
    same, other = Agreement(), Agreement()
    same.add(p, p + 5)  # logits are defined up to a constant
    other.add(p, q)
    assert same.figures() == {"top1": 1.0, "mean_kl": 0.0}
    first = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.4)
    second = 0.1 * math.log(0.1 / 0.6) + 0.8 * math.log(0.8 / 0.3)
    assert other.figures() == {"top1": 0.5, "mean_kl": round((first + second) / 2, 6)}


def test_scores_do_not_overflow():
    total = Score()
    total.add(np.array([[1e4, 0.0]], np.float32), np.array([1]))
    assert total.log_likelihood == -1e4
    assert total.figures()["perplexity"] == math.inf


def test_what_is_not_finite_is_shown_and_written_as_json():
    metrics = METRICS | {
        "quantized": {"perplexity": math.inf, "exact_answer_rate": 0.0},
        "onnx_off": {"perplexity": math.nan, "exact_answer_rate": 0.0},
    }
    written = json.loads(json.dumps(finite(metrics), allow_nan=False))
    assert written["quantized"]["perplexity"] is written["onnx_off"]["perplexity"] is None
    assert written["base"] == METRICS["base"] and written["answers"] == METRICS["answers"]
    assert bars(metrics) == "model,perplexity\nbase,2.0\nquantized_lora,3.5\nonnx_on,3.9\n"
    assert re.search(r"^quantized +inf +0\.0% +3\.000$", table(metrics), re.MULTILINE)
    assert shown(written["quantized"], "perplexity", ".3f") == "not finite"
    assert shown(written["base"], "perplexity", ".3f") == "2.000"


def test_prompt_and_response_are_encoded_apart(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    rows = [{"text_prompt": "<|user|>abc", "text_response": "d<|end|>"}]
    (example,) = encode(tokenizer, rows)
    assert (example.start, len(example.ids)) == (4, 6)


def test_excerpts_score_what_follows_in_windows(tmp_path):
    """One token a letter: what is given is not scored, nor the first token of a window."""
    tokenizer = save_tokenizer(tmp_path)
    found = excerpts(tokenizer, [("", "abcdefghij")], 100, 4)
    assert sorted((len(e.ids), e.start) for e in found) == [(2, 1), (4, 1), (4, 1)]
    found = excerpts(tokenizer, [("abcde", "fghij")], 100, 4)
    assert sorted((len(e.ids), e.start) for e in found) == [(2, 1), (4, 1)]
    found = excerpts(tokenizer, [("ab", "cd"), ("", "x"), ("a", "")], 100, 4)
    assert [(len(e.ids), e.start) for e in found] == [(4, 2)]


def test_excerpts_stop_at_the_tokens_wanted_and_do_not_depend_on_the_order(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    texts = [("ab", "cdef" * n) for n in range(1, 9)]
    found = excerpts(tokenizer, texts, 20, 512)
    assert 20 <= sum(len(e.targets) for e in found) < 20 + 32
    assert excerpts(tokenizer, texts[::-1], 20, 512) == found


def test_an_adapter_that_does_nothing_or_leaves_a_trace_is_refused():
    class Fake:
        def __init__(self, *scores: float) -> None:
            self.scores = list(scores)

        def logits(self, ids, adapter=None):
            return np.full((2, 3), self.scores.pop(0), np.float32)

    example = Example([1, 2], 1)
    check_switch(Fake(1.0), Fake(2.0, 1.0), example, "travel")
    with pytest.raises(UserError, match="adapter travel changes nothing: look at finetune@travel"):
        check_switch(Fake(1.0), Fake(1.0, 1.0), example, "travel")
    with pytest.raises(UserError, match="adapter travel off the base's own scores do not come"):
        check_switch(Fake(1.0), Fake(2.0, 1.0001), example, "travel")


def test_rows_are_the_same_ones_when_more_are_added(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(50)))
    few = choose(path, 10)
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(51)))
    assert len([row for row in choose(path, 10) if row in few]) >= 9


METRICS = {
    "base": {"perplexity": 2.0, "exact_answer_rate": 0.0},
    "quantized": {"perplexity": 3.0, "exact_answer_rate": 0.0},
    "quantized_lora": {"perplexity": 3.5, "exact_answer_rate": 0.25},
    "onnx_off": {"perplexity": 4.0, "exact_answer_rate": 0.0},
    "onnx_on": {"perplexity": 3.9, "exact_answer_rate": 0.25},
    "text_perplexity": {"base": 2.0, "quantized": 3.0, "onnx_off": 3.3},
    "agreement": {"top1": 0.9, "tokenizer": 0.75},
    "speed": {
        "adapter_on": {"tokens_per_second": 1.0, "time_to_first_token_ms": 1.0},
        "adapter_off": {"tokens_per_second": 2.0},
        "float_tokens_per_second": 1.5,
        "peak_rss_mb": 1.0,
    },
    "answers": [{"prompt": "Hi", "expected": "Hello"}],
    "not_measured": None,
}
GATES = {
    "max_quantized_perplexity_ratio": 1.25,
    "max_onnx_perplexity_ratio": 1.005,
    "max_adapter_perplexity_ratio": 0.9,
    "min_top1_agreement": 0.95,
    "min_tokenizer_agreement": 1.0,
    "min_exact_answer_rate": 0.5,
}


def only(name: str) -> Gates:
    """All gates off but one."""
    return Gates(**{**dict.fromkeys(GATES), name: GATES[name]})


def test_each_gate_names_figure_limit_and_stage():
    with pytest.raises(UserError) as error:
        check_gates(METRICS, Gates(**GATES), "travel")
    assert str(error.value).splitlines() == [
        "gates.max_quantized_perplexity_ratio: 1.5000, and at most 1.25 is wanted; "
        "look at quantize",
        "gates.max_onnx_perplexity_ratio: 1.1000, and at most 1.005 is wanted; "
        "look at export (lm_head, accuracy_level)",
        "gates.max_adapter_perplexity_ratio: 0.9750, and at most 0.9 is wanted; "
        "look at finetune@travel",
        "gates.min_top1_agreement: 0.9000, and at least 0.95 is wanted; "
        "look at export (lm_head, accuracy_level) or convert@travel",
        "gates.min_tokenizer_agreement: 0.7500, and at least 1.0 is wanted; look at tokenizer.json "
        "of the base model, which genai reads otherwise than transformers",
        "gates.min_exact_answer_rate: 0.2500, and at least 0.5 is wanted; look at finetune@travel",
    ]


def test_gates_that_are_null_are_off_and_no_number_passes_none():
    check_gates(METRICS, Gates(**dict.fromkeys(GATES)), "travel")
    for model in ("base", "quantized"):  # over an infinite base the ratio would be 0
        for value in (math.nan, math.inf):
            broken = METRICS | {"text_perplexity": METRICS["text_perplexity"] | {model: value}}
            with pytest.raises(UserError, match="ratio: no finite number, and at most"):
                check_gates(broken, only("max_quantized_perplexity_ratio"), "travel")


def test_every_gate_is_met_at_its_figure_and_not_beyond_it():
    off = dict.fromkeys(GATES)
    figures = {gate.name: gate.figure for gate in judge(METRICS, Gates(**off), "travel")}
    assert set(figures) == set(Gates.model_fields)
    for name, figure in figures.items():
        step = 0.001 if name.startswith("min_") else -0.001
        for limit, verdict in ((figure, "met"), (figure + step, "not met")):
            gates = judge(METRICS, Gates(**off | {name: limit}), "travel")
            assert {g.name: g.verdict for g in gates} == dict.fromkeys(off, "off") | {name: verdict}


def test_a_gate_on_what_was_not_measured_fails_and_says_why():
    elsewhere = METRICS | {
        **dict.fromkeys(["onnx_off", "onnx_on", "agreement", "speed"]),
        "text_perplexity": METRICS["text_perplexity"] | {"onnx_off": None},
        "not_measured": "models/onnx is for dml",
    }
    for name in list(GATES)[1:]:
        with pytest.raises(UserError, match=rf"{name}: not measured: models/onnx is for dml; run"):
            check_gates(elsewhere, only(name), "travel")
    assert table(elsewhere).splitlines()[-1] == "onnx not measured: models/onnx is for dml"


def test_table_shows_both_agreements():
    line = "choose the same token: 90.0%, and their tokenizers cut prompts alike: 75.0%"
    assert line in table(METRICS)


@pytest.mark.parametrize(("rate", "said"), [(1.9, False), (2.1, True), (None, False)])
def test_it_is_said_when_the_float_model_is_faster(rate, said):
    speed = METRICS["speed"] | {"float_tokens_per_second": rate}
    assert (f"the float model makes {rate}" in table(METRICS | {"speed": speed})) == said


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", r"does not run: it said nothing \(ended by SIGKILL\)"),
        ("exit 7", r"does not run: it said nothing \(exit code 7\)"),
        ("echo a >&2; echo b >&2; exit 1", r"does not run: b \(exit code 1\)"),
    ],
)
def test_a_timing_that_ends_badly_says_how(tmp_path, monkeypatch, script, message):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(UserError, match=message):
        speed("Hi", tmp_path / "x.onnx_adapter", 4)
