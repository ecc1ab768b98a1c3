"""Measure one adapter on its evaluation rows, before and after each step, and check the gates."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.params import Gates, Params
from stages.stage import (
    ADAPTERS,
    BASE,
    METRICS,
    ONNX,
    PLOTS,
    PREPARED,
    QUANTIZED,
    new_output,
    progress,
    read_json,
    run,
    write_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.generation import Session
    from stages.scoring import Example

# As they come in the pipeline; each is scored on the same rows.
MODELS = ["base", "quantized", "quantized_lora", "onnx_off", "onnx_on"]
ANSWERS = 3


def main(params: Params, adapter: str) -> None:
    """Write metrics/NAME.json and plots/perplexity/NAME.csv, then check params.gates.

    Perplexity and exact answers are those of stages/scoring.py. Sizes are of whole folders, in MB
    of 10^6 bytes.

    Raises:
        UserError: a gate is not met; the figures are written all the same.
    """
    onnx_adapter = ADAPTERS / f"{adapter}.onnx_adapter"
    rows = read_rows(PREPARED / adapter / "eval.jsonl", params.evaluate.max_rows)
    metrics: dict[str, Any] = {
        # Timed before torch is there to take memory and processor caches.
        "speed": speed(rows[0]["text_prompt"], onnx_adapter, params.evaluate.speed_tokens),
        "size_mb": {
            "base": size_mb(BASE),
            "quantized": size_mb(QUANTIZED),
            "onnx": size_mb(ONNX),
            "adapter": size_mb(onnx_adapter),
        },
        "prompt_template": read_json(PREPARED / adapter / "report.json")["prompt_template"],
    }
    progress(1, 4, "speed measured")
    metrics |= compare(rows, adapter, params.evaluate.max_new_tokens)
    with new_output(METRICS / f"{adapter}.json") as out:
        write_json(out, metrics)
    with new_output(PLOTS / "perplexity" / f"{adapter}.csv") as out:
        lines = [f"{name},{metrics[name]['perplexity']}" for name in MODELS]
        out.write_text("\n".join(["model,perplexity", *lines, ""]), "utf-8")
    print(table(metrics))
    check_gates(metrics, params.gates, adapter)


def read_rows(path: Path, max_rows: int) -> list[dict]:
    """The first rows in the order of a hash of the prompt, so that new rows change few."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    return rows[:max_rows]


def speed(text: str, adapter: Path, tokens: int) -> dict:
    """What `python -m stages.generation` measures in a process of its own."""
    command = [sys.executable, "-m", "stages.generation", ONNX, adapter, text, tokens]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{ONNX} does not run: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def size_mb(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return round(sum(p.stat().st_size for p in files) / 1e6, 3)


def compare(rows: list[dict], adapter: str, max_new_tokens: int) -> dict:
    """Scores of the five `MODELS`, agreement of the last PyTorch one with ONNX, some answers."""
    from transformers import AutoTokenizer

    from passes.lora import load_adapted
    from stages.generation import Session
    from stages.scoring import encode, onnx_logits, score, torch_logits

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    examples = encode(tokenizer, rows)
    shown = rows[:ANSWERS]

    base = load_adapted(BASE, None)
    figures: dict[str, Any] = {"rows": len(rows)}
    figures["base"] = score(examples, torch_logits(base, examples))
    answers = torch_answers(base, tokenizer, shown, max_new_tokens)
    del base
    progress(2, 4, "base model scored")

    adapted: Any = load_adapted(QUANTIZED, ADAPTERS / adapter)
    with adapted.disable_adapter():
        figures["quantized"] = score(examples, torch_logits(adapted, examples))
    progress(3, 4, "quantized model scored")

    session = Session(ONNX, {adapter: ADAPTERS / f"{adapter}.onnx_adapter"})
    figures["onnx_off"] = score(examples, onnx_logits(session, examples, None))
    figures |= side_by_side(adapted, session, examples, adapter)
    texts = [row["text_prompt"] for row in rows]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    same = sum(session.encode(text) == own for text, own in zip(texts, ids, strict=True))
    figures["agreement"]["tokenizer"] = round(same / len(rows), 4)
    figures["answers"] = [
        {
            "prompt": row["prompt"],
            "expected": row["response"],
            "base": before,
            "onnx_off": "".join(session.stream_text(row["text_prompt"], None, max_new_tokens)),
            "onnx_on": "".join(session.stream_text(row["text_prompt"], adapter, max_new_tokens)),
        }
        for row, before in zip(shown, answers, strict=True)
    ]
    progress(4, 4, "ONNX model scored")
    return figures


def torch_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict], max_new_tokens: int
) -> list[str]:
    """Greedy answers of a transformers model."""
    answers = []
    for row in rows:
        ids = tokenizer(row["text_prompt"], add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
        text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        answers.append(str(text))
    return answers


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
    lines = [f"{'':16}{'perplexity':>12}{'exact answers':>15}"]
    for name in MODELS:
        row = metrics[name]
        lines.append(f"{name:16}{row['perplexity']:12.3f}{row['exact_answer_rate']:15.1%}")
    agreement, speed = metrics["agreement"], metrics["speed"]
    lines.append(f"PyTorch and ONNX choose the same token: {agreement['top1']:.1%}")
    lines.append(
        f"{speed['adapter_on']['tokens_per_second']:,.0f} tokens/s, first after "
        f"{speed['adapter_on']['time_to_first_token_ms']:.0f} ms, {speed['peak_rss_mb']:,.0f} MB"
    )
    return "\n".join(lines)


def check_gates(metrics: dict, gates: Gates, adapter: str) -> None:
    """Raise a UserError that names every gate that is not met, and the stage to look at."""

    def ratio(one: str, other: str) -> float:
        return metrics[one]["perplexity"] / metrics[other]["perplexity"]

    checks = [
        ("max_quantized_perplexity_ratio", ratio("quantized", "base"), "quantize"),
        ("max_adapter_perplexity_ratio", ratio("onnx_on", "onnx_off"), f"finetune@{adapter}"),
        (
            "min_top1_agreement",
            metrics["agreement"]["top1"],
            f"export (lm_head, accuracy_level) or convert@{adapter}",
        ),
        (
            "min_exact_answer_rate",
            metrics["onnx_on"]["exact_answer_rate"],
            f"finetune@{adapter}",
        ),
    ]
    failed = []
    for name, value, stage in checks:
        limit = getattr(gates, name)
        least = name.startswith("min_")
        # `not >=` and not `<`: a perplexity that is no number must fail too.
        if limit is not None and not (value >= limit if least else value <= limit):
            failed.append(
                f"gates.{name}: {value:.4f}, and at {'least' if least else 'most'} {limit} is "
                f"wanted; look at {stage}"
            )
    if failed:
        raise UserError("\n".join(failed))


if __name__ == "__main__":
    run(main, "evaluate")
