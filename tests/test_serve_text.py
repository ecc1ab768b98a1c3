"""How the server chooses tokens and makes text of them, against the equations."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from serve.errors import ApiError
from serve.sampling import Sampler
from serve.text import Text, Writer
from stages import template
from stages.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = np.random.default_rng(0).normal(0, 2, 1000).astype(np.float32)


def probabilities(temperature: float) -> np.ndarray:
    weights = np.exp(LOGITS.astype(np.float64) / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_likely(temperature: float) -> None:
    sampler = Sampler(temperature, seed=1)
    drawn = np.bincount([sampler.choose(LOGITS).token for _ in range(4000)], minlength=1000) / 4000
    expected = probabilities(temperature)
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(drawn - expected) < 5 * error + 1e-3).all()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_draws_from_the_fewest_that_have_it(top_p: float) -> None:
    expected = probabilities(1.0)
    order = np.argsort(-expected, kind="stable")
    count = int(np.searchsorted(expected[order].cumsum(), top_p)) + 1
    sampler = Sampler(1.0, top_p, seed=1)
    drawn = {sampler.choose(LOGITS).token for _ in range(3000)}
    assert drawn <= set(order[:count].tolist())
    if count < 40:
        assert drawn == set(order[:count].tolist())


def test_penalties_and_bias() -> None:
    """score + bias - frequency * count - presence * (count > 0), and its probability is told."""
    scores = np.array([2.0, 1.93, 1.81, 0.0], np.float32)
    sampler = Sampler(
        presence_penalty=0.05,
        frequency_penalty=0.1,
        bias=(np.array([3]), np.array([1.95], np.float32)),
        top_logprobs=4,
    )
    now = scores + np.array([0, 0, 0, 1.95], np.float32)
    for _ in range(8):
        choice = sampler.choose(scores)
        assert choice.token == int(now.argmax())
        total = np.log(np.exp(now.astype(np.float64)).sum())
        assert choice.logprob == pytest.approx(now[choice.token] - total, abs=1e-5)
        assert [token for token, _ in choice.top] == np.argsort(-now, kind="stable").tolist()
        first = now[choice.token] == (scores + np.array([0, 0, 0, 1.95], np.float32))[choice.token]
        now[choice.token] -= 0.1 + 0.05 * first
    assert (scores == np.array([2.0, 1.93, 1.81, 0.0], np.float32)).all()


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_stop_texts_cut_at_the_first(text: str, stops: list[str]) -> None:
    """What is given out, letter by letter, is what is before the first stop."""
    writer = Writer(None, stops)  # type: ignore[arg-type]
    said = ""
    for letter in text:
        said += writer._given(letter)
        if writer.stopped:
            break
    if not writer.stopped:
        said += writer.rest()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert said == text and not writer.stopped
    else:
        seen = text[: min(ends)]  # what had come when the first was complete
        assert writer.stopped
        assert said == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_scores_that_are_no_numbers_are_an_error() -> None:
    for scores in (np.full(5, np.nan, np.float32), np.full(5, np.inf, np.float32)):
        with pytest.raises(ValueError, match="no numbers"):
            Sampler().choose(scores)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-38, 1e-6, 1e-3])
def test_cold_is_the_likeliest(temperature: float) -> None:
    assert Sampler(temperature, top_p=0.9, seed=0).choose(LOGITS).token == int(LOGITS.argmax())


def test_tokens_that_are_bytes() -> None:
    """With a token for each byte, as Llama has, any sequence of them has a text."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "b"]
    tokenizer = Tokenizer(
        models.BPE(vocab={it: i for i, it in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    text = "é = ü"
    said = Writer(tokenizer, [])
    assert "".join(said.add(2 + byte) for byte in text.encode()) == text
    random = np.random.default_rng(0)
    for _ in range(300):
        writer = Writer(tokenizer, [])
        for token in random.integers(2, len(pieces), 12):
            assert isinstance(writer.add(int(token)), str)


def test_text_of_a_custom_template(served_package: Path, tmp_path: Path) -> None:
    """An adapter that was taught with a text of its own is asked with it, the base is not."""
    folder = tmp_path / "package"
    shutil.copytree(served_package, folder)
    said = [{"role": "user", "content": "Where?"}]
    assert Text(folder, 256).taught is None
    (folder / "olivepress.json").write_text(json.dumps({"prompt_template": "Q: {prompt}\nA:"}))
    text = Text(folder, 256)
    assert text.conversation(said, adapted=True) == "Q: Where?\nA:"
    assert text.conversation(said, adapted=False) == "<|user|>Where?<|end|><|assistant|>"
    assert text.conversation([*said, *said], adapted=True).startswith("<|user|>")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(Exception, match="no such role"):
        Text(folder, 256).chat(said)
    for damaged in ("{% if %}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ x.y.z }}"):
        (folder / "chat_template.jinja").write_text(damaged)
        with pytest.raises(Exception, match="template"):
            Text(folder, 256).chat(said)


POWER = "{% set n = 10 %}{{ n ** (9**9) }}"
LONG = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
AT_WHERE = "{% if messages[0].content == 'Where?' %}HARM{% endif %}{{ messages[0].content }}"


@pytest.mark.parametrize("harm", [LONG, POWER, "{{ 'a'|center(10**10) }}"])
def test_a_template_without_end_stops_neither_start_nor_others(
    served_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """In whatever thread it is rendered, and whether it always takes so long or at times."""
    monkeypatch.setattr(template, "SECONDS", 1)
    folder = Path(shutil.copytree(served_package, tmp_path / "package"))
    (folder / "chat_template.jinja").write_text(harm)
    with pytest.raises(UserError, match="chat template refuses a question: it takes more than"):
        Text(folder, 256)
    (folder / "chat_template.jinja").write_text(AT_WHERE.replace("HARM", harm))
    with ThreadPoolExecutor() as threads:
        text = Text(folder, 256)
        for _ in range(2):
            with pytest.raises(ApiError, match="refuses these messages: it takes more than"):
                threads.submit(text.chat, [{"role": "user", "content": "Where?"}]).result()
            assert text.chat([{"role": "user", "content": "Who?"}]) == "Who?"
