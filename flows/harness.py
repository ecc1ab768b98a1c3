"""`olivepress lm-eval`: standard tasks on the base, the quantized and the ONNX model."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flows.console import Json, console, in_project, print_json
from flows.talk import Adapter, choose
from stages.errors import UserError

if TYPE_CHECKING:
    from stages.harness_tasks import Row

INSTALL = "pip install -c requirements.lock -e '.[lm-eval]'"
WIDTH = 200  # characters; a pipe counts as 80, which would cut names
ARROWS = {True: " ↑", False: " ↓", None: ""}


class Which(StrEnum):
    """The models, as they come in the pipeline."""

    base = "base"
    quantized = "quantized"
    onnx = "onnx"


def lm_eval(
    tasks: Annotated[list[str], typer.Argument(help="Names or patterns, such as 'mmlu_*'.")],
    *,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with task files of your own.")
    ] = None,
    model: Annotated[
        list[Which] | None,
        typer.Option(help="Once for each model. Default: all three.", show_default=False),
    ] = None,
    adapter: Adapter = None,
    limit: Annotated[
        int | None, typer.Option(help="Examples of each task. Default: all.", min=1)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in a prompt. Default: the task's own.", min=0)
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts into the model's chat template.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Requests at once in PyTorch.", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Run standard tasks by name on the base, the quantized and the ONNX model.

    Through the lm-evaluation-harness. The adapter is on all but the base. Default: the only one.
    """
    folder = Path.cwd() / include_path if include_path else None
    models = [name.value for name in Which if not model or name in model]
    _environment()
    with in_project():
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"the extra lm-eval is not installed; {INSTALL}")
        from stages.stage import ADAPTERS, MODELS

        for name in models:
            if not (MODELS / name).is_dir():
                raise UserError(f"{MODELS / name} is not there yet; olivepress run makes it")
        made = sorted(p.name for p in ADAPTERS.glob("[!.]*") if p.is_dir())
        name_or_none = choose(made, adapter) if models != ["base"] else None
        from stages import harness, harness_tasks
        from stages.measure import finite

        with _progress() as bars:
            bar = bars.add_task("tasks", total=None)
            loaded = harness_tasks.load_tasks(tasks, folder)
            results = {}
            for name in models:
                bars.reset(bar, description=name, total=None)

                def show(done: int, total: int, bar: Any = bar) -> None:
                    bars.update(bar, completed=done, total=total)

                lm = harness.open_model(name, name_or_none, batch_size, show)
                results[name] = harness_tasks.measure(lm, loaded, limit, num_fewshot, chat_template)
                del lm  # one model in memory at a time
        rows = harness_tasks.table(results)
        if as_json:
            shown = [asdict(row) | {"onnx_minus_quantized": row.difference} for row in rows]
            print_json(finite({"adapter": name_or_none, "models": models, "rows": shown}))
        else:
            if name_or_none:
                console.print(f"adapter {name_or_none} on all but the base model\n")
            Console(highlight=False, width=WIDTH).print(_table(rows, models))


def _environment() -> None:
    """That of a stage, but a task may fetch its data. Before any library reads it."""
    from stages.stage import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        if name != "HF_HUB_OFFLINE":
            os.environ.setdefault(name, value)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # datasets counts even local files


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    where = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=where, transient=True)


def _table(rows: list[Row], models: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for name in models:
        table.add_column(name, justify="right")
    both = {"onnx", "quantized"} <= set(models)
    if both:
        table.add_column("onnx − quantized", justify="right")
    for row in rows:
        filtered = f" ({row.filter})" if row.filter != "none" else ""
        cells = [row.task, row.metric + ARROWS[row.higher_is_better] + filtered, str(row.samples)]
        cells += [_value(row, name) for name in models]
        if both:
            cells.append("" if row.difference is None else f"{row.difference:+.4f}")
        table.add_row(*cells)
    return table


def _value(row: Row, model: str) -> str:
    if model not in row.values:
        return ""
    error = f" ± {row.stderr[model]:.4f}" if model in row.stderr else ""
    return f"{row.values[model]:.4f}{error}"
