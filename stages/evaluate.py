"""Measure one adapter on its evaluation rows, before and after each step, and check the gates."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.gates import OF_EVALUATE, check_gates
from stages.measure import MEASURED, finite, known_text, size_mb
from stages.params import Evaluate, Params
from stages.rows import read_prepared
from stages.stage import (
    ADAPTERS,
    BASE,
    METRICS,
    ONNX,
    PLOTS,
    PREPARED,
    QUANTIZED,
    TORCH_MB,
    new_output,
    progress,
    read_json,
    run,
    write_json,
)
from stages.tokenizer import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.generation import Session
    from stages.scoring import Example

# As they come in the pipeline; each is scored on the same rows.
MODELS = ["base", "quantized", "quantized_lora", "onnx_off", "onnx_on"]
ANSWERS = 3
FLOAT_TOKENS = 16  # a second each at four billion weights


def main(params: Params, adapter: str) -> None:
    """Write metrics/NAME.json and plots/perplexity/NAME.csv, then check params.gates.

    Perplexity and exact answers are those of stages/scoring.py; `text_perplexity` is that of
    params.evaluate.text, which the base model knows. Of the base and the quantized model, that and
    the size are what stages/measure.py found, which checks their gate too. A number that is not
    finite is null in the file. Where models/onnx is for another machine, what needs it is null, and
    `not_measured` says why.

    Raises:
        UserError: a gate is not met; the figures are written all the same.
    """
    onnx_adapter = ADAPTERS / f"{adapter}.onnx_adapter"
    rows = choose(PREPARED / adapter / "eval.jsonl", params.evaluate.max_rows)
    # Timed before torch is there to take memory and processor caches.
    timed = speed(rows[0]["text_prompt"], onnx_adapter, params.evaluate.speed_tokens)
    reason = timed.get("not_measured")
    measured = read_json(MEASURED)
    metrics: dict[str, Any] = {
        "not_measured": reason,
        "speed": None if reason else timed,
        "size_mb": measured["size_mb"] | {"onnx": size_mb(ONNX), "adapter": size_mb(onnx_adapter)},
        "prompt_template": read_json(PREPARED / adapter / "report.json")["prompt_template"],
    }
    progress(1, 4, "speed not measured" if reason else "speed measured")
    metrics |= compare(rows, adapter, params.evaluate, with_onnx=not reason)
    float_rate = metrics.pop("float_tokens_per_second")
    if metrics["speed"]:
        metrics["speed"]["float_tokens_per_second"] = float_rate
    metrics["text_perplexity"] = measured["text_perplexity"] | metrics["text_perplexity"]
    with new_output(METRICS / f"{adapter}.json") as out:
        write_json(out, finite(metrics))
    with new_output(PLOTS / "perplexity" / f"{adapter}.csv") as out:
        out.write_text(bars(metrics), "utf-8")
    print(table(metrics))
    check_gates(metrics, params.gates, adapter, OF_EVALUATE)


def choose(path: Path, max_rows: int) -> list[dict]:
    """The first rows in the order of a hash of the prompt, so that new rows change few."""
    rows = [row for _, row in read_prepared(path)]
    rows.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    return rows[:max_rows]


def speed(text: str, adapter: Path, tokens: int) -> dict:
    """What `python -m stages.generation` measures in a process of its own.

    Raises:
        UserError: it failed or was killed; says how, and the last that it said.
    """
    command = [sys.executable, "-m", "stages.generation", ONNX, adapter, tokens]
    done = subprocess.run(
        [*map(str, command)], input=text.encode(), capture_output=True, check=False
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    end = f"exit code {done.returncode}"
    if done.returncode < 0:
        end = f"ended by {signal.Signals(-done.returncode).name}"
    raise UserError(f"{ONNX} does not run: {said[-1]} ({end})")


def bars(metrics: dict) -> str:
    """CSV of the perplexities that were measured and are finite."""
    rows = [(name, metrics[name]["perplexity"]) for name in MODELS if metrics[name]]
    lines = [f"{name},{perplexity}" for name, perplexity in rows if math.isfinite(perplexity)]
    return "\n".join(["model,perplexity", *lines, ""])


def compare(rows: list[dict], adapter: str, params: Evaluate, with_onnx: bool) -> dict:
    """Scores of the five `MODELS`, agreement of the last PyTorch one with ONNX, some answers.

    Raises:
        UserError: the adapter cannot be switched on and off.
    """

    from passes.lora import load_adapted
    from stages.scoring import encode, score, torch_logits, torch_tokens_per_second

    tokenizer = load(BASE)
    examples = encode(tokenizer, rows)
    figures: dict[str, Any] = {"rows": len(rows), "text_perplexity": {"onnx_off": None}}

    base = load_adapted(BASE, None)
    figures["base"] = score(examples, torch_logits(base, examples))
    figures["answers"] = answers(base, tokenizer, rows[:ANSWERS], params.max_new_tokens)
    figures["float_tokens_per_second"] = None
    if base.device.type == "cpu":  # as the ONNX model
        tokens = min(FLOAT_TOKENS, params.speed_tokens)
        rate = torch_tokens_per_second(base, examples[0].ids[: examples[0].start], tokens)
        figures["float_tokens_per_second"] = round(rate, 1)
    del base
    progress(2, 4, "base model scored")

    adapted: Any = load_adapted(QUANTIZED, ADAPTERS / adapter)
    with adapted.disable_adapter():
        figures["quantized"] = score(examples, torch_logits(adapted, examples))
    progress(3, 4, "quantized model scored")

    if not with_onnx:
        figures["quantized_lora"] = score(examples, torch_logits(adapted, examples))
        return figures | dict.fromkeys(["onnx_off", "onnx_on", "agreement"])
    from stages.generation import Session
    from stages.scoring import onnx_logits

    plain = Session(ONNX, {})
    figures["onnx_off"] = score(examples, onnx_logits(plain, examples, None))
    text = known_text(params, tokenizer)
    on_text = score(text, onnx_logits(plain, text, None))["perplexity"]
    figures["text_perplexity"]["onnx_off"] = on_text
    session = Session(ONNX, {adapter: ADAPTERS / f"{adapter}.onnx_adapter"})
    check_switch(plain, session, examples[0], adapter)
    figures |= side_by_side(adapted, session, examples, adapter)
    prompts = [row["text_prompt"] for row in rows]
    ids = tokenizer(prompts, add_special_tokens=False).input_ids
    same = sum(session.encode(text) == own for text, own in zip(prompts, ids, strict=True))
    figures["agreement"]["tokenizer"] = round(same / len(rows), 4)
    for answer, prompt in zip(figures["answers"], prompts, strict=False):
        for name, which in (("onnx_off", None), ("onnx_on", adapter)):
            answer[name] = "".join(session.stream_text(prompt, which, params.max_new_tokens))
    progress(4, 4, "ONNX model scored")
    return figures


def check_switch(plain: Session, session: Session, example: Example, adapter: str) -> None:
    """The adapter changes the scores, and switched off again it leaves no trace.

    Args:
        plain: the model without adapters.
        session: the same model with the adapter loaded.
        example: what both are given.
        adapter: its name in `session`.

    Raises:
        UserError: one of the two does not hold.
    """
    expected, on = plain.logits(example.ids), session.logits(example.ids, adapter)
    if (on == expected).all():
        raise UserError(f"adapter {adapter} changes nothing: look at finetune@{adapter}")
    if (session.logits(example.ids) != expected).any():
        raise UserError(
            f"{ONNX}: with adapter {adapter} off the base's own scores do not come back"
        )


def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict], max_new_tokens: int
) -> list[dict[str, str]]:
    """Prompts, the answers expected, and a transformers model's greedy ones."""
    found = []
    for row in rows:
        ids = tokenizer(row["text_prompt"], add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
        text = str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
        found.append({"prompt": row["prompt"], "expected": row["response"], "base": text})
    return found


def side_by_side(adapted: Any, session: Session, examples: list[Example], adapter: str) -> dict:
    """Scores of PyTorch (quantized + LoRA) and ONNX with the adapter, and their agreement.

    Row by row, so that the scores of only one batch are in memory.
    """
    from stages.scoring import Agreement, Score, onnx_logits, torch_logits

    lora, onnx, agreement = Score(), Score(), Agreement()
    rows = zip(
        examples,
        torch_logits(adapted, examples),
        onnx_logits(session, examples, adapter),
        strict=True,
    )
    for example, p, q in rows:
        lora.add(p, example.targets)
        onnx.add(q, example.targets)
        agreement.add(p, q)
    return {
        "quantized_lora": lora.figures(),
        "onnx_on": onnx.figures(),
        "agreement": agreement.figures(),
    }


def table(metrics: dict) -> str:
    """What a person wants to see first, as text in columns."""
    lines = [f"{'':16}{'perplexity':>12}{'exact answers':>15}{'on known text':>15}"]
    for name in filter(metrics.get, MODELS):
        row, known = metrics[name], metrics["text_perplexity"].get(name)
        lines.append(
            f"{name:16}{row['perplexity']:12.3f}{row['exact_answer_rate']:15.1%}"
            + (f"{known:15.3f}" if known is not None else "")
        )
    if metrics["not_measured"]:
        return "\n".join([*lines, f"onnx not measured: {metrics['not_measured']}"])
    agreement, speed = metrics["agreement"], metrics["speed"]
    lines.append(
        f"PyTorch and ONNX choose the same token: {agreement['top1']:.1%}, "
        f"and their tokenizers cut prompts alike: {agreement['tokenizer']:.1%}"
    )
    lines.append(
        f"{speed['adapter_on']['tokens_per_second']:,.0f} tokens/s, first after "
        f"{speed['adapter_on']['time_to_first_token_ms']:.0f} ms, {speed['peak_rss_mb']:,.0f} MB"
    )
    if slower_than_float(speed):
        lines.append(
            f"the float model makes {speed['float_tokens_per_second']:,.1f} tokens/s in PyTorch: "
            "on this machine the exported model is the slower one"
        )
    return "\n".join(lines)


def slower_than_float(speed: dict) -> bool:
    """Whether the exported model, adapter off, makes fewer tokens a second than the float one."""
    rate = speed["float_tokens_per_second"]
    return rate is not None and speed["adapter_off"]["tokens_per_second"] < rate


if __name__ == "__main__":
    run(main, "evaluate", TORCH_MB)
