"""Split an adapter's examples into training and evaluation rows, rendered as a model reads them."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import UserError
from stages.params import Params
from stages.rows import SHOWN_PROBLEMS, Row, read_rows, render, unique
from stages.stage import BASE, PREPARED, new_output, read_json, run, write_json
from stages.tokenizer import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A row, the two texts that it is rendered to, and their length together."""

    row: Row
    text_prompt: str
    text_response: str
    tokens: int


def main(params: Params, adapter: str) -> None:
    """Write data/prepared/NAME/{train,eval,calibration}.jsonl and report.json.

    Raises:
        UserError: as `read_rows`; a row is too long; a side of the split has no row.
    """
    spec = params.adapters[adapter]
    data = Path(spec.data)
    rows = read_rows(data, spec.prompt_column, spec.response_column, f"adapters.{adapter}")
    tokenizer = load(BASE)  # 2 s, so only for rows that can be read
    examples = encode(tokenizer, params.prepare.template, unique(rows))
    check_lengths(data, examples, params.finetune.max_seq_len)
    train, held_out = split(data, examples, params.prepare.eval_percent)
    summary = report(rows, examples, train, held_out)
    summary["prompt_template"] = prompt_template(tokenizer, params.prepare.template)
    with new_output(PREPARED / adapter) as out:
        out.mkdir()
        write_rows(out / "train.jsonl", map(as_row, train))
        write_rows(out / "eval.jsonl", map(as_row, held_out))
        texts = (e.text_prompt + e.text_response for e in train)
        chosen = sorted(texts, key=digest)[: params.prepare.calibration_rows]
        write_rows(out / "calibration.jsonl", ({"text": text} for text in chosen))
        write_json(out / "report.json", summary)
    tokens = summary["tokens"]
    print(
        f"{data}: {summary['rows']} rows, {summary['duplicates_removed']} repeated, "
        f"{summary['prompts_with_several_responses']} prompts with several responses"
    )
    print(
        f"{summary['train']} rows to train on, {summary['eval']} to evaluate on; "
        f"tokens: median {tokens['median']}, 95% {tokens['p95']}, longest {tokens['max']}"
    )


def prompt_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The text that a model is given, with {prompt} where the question goes."""
    text = render(tokenizer, template, "{prompt}", "-")[0]
    if text.count("{prompt}") != 1:
        raise UserError(
            "the tokenizer's chat template does not write a question once and as it is; set "
            "prepare.template to a text with {prompt} and {response}"
        )
    return text


def encode(tokenizer: PreTrainedTokenizerBase, template: str, rows: list[Row]) -> list[Example]:
    """Render every row and count its tokens, the prompt's and the response's apart.

    Apart, because that is how training reads them: a token never spans the two.
    """
    texts = [render(tokenizer, template, row.prompt, row.response) for row in rows]
    halves = [text for pair in texts for text in pair]
    ids = tokenizer(halves, add_special_tokens=False, return_attention_mask=False).input_ids
    return [
        Example(row, *pair, len(ids[2 * i]) + len(ids[2 * i + 1]))
        for i, (row, pair) in enumerate(zip(rows, texts, strict=True))
    ]


def check_lengths(data: Path, examples: list[Example], max_seq_len: int) -> None:
    """Raise a UserError that names every row (at most 10) longer than training or model take."""
    positions = read_json(BASE / "config.json").get("max_position_embeddings", max_seq_len)
    limit = min(positions, max_seq_len)
    why = "finetune.max_seq_len allows" if max_seq_len < positions else "the base model takes"
    too_long = [e for e in examples if e.tokens > limit]
    problems = [
        f"{data}:{e.row.line}: {e.tokens} tokens, and {why} {limit}"
        for e in too_long[:SHOWN_PROBLEMS]
    ]
    if len(too_long) > SHOWN_PROBLEMS:
        longest = max(e.tokens for e in too_long)
        more = len(too_long) - SHOWN_PROBLEMS
        problems.append(f"{data}: and {more} more; the longest has {longest} tokens")
    if problems:
        raise UserError("\n".join(problems))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def for_evaluation(prompt: str, percent: int) -> bool:
    """Whether a prompt is for evaluation: its hash says so, so new rows move no old one."""
    return int(digest(prompt)[:8], 16) % 100 < percent


def split(data: Path, examples: list[Example], percent: int) -> tuple[list[Example], list[Example]]:
    """(training rows, evaluation rows), in the order of the file."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[for_evaluation(example.row.prompt, percent)].append(example)
    for side, share, name in zip(sides, (100 - percent, percent), ("train", "eval"), strict=True):
        if not side:
            # 99 times in 100, n prompts leave the side with share p a row: (1 - p)^n = 0.01
            enough = math.ceil(math.log(0.01) / math.log(1 - share / 100))
            raise UserError(
                f"{data}: none of {len(examples)} rows is in the {name} split, chosen by a hash "
                f"(prepare.eval_percent is {percent}); about {enough} rows are needed"
            )
    return sides


def report(
    rows: list[Row], examples: list[Example], train: list[Example], evaluation: list[Example]
) -> dict:
    """Counts, and lengths in tokens of whole rows."""
    lengths = sorted(e.tokens for e in examples)
    responses: dict[str, int] = {}
    for example in examples:
        responses[example.row.prompt] = responses.get(example.row.prompt, 0) + 1
    return {
        "rows": len(rows),
        "duplicates_removed": len(rows) - len(examples),
        "prompts_with_several_responses": sum(n > 1 for n in responses.values()),
        "train": len(train),
        "eval": len(evaluation),
        "tokens": {
            "min": lengths[0],
            "median": round(statistics.median(lengths)),
            "p95": lengths[math.ceil(0.95 * len(lengths)) - 1],
            "max": lengths[-1],
        },
        "longest_line": max(examples, key=lambda e: e.tokens).row.line,
    }


def as_row(example: Example) -> dict[str, str]:
    return {
        "prompt": example.row.prompt,
        "response": example.row.response,
        "text_prompt": example.text_prompt,
        "text_response": example.text_response,
    }


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8", newline="\n")


if __name__ == "__main__":
    # Tokenizing needs no torch: without it transformers loads in 2 s of processor time, not 6.
    sys.modules["torch"] = None  # type: ignore[assignment]
    run(main, "prepare")
