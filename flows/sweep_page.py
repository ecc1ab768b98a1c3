"""What a sweep leaves to look at: a table, a Pareto picture, a page, and artifacts in the UI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows import page, pictures
from flows.pictures import About, Picture
from tasks.sweep import results
from tasks.sweep.results import FAILED, OVER, Candidate, Result

PAGE = "index.html"


def columns(result: Result) -> list[str]:
    """The figures that are shown: objectives, then those of limits."""
    limited = [limit.figure for limit in result.spec.parsed_limits()]
    return list(dict.fromkeys([*result.spec.objectives, *limited]))


def words(one: Candidate, result: Result) -> str:
    """A candidate in a line: what it set, and what it reached or why not."""
    sets = ", ".join(f"{key}={value}" for key, value in one.overrides.items())
    if one.state in (OVER, FAILED):
        return f"{sets}: {one.message}"
    reached = ", ".join(f"{name} {shown(one.figures.get(name))}" for name in columns(result))
    return f"{sets}: {reached}"


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def table(result: Result) -> Any:
    """All candidates, for a terminal."""
    from rich.table import Table

    best, front = result.best(), {one.number for one in result.front()}
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("no.", justify="right")
    for key in result.spec.space:
        grid.add_column(key)
    for name in columns(result):
        grid.add_column(name, justify="right")
    grid.add_column("")
    for one in result.candidates:
        note = "best" if one is best else "on the front" if one.number in front else one.state
        style = "bold green" if one is best else "green" if one.number in front else "dim"
        grid.add_row(
            str(one.number),
            *(str(value) for value in one.overrides.values()),
            *(shown(one.figures.get(name)) for name in columns(result)),
            note,
            style=style if one.ended else None,
        )
    return grid


def draw(result: Result) -> list[Picture]:
    """The objectives against each other, two at a time; of one objective, its values in a row."""
    names = list(result.spec.objectives)
    front = {one.number for one in result.front()}
    pairs = [(names[0], other) for other in names[1:]] or [("", names[0])]
    drawn = []
    for x, y in pairs:
        points = []
        for one in result.candidates:
            across, up = one.figures.get(x) if x else float(one.number), one.figures.get(y)
            if across is not None and up is not None:
                kind = "front" if one.number in front else one.state
                points.append((across, up, str(one.number), kind))
        if points:
            title = f"{y} against {x}" if x else y
            about = About(
                f"pareto-{y}".replace(".", "-") + (f"-{x}".replace(".", "-") if x else ""),
                title,
                "Each candidate by its number; joined are those that no other beats.",
            )
            drawn.append(pictures.scatter(about, points, (x or "candidate", y)))
    return drawn


def write(root: Path, result: Result) -> tuple[Path, list[Picture]]:
    """Write result.json, index.html and the pictures of a sweep; the page's path, the pictures."""
    folder = results.write(root, result)
    drawn = draw(result)
    pictures.write(drawn, folder)
    ran = result.executed()
    text = page.render(
        "sweep.html",
        result=result,
        best=result.best(),
        front={one.number for one in result.front()},
        keys=list(result.spec.space),
        names=columns(result),
        rows=[
            (one, [shown(one.figures.get(name)) for name in columns(result)])
            for one in result.candidates
        ],
        computed={
            stage: (count, sum(_was(one, stage, "Cached") for one in result.candidates))
            for stage, count in ran.items()
        },
        drawn=drawn,
    )
    (folder / PAGE).write_text(text, "utf-8")
    return folder / PAGE, drawn


def _was(one: Candidate, stage: str, state: str) -> bool:
    return any(row["stage"] == stage and row["state"] == state for row in one.stages)


def publish(root: Path, result: Result) -> Path:
    """Write the page, and leave the table and the pictures as artifacts of the flow run."""
    from prefect.artifacts import (
        create_link_artifact,
        create_markdown_artifact,
        create_table_artifact,
    )

    path, drawn = write(root, result)
    rows = [
        {
            "candidate": one.number,
            **{key: str(value) for key, value in one.overrides.items()},
            **{name: shown(one.figures.get(name)) for name in columns(result)},
            "state": one.state,
            "message": one.message,
        }
        for one in result.candidates
    ]
    create_table_artifact(rows, key="candidates", description="Every candidate of the sweep")
    if drawn:
        create_markdown_artifact(
            pictures.markdown(drawn), key="pareto", description="The objectives"
        )
    create_link_artifact(
        path.as_uri(),
        str(path),
        key="sweep-page",
        description="A file on the machine of this run: copy the path into a browser there",
    )
    return path
