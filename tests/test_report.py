"""`olivepress report`: the page, its pictures, and DVC's own commands on the same data."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import REPO, TOY, init_project, reproduce, sh, typed
from figures import MEASURED
from flows import report
from lab import STAGES, commit, olivepress
from stages.errors import UserError
from tasks import overrides


class Page(HTMLParser):
    """What a browser makes of a page: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.marked: list[str] = []
        self.in_mark = False
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.in_mark = tag == "mark"

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data)
        if self.in_mark:
            self.marked.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.in_mark = False

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = init_project(tmp_path_factory.mktemp("report") / "project")
    (folder / "dvc.yaml").write_text(TOY)
    return folder


@pytest.fixture
def project(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which no stage was run yet; the test runs in its folder."""
    for name in ("metrics", "plots", "report"):
        shutil.rmtree(small / name, ignore_errors=True)
    shutil.copy(REPO / "params.yaml", small)
    monkeypatch.chdir(small)
    return small


def measured(root: Path, adapter: str = "travel", **changes: Any) -> None:
    """Leave metrics and a loss curve, as stages do."""
    (root / "metrics").mkdir(exist_ok=True)
    figures = copy.deepcopy(MEASURED) | changes
    (root / f"metrics/{adapter}.json").write_text(json.dumps(figures))
    (root / "plots/loss").mkdir(parents=True, exist_ok=True)
    losses = "".join(f"{step},{8 / step},0.1\n" for step in range(1, 60))
    (root / f"plots/loss/{adapter}.csv").write_text(f"step,loss,learning_rate\n{losses}")


def written(root: Path) -> Page:
    return Page(report.write(root, root / "report").page)


def assert_a_picture(png: bytes) -> None:
    """A whole PNG with dark and coloured dots on white, as wide as text needs."""
    picture = Image.open(io.BytesIO(png))
    picture.verify()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.width >= 600 and picture.getpixel((2, 2)) == (255, 255, 255)
    colours = picture.getcolors(1 << 24)
    assert colours is not None and len(colours) > 20
    assert min(sum(colour) for _, colour in colours) < 200  # ink


def assert_needs_no_network(page: Page) -> None:
    """Every address on it is within it; the names of XML's namespaces are not fetched."""
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<>]+", page.source)) <= names
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "img"}, tag
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_the_report_of_the_lab(lab: Path, lab_report: dict[str, Any]) -> None:
    metrics = json.loads((lab / "metrics/travel.json").read_text())
    assert lab_report["figures"] == {"travel": metrics}
    assert {gate["verdict"] for gate in lab_report["gates"]["travel"]} == {"met"}
    names = {Path(path).stem for path in lab_report["pictures"]}
    assert names == {
        *("text", "layers"),
        *(f"{what}-travel" for what in ("perplexity", "size", "loss", "speed")),
    }
    for path in lab_report["pictures"]:
        assert_a_picture(Path(path).read_bytes())
    page = Page(Path(lab_report["page"]))
    assert Path(lab_report["page"]) == lab / "report/index.html"
    assert_needs_no_network(page)
    assert len(page.named("svg")) == len(names)
    for model in ("base", "quantized", "quantized_lora", "onnx_off", "onnx_on"):
        assert f"{metrics[model]['perplexity']:,.3f}" in page.text
    for answer in metrics["answers"]:
        assert " ".join(answer["prompt"].split()) in page.text
    assert "all gates met" in page.text and "not of the present settings" not in page.text


def test_the_report_says_where_each_stage_comes_from(lab: Path, tmp_path: Path) -> None:
    assert typed("report", "--out", str(tmp_path / "deep/er"), cwd=lab).exit_code == 0
    page = Page(tmp_path / "deep/er/index.html")
    chain = {one["stage"]: one for one in olivepress(lab, "lineage", "models/package")}
    keys = {attributes.get("title") for attributes in page.named("code")}
    assert set(chain) == set(STAGES) and {one["key"] for one in chain.values()} <= keys
    assert chain["quantize"]["record"]["started"][:16].replace("T", " ") in page.text
    assert "quantize.bits=4" in page.text and "gates.min_top1_agreement=" in page.text
    assert f"torch {chain['export']['record']['versions']['torch']}" in page.text


def test_nothing_to_report_says_what_to_run(project: Path) -> None:
    done = typed("report", cwd=project)
    assert done.exit_code == 1 and not (project / "report").exists()
    assert "nothing to report yet" in done.stderr and "`olivepress run` makes them" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_page_is_complete_before_anything_is_measured(project: Path) -> None:
    """A run that failed on its way leaves the pictures of what was done."""
    measured(project)
    (project / "metrics/travel.json").unlink()
    page = written(project)
    assert "Not evaluated yet: olivepress run does it." in page.text
    assert {path.name for path in (project / "report").glob("*.png")} == {"loss-travel.png"}
    assert "Not all of this is of the present settings" in page.text
    assert "first: never run" in page.text


HOSTILE = "<script>alert(1)</script></svg><img src=x onerror=alert(2)> {{ 7 * 7 }} & \"'"


def test_what_a_model_says_is_text(project: Path) -> None:
    keys = ("prompt", "expected", "base", "onnx_off", "onnx_on")
    measured(project, answers=[dict.fromkeys(keys, HOSTILE)], not_measured=HOSTILE)
    page = written(project)
    assert_needs_no_network(page)
    assert page.text.count(HOSTILE) == len(keys) + 1
    policy = page.named("meta")[-1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert "default-src 'none'" in str(policy["content"])


def test_answers_show_where_they_differ(project: Path) -> None:
    measured(project)
    page = written(project)
    # The legend's own word, then of "Wash the green apple." what the base did not say.
    assert page.marked == ["Marked", "green"]
    assert "taught · as expected" in page.text and "quantized · as the base" not in page.text


NULLS: list[tuple[dict[str, Any], list[str]]] = [
    ({"base": {"perplexity": None, "exact_answer_rate": 0.0}}, ["base not finite 0.0%"]),
    (
        dict.fromkeys(["onnx_off", "onnx_on", "agreement", "speed"])
        | {"not_measured": "no such provider", "text_perplexity": {"base": 10.0}},
        [
            "What needs ONNX is not measured: no such provider",
            "ONNX on not measured not measured 5.5",
            "min_ top1_ agreement not measured 0.95 ✗ not measured",
        ],
    ),
    ({"text_perplexity": None}, ["base 20.000 10.0% not measured 8.0"]),
    (
        {"answers": [{"prompt": "Why?"}], "speed": {}, "size_mb": None},
        ["base 20.000 10.0% 10.000 not measured", "expected: not recorded", "taught not measured"],
    ),
]


def test_figures_that_are_null_or_missing(project: Path) -> None:
    for changes, words in NULLS:
        measured(project, **changes)
        text = written(project).text
        assert [part for part in words if part not in text] == [], changes


def test_every_part_may_be_missing(project: Path) -> None:
    measured(project)
    for kept in (list(MEASURED)[::2], list(MEASURED)[1::2], ["rows"]):
        figures = {name: MEASURED[name] for name in kept}
        (project / "metrics/travel.json").write_text(json.dumps(figures))
        assert "gates not met" in written(project).text


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_figures_far_apart_and_a_curve_that_is_not_finite(project: Path) -> None:
    measured(project, base={"perplexity": 1e300, "exact_answer_rate": 0.0})
    (project / "plots/loss/travel.csv").write_text("step,loss\n1,nan\n2,inf\n")
    written(project)
    assert not (project / "report/loss-travel.png").exists()
    assert_a_picture((project / "report/perplexity-travel.png").read_bytes())


def test_several_adapters_each_have_a_section(project: Path) -> None:
    overrides.apply(project, {"adapters.food.data": "in.txt", "adapters.late.data": "in.txt"})
    measured(project)
    measured(project, "food", base={"perplexity": 77.125, "exact_answer_rate": 0.0})
    page = written(project)
    assert "77.125" in page.text and "20.000" in page.text
    assert "food in detail" in page.text and "travel in detail" in page.text
    assert "late not evaluated" in page.text
    ids = re.findall(r'\bid="([^"]+)"', page.source)
    assert ids and len(ids) == len(set(ids))  # a picture's clip would else cut another's
    assert {f"perplexity-{name}.png" for name in ("food", "travel")} <= {
        path.name for path in (project / "report").iterdir()
    }


@pytest.mark.parametrize("path", ["metrics/travel.json", "plots/loss/travel.csv"])
def test_a_damaged_file_is_named(project: Path, path: str) -> None:
    measured(project)
    (project / path).write_text("step,loss\n1\n{")
    with pytest.raises(UserError, match=rf"{path}: not .*; `olivepress run` restores it"):
        written(project)


def test_a_run_with_nothing_to_do_draws_nothing(toy: Path, api: str) -> None:
    """It must not take longer for the report: matplotlib alone is a second."""
    measured(toy)
    reproduce(toy)
    env = {"PREFECT_API_URL": api, "PYTHONPROFILEIMPORTTIME": "1"}
    done = sh("olivepress", "run", cwd=toy, **env)
    assert done.stdout.startswith("Cached") and " prefect\n" in done.stderr
    assert "matplotlib" not in done.stderr and not (toy / "report").exists()


@pytest.fixture(scope="module")
def clone(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the lab's lock committed, and its metrics and plots from the lab's cache."""
    folder = tmp_path_factory.mktemp("clone") / "clone"
    sh("git", "clone", "--quiet", str(lab), str(folder), cwd=lab)
    shutil.copy(lab / "dvc.lock", folder)
    commit(folder, "lock")
    sh("dvc", "cache", "dir", "--local", str(lab / ".dvc/cache"), cwd=folder)
    outs = ["metrics/travel.json", "plots/loss/travel.csv", "plots/perplexity/travel.csv"]
    sh("dvc", "checkout", *outs, "plots/quantize.csv", cwd=folder)
    return folder


def test_dvc_draws_the_same_data(clone: Path) -> None:
    shown = json.loads(sh("dvc", "plots", "show", "--json", cwd=clone).stdout)
    assert not shown.get("errors")
    for path in ("plots/loss/travel.csv", "plots/perplexity/travel.csv", "plots/quantize.csv"):
        (plot,) = shown["data"][path]
        rows = (clone / path).read_text().splitlines()[1:]
        assert len(plot["content"]["data"]["values"]) == len(rows) > 0


def test_dvc_compares_the_same_figures(clone: Path) -> None:
    path = clone / "metrics/travel.json"
    before = path.read_bytes()
    figures = json.loads(before)
    figures["onnx_on"]["perplexity"] += 1
    os.unlink(path)
    path.write_text(json.dumps(figures))
    try:
        said = json.loads(sh("dvc", "metrics", "diff", "--json", cwd=clone).stdout)
        changed = said["metrics/travel.json" if "metrics/travel.json" in said else "diff"]
        changed = changed.get("metrics/travel.json", changed)
        assert list(changed) == ["onnx_on.perplexity"]
        assert changed["onnx_on.perplexity"]["diff"] == pytest.approx(1)
        assert f"{figures['onnx_on']['perplexity']:,.3f}" in written(clone).text
    finally:
        path.write_bytes(before)
