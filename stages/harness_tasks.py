"""Tasks of the lm-evaluation-harness by name, run on one model after another, and their metrics.

The harness owns the tasks, their prompts and their metrics: lm_eval/tasks, lm_eval/evaluator.py.
"""

from __future__ import annotations

import difflib
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from stages.errors import UserError
from stages.harness import TorchLM
from stages.stage import BASE

SEED = 1234  # the harness's own default


@dataclass
class Row:
    """One metric of one task, as the harness computes it."""

    task: str
    metric: str
    filter: str
    """How an answer was taken out of a text, or none."""
    higher_is_better: bool | None
    samples: int
    values: dict[str, float] = field(default_factory=dict)
    """By model."""
    stderr: dict[str, float] = field(default_factory=dict)
    """By model, where the harness gives one."""

    @property
    def difference(self) -> float | None:
        """ONNX less quantized, or None if they were not both measured."""
        if {"onnx", "quantized"} <= self.values.keys():
            return self.values["onnx"] - self.values["quantized"]
        return None


def load_tasks(names: list[str], include_path: Path | None = None) -> dict[str, Any]:
    """The tasks of these names or patterns (`mmlu_*`), their data read.

    The harness's own list of 14,000 takes 10 s to read, so it is left out where `include_path`
    has them all.

    Returns:
        What lm_eval's TaskManager.load returns.

    Raises:
        UserError: a name is unknown, its data cannot be had, or it cannot be run here.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3, 0.5))
            hint = f"; the nearest are {near}" if near else ""
            raise UserError(f"{name}: no task of the harness or of --include-path{hint}")
        found += [match for match in matches if match not in found]
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in found:
        try:
            part = manager.load([name])
        except Exception as error:  # a task is a file of its author's, or a download
            raise UserError(_cannot_load(name, error)) from error
        loaded["tasks"] |= part["tasks"]
        loaded["groups"] |= part.get("groups", {})
    for name, task in loaded["tasks"].items():
        _check(name, task)
    return loaded


def _cannot_load(name: str, error: Exception) -> str:
    said = f"{name}: the task cannot be loaded: {type(error).__name__}: {error}"
    if isinstance(error, OSError):
        said += (
            "\nIts data comes from where the task says, mostly the Hugging Face hub: run this once "
            "where that can be reached, or name files that are here in the task's dataset_kwargs"
        )
    return said


def _check(name: str, task: Any) -> None:
    """Refuse what would run a model's code, or would not say how two models differ."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"{name}: runs code that the model writes; that is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{name}: asks about pictures or sound, and these models read text")
    options = task.get_config("generation_kwargs") or {}
    if options.get("do_sample", float(options.get("temperature") or 0) > 0):
        raise UserError(
            f"{name}: asks for sampled answers (do_sample, temperature), in which models differ by "
            "chance too; only the likeliest answers are compared here"
        )


def measure(
    lm: TorchLM,
    loaded: dict[str, Any],
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """Run the tasks on one model; the same examples and few-shot prompts each time.

    Args:
        limit: examples of each task, from the first; None for all.
        num_fewshot: examples in a prompt, but for tasks that allow none; None for the task's own.
        chat_template: put prompts into the tokenizer's chat template, each example a turn.

    Raises:
        UserError: a task asks for more than the model's context holds, or there is no template.
    """
    if chat_template and lm.tokenizer.chat_template is None:
        raise UserError(f"--chat-template: the tokenizer in {BASE} has none")
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config("num_fewshot", num_fewshot)
        elif own is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
    try:
        return evaluator.evaluate(
            lm,
            loaded,
            limit=limit,
            log_samples=False,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    except AssertionError as error:  # how HFLM says that a request does not fit
        why = str(error) or "an answer to score is empty, or longer than that"
        raise UserError(f"the model takes {lm.max_length} tokens: {why}") from error


def table(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Rows from what `measure` returned by model, in the harness's order."""
    rows: dict[tuple[str, str], Row] = {}
    for model, result in results.items():
        for task, figures in result["results"].items():
            better = result["higher_is_better"].get(task, {})
            for key, value in figures.items():
                metric, comma, filter_ = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                    continue
                count = figures["sample_len"]
                new = Row(task, metric, filter_, better.get(metric), count)
                row = rows.setdefault((task, key), new)
                row.values[model] = float(value)
                error = figures.get(f"{metric}_stderr,{filter_}")
                if isinstance(error, (int, float)):
                    row.stderr[model] = float(error)
    return list(rows.values())
