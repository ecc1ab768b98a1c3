"""What a run leaves to look at: a table of its stages and the metrics, on screen and in the UI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages import params
from stages.card import shown
from stages.stage import LINEAGE, METRICS, read_json


@dataclass(frozen=True)
class Row:
    """What was done with one stage."""

    stage: str
    state: str
    """Completed, Cached or Failed."""
    reason: str
    seconds: float
    key: str | None
    """DVC's stage key, 64 hex digits."""
    outs: list[str]

    @property
    def done(self) -> bool:
        return self.state in ("Completed", "Cached")


def row(stage: str, state: Any, seconds: float) -> Row:
    """The row of a stage from the final state of its task run."""
    outcome = state.result() if state.is_completed() else None
    return Row(
        stage,
        state.name,
        state.message or state.name,
        round(seconds, 2),
        outcome.key if outcome else None,
        outcome.outs if outcome else [],
    )


def metrics(root: Path) -> dict[str, dict[str, Any]]:
    """Metrics of each adapter in params.yaml that has some, by name."""
    adapters = params.load(root / "params.yaml").adapters
    paths = {name: root / METRICS / f"{name}.json" for name in adapters}
    return {name: read_json(path) for name, path in sorted(paths.items()) if path.exists()}


def model_rows(found: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """(adapter, model, perplexity, exact answers, size) as text, for every measured model."""
    names = {
        "base": ("base model", "base"),
        "quantized": ("quantized", "quantized"),
        "quantized_lora": ("quantized, taught", None),
        "onnx_off": ("ONNX, adapter off", "onnx"),
        "onnx_on": ("ONNX, adapter on", "adapter"),
    }
    rows = []
    for adapter, values in found.items():
        for key, (label, size) in names.items():
            figures = values[key]
            plus = "+" if key == "onnx_on" else ""
            rows.append(
                (
                    adapter,
                    label,
                    shown(figures, "perplexity", ".3f"),
                    shown(figures, "exact_answer_rate", ".1%"),
                    f"{plus}{values['size_mb'][size]:.1f} MB" if size else "",
                )
            )
    return rows


def remarks(found: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence of speed and agreement for each adapter, or why they were not measured."""
    return [f"{adapter}: {_remark(values)}" for adapter, values in found.items()]


def _remark(values: dict[str, Any]) -> str:
    if values["not_measured"]:
        return f"not measured on this machine: {values['not_measured']}"
    agreement, speed = values["agreement"], values["speed"]
    rate = speed.get("float_tokens_per_second")  # null if the float model ran on a GPU
    beside = "" if rate is None else f"{rate:,.0f} of the float model in PyTorch, "
    return (
        f"PyTorch and ONNX choose the same token in {shown(agreement, 'top1', '.1%')} of places "
        f"(mean KL {shown(agreement, 'mean_kl', '')}); "
        f"{shown(speed['adapter_on'], 'tokens_per_second', ',.0f')} tokens/s with the adapter, "
        f"{shown(speed['adapter_off'], 'tokens_per_second', ',.0f')} without, "
        f"{beside}"
        f"{shown(speed, 'peak_rss_mb', ',.0f')} MB of memory."
    )


HEADER = ("adapter", "model", "perplexity", "exact answers", "size")


def table(found: dict[str, dict[str, Any]]) -> Any:
    """The metrics for a terminal."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEADER:
        grid.add_column(name, justify="left" if name in ("adapter", "model") else "right")
    for cells in model_rows(found):
        grid.add_row(*cells)
    return grid


def publish(root: Path, rows: list[Row]) -> None:
    """Leave the summary and the table of stages as artifacts of the flow run."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    create_table_artifact(
        [{**asdict(row), "outs": ", ".join(row.outs)} for row in rows],
        key="stages",
        description="What was done with each stage, and why",
    )
    done = all(row.done for row in rows)
    text = markdown(rows, metrics(root) if done else {})
    create_markdown_artifact(text, key="summary", description="Stages and metrics")


def publish_report(root: Path) -> None:
    """Write the report, and leave a link to it and its main picture as artifacts of the flow run.

    Browsers do not open a file from a server's page, so the link's text is the path itself.
    """
    from prefect.artifacts import create_link_artifact, create_markdown_artifact

    from flows import pictures, report

    written = report.write(root, root / report.FOLDER)
    create_link_artifact(
        written.page.as_uri(),
        str(written.page),
        key="report",
        description="A file on the machine of this run: copy the path into a browser there",
    )
    shown = [picture for picture in written.pictures if picture.about.name.startswith("perplexity")]
    create_markdown_artifact(
        pictures.markdown(shown), key="pictures", description="From the report"
    )


def markdown(rows: list[Row], found: dict[str, dict[str, Any]]) -> str:
    """The summary: what was done with each stage, then the metrics."""
    stages = [
        (r.stage, r.state, r.reason, f"{r.seconds:.1f}", f"`{(r.key or '')[:12]}`", _made(r.outs))
        for r in rows
    ]
    parts = ["## Stages", _grid(("stage", "state", "reason", "seconds", "key", "outs"), stages)]
    if found:
        parts += ["## Metrics", _grid(HEADER, model_rows(found)), *remarks(found)]
    return "\n\n".join(parts) + "\n"


def _made(outs: list[str]) -> str:
    """The outputs but for the record that every stage leaves."""
    return ", ".join(f"`{path}`" for path in outs if not path.startswith(f"{LINEAGE}/"))


def _grid(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in cells)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
