"""The parts of a sweep that decide: its file, its search, its figures and limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeping import GRID

from stages.errors import UserError
from stages.stage import write_json
from tasks.sweep import figures, spec
from tasks.sweep.figures import Limit
from tasks.sweep.search import Search

RATE = {"low": 0.0, "high": 1.0}
ONE = {"space": {"x": RATE}, "objectives": {"perplexity": "minimize"}, "sampler": "random"}


def of(**changes: Any) -> spec.Spec:
    return spec.check(GRID | changes, "sweep.yaml")


def of_one(**changes: Any) -> spec.Spec:
    """A sweep of one number between 0 and 1."""
    return spec.check(ONE | {"trials": 40} | changes, "sweep.yaml")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"trails": 3}, "trails: unknown key"),
    "unknown key of a range": ({"space": {"a": RATE | {"stp": 1}}}, "space.a.stp: unknown key"),
    "no space": ({"space": {}}, "space: "),
    "neither list nor range": ({"space": {"a": 4}}, "space.a: a list, or a range with low and hi"),
    "empty list": ({"space": {"a": []}}, "space.a: an empty list"),
    "value twice": ({"space": {"a": [4, 8, 4]}}, "space.a: a value is there twice"),
    "number twice, once as text": ({"space": {"a": [0.0001, "1e-4"]}}, "space.a: a value is there"),
    "mapping": ({"space": {"a": [{"b": 1}]}}, "space.a: single values"),
    "no high": ({"space": {"a": {"low": 1}}}, "space.a.high: "),
    "low not below high": ({"space": {"a": {"low": 2, "high": 2}}}, "space.a: low must be less"),
    "log with step": (
        {"space": {"a": {"low": 1, "high": 9, "log": True, "step": 2}}},
        "space.a: log goes with low above 0 and without step",
    ),
    "log from 0": ({"space": {"a": RATE | {"log": True}}}, "space.a: log goes with low above 0"),
    "step of 0": ({"space": {"a": RATE | {"step": 0}}}, "space.a: step must be above 0"),
    "no number": (
        {"space": {"a": {"low": 0.1, "high": math.inf}}},
        "space.a.high: a finite number",
    ),
    "text for a number": ({"space": {"a": {"low": 1, "high": "x"}}}, "space.a.high: a valid num"),
    "grid without step": ({"space": {"a": RATE}}, "space.a: a grid needs a list, or a range with"),
    "tpe without trials": ({"sampler": "tpe"}, "sampler tpe needs trials"),
    "trials with grid": ({"trials": 3}, "trials does not go with it"),
    "no trials": ({"sampler": "random", "trials": 0}, "trials: "),
    "unknown sampler": ({"sampler": "cmaes"}, "sampler: "),
    "no objective": ({"objectives": {}}, "objectives: "),
    "unknown direction": ({"objectives": {"size_mb": "small"}}, "objectives.size_mb: "),
    "unknown figure": ({"objectives": {"size": "minimize"}}, "size: no such figure; did you mean "),
    "unknown figure, none near": ({"objectives": {"q": "minimize"}}, "choose one of quantized_si"),
    "figure of a limit": ({"limits": ["perplexty <= 3"]}, "did you mean perplexity?"),
    "unreadable limit": ({"limits": ["size_mb < 3"]}, "'size_mb < 3': write it as FIGURE <= NUM"),
    "bound is no number": ({"limits": ["size_mb <= 3e"]}, "write it as FIGURE <= NUMBER or"),
    "name": ({"name": "a/b"}, "name: "),
    "needs": ({"needs": {"memory_gb": 0}}, "needs.memory_gb: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_sweep_yaml_is_one_clear_line(mistake: str, tmp_path: Path) -> None:
    changes, said = MISTAKES[mistake]
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    with pytest.raises(UserError) as error:
        spec.load(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and said in text and "\n" not in text


def test_each_mistake_has_its_line() -> None:
    with pytest.raises(UserError) as error:
        of(trails=1, parallel=0)
    assert sorted(str(error.value).splitlines())[1] == "sweep.yaml: trails: unknown key"


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\x00", "- a", "", "8"])
def test_what_is_no_sweep_yaml_is_one_clear_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"not valid YAML|keys are wanted") as error:
        spec.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_sweep_yaml_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sweep.yaml is not there: docs/sweeps.md"):
        spec.load(tmp_path / "sweep.yaml")


def test_1e_4_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "sampler: random\ntrials: 5\nobjectives: {size_mb: minimize}\nspace:\n"
        "  finetune.learning_rate: {low: 1e-4, high: 1e-2, log: true}\n"
        "  finetune.dropout: [0, 1e-1]\n  quantize.algorithm: [awq, rtn]\n"
    )
    search = Search(spec.load(path))
    for _ in range(5):
        asked = search.ask()
        assert asked and 1e-4 <= asked[1]["finetune.learning_rate"] <= 1e-2
        assert asked[1]["finetune.dropout"] in (0, 0.1)
        assert asked[1]["quantize.algorithm"] in ("awq", "rtn")


def all_of(wanted: spec.Spec, reached: Callable[[dict[str, Any]], dict[str, float]]) -> list[Any]:
    """The candidates of a search, each told what it reached."""
    search, found = Search(wanted), []
    while len(found) < wanted.size and (asked := search.ask()):
        found.append(asked[1])
        search.tell(asked[0], reached(asked[1]))
    return found


def test_a_grid_is_all_combinations_the_last_key_first() -> None:
    wanted = of(space={"b": {"low": 1, "high": 3}, "a": [True, None], "c": RATE | {"step": 0.5}})
    assert wanted.size == 18
    found = all_of(wanted, lambda values: {})
    assert found == [
        {"b": b, "a": a, "c": c} for b in (1, 2, 3) for a in (True, None) for c in (0.0, 0.5, 1.0)
    ]
    assert [type(one["b"]) for one in found] == [int] * 18


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_repeats_with_its_seed_and_repeats_no_candidate(sampler: str) -> None:
    space = {"b": {"low": 1, "high": 5}, "a": [[1, 2], [3]], "x": RATE | {"step": 0.25}}

    def found(seed: int) -> list[Any]:
        wanted = of_one(space=space, sampler=sampler, seed=seed, trials=25)
        return all_of(wanted, lambda values: {"perplexity": values["x"] + values["b"]})

    first = found(1)
    assert first == found(1) != found(2)
    assert len({repr(one) for one in first}) == len(first) == 25
    assert {repr(one["a"]) for one in first} == {"[1, 2]", "[3]"}
    assert all(type(one["b"]) is int and one["x"] in (0, 0.25, 0.5, 0.75, 1) for one in first)


def test_whole_ends_with_a_step_that_is_not_are_no_whole_numbers() -> None:
    half = {"x": {"low": 1, "high": 3, "step": 0.5}}
    assert [one["x"] for one in of(space=half).grid()] == [1, 1.5, 2, 2.5, 3]
    found = all_of(of_one(space=half), lambda values: {})
    assert sorted(one["x"] for one in found) == [1, 1.5, 2, 2.5, 3]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_small_space_ends(sampler: str) -> None:
    wanted = of_one(space={"a": [1, 2], "b": [3, 4]}, sampler=sampler)
    found = all_of(wanted, lambda values: {"perplexity": 1.0})
    assert sorted(map(repr, found)) == sorted(map(repr, of(space=wanted.space).grid()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_tpe_moves_towards_what_is_wanted(seed: int, direction: str) -> None:
    sign = 1 if direction == "minimize" else -1

    def asked(sampler: str) -> list[float]:
        wanted = of_one(sampler=sampler, seed=seed, objectives={"perplexity": direction})
        found = all_of(wanted, lambda v: {"perplexity": sign * (v["x"] - 0.3) ** 2})
        return [abs(one["x"] - 0.3) for one in found]

    tpe, random = asked("tpe"), asked("random")
    assert sum(tpe[20:]) < 0.7 * sum(random[20:]) and min(tpe) <= min(random) and min(tpe) < 0.01


@pytest.mark.parametrize("stopped", [False, True], ids=["measured", "stopped before its end"])
def test_tpe_learns_what_a_limit_rules_out(stopped: bool) -> None:
    """The wanted figure is best where the limit is broken: who is told of none goes there."""

    def asked(limits: list[str]) -> int:
        def reached(values: dict[str, Any]) -> dict[str, float]:
            known = {"size_mb": values["x"]}
            over = stopped and limits and values["x"] > 0.5
            return known if over else known | {"perplexity": -values["x"]}

        found = all_of(of_one(sampler="tpe", limits=limits, trials=60), reached)
        return sum(one["x"] > 0.6 for one in found[20:])

    assert asked([]) > 30 and asked(["size_mb <= 0.5"]) < 12


@pytest.mark.parametrize("reached", [{}, {"perplexity": None}, {"perplexity": math.nan}])
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_failed_candidates_do_not_end_a_search(sampler: str, reached: dict[str, Any]) -> None:
    wanted = of_one(sampler=sampler, limits=["perplexity <= 2", "size_mb <= 1"])
    assert len(all_of(wanted, lambda values: reached)) == 40


@pytest.mark.parametrize("text", ["size_mb<=2", " size_mb ≤ 2.0 ", "size_mb <= 2e0"])
def test_a_limit_from_above(text: str) -> None:
    limit = Limit.parse(text)
    met = [not figures.broken([limit], {"size_mb": value}) for value in (1, 2, 2.001, math.nan)]
    assert met == [True, True, False, False] and str(limit) == "size_mb ≤ 2"


@pytest.mark.parametrize("text", ["travel.a-b.c >= -2", "travel.a-b.c ≥ -2"])
def test_a_limit_from_below(text: str) -> None:
    found = [
        figures.broken([Limit.parse(text)], {"travel.a-b.c": value})
        for value in (-1, -2, -2.5, math.nan, None)
    ]
    assert found[:2] == [[], []] and found[4] == []  # what is not there yet breaks none
    assert found[2:4] == [
        ["travel.a-b.c is -2.5, wanted ≥ -2"],
        ["travel.a-b.c is nan, wanted ≥ -2"],
    ]


def measured(perplexity: float | None, rate: float, speed: Any = None) -> dict[str, Any]:
    return {
        "onnx_on": {"perplexity": perplexity, "exact_answer_rate": rate},
        "text_perplexity": {"quantized": 11, "onnx_off": 22, "base": 10},
        "base": None, "agreement": {"top1": 0.5}, "size_mb": {"adapter": 0.1}, "speed": speed,
    }  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder in which every stage of two adapters has ended."""
    for name, size in (("quantized/a/weights", 3000), ("onnx/model.onnx", 2000)):
        (tmp_path / "models" / name).parent.mkdir(parents=True)
        (tmp_path / "models" / name).write_bytes(b"x" * size)
    text = {"text_perplexity": {"base": 10, "quantized": 11}}
    found = {"quantized/text": text, "a": measured(2, 0.25), "b": measured(4, 0.75)}
    for name, values in found.items():
        (tmp_path / f"metrics/{name}.json").parent.mkdir(parents=True, exist_ok=True)
        write_json(tmp_path / f"metrics/{name}.json", values)
    return tmp_path


ALL = {"quantize", "measure", "export", "evaluate@a", "evaluate@b"}


def test_figures_are_the_worst_of_the_adapters(made: Path) -> None:
    found = figures.read(made, ALL, ["a", "b"])
    assert found["perplexity"] == 4 and found["exact_answer_rate"] == 0.25
    assert found["quantized_size_mb"] == 0.003 and found["size_mb"] == 0.002
    assert found["perplexity_ratio"] == 1.1 and found["onnx_perplexity_ratio"] == 2
    assert found["a.onnx_on.perplexity"] == 2 and found["b.onnx_on.perplexity"] == 4
    assert found["tokens_per_second"] is None and "a.base" not in found  # not measured here
    assert set(found) >= set(figures.FIGURES)


@pytest.mark.parametrize(
    ("missing", "figure"),
    [("quantize", "quantized_size_mb"), ("measure", "perplexity_ratio"), ("export", "size_mb"),
     ("evaluate@b", "perplexity"), ("evaluate@b", "a.onnx_on.perplexity")],
)  # fmt: skip
def test_figures_of_stages_that_have_not_ended_are_not_read(
    made: Path, missing: str, figure: str
) -> None:
    assert figure in figures.read(made, ALL, ["a", "b"])
    assert figure not in figures.read(made, ALL - {missing}, ["a", "b"])


def test_null_in_a_file_is_no_number_and_meets_no_limit(made: Path) -> None:
    write_json(made / "metrics/b.json", measured(None, 0.75))
    found = figures.read(made, ALL, ["a", "b"])
    assert math.isnan(found["perplexity"] or 0)
    for name in ("perplexity", "b.onnx_on.perplexity"):
        assert figures.broken([Limit.parse(f"{name} <= 100")], found), name
    assert not figures.broken([Limit.parse("a.onnx_on.perplexity <= 100")], found)
