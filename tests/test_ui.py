"""The run in Prefect's own pages, in a real browser."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lab import STAGES, olivepress
from tasks import bridge
from tests.browser import needs_browser, wait_for

pytestmark = needs_browser

# Counts the pieces of one colour that are at least 15 pixels high, in a picture.
PIECES = """
const [png, colour, done] = arguments, picture = new Image();
picture.onload = () => {
  const w = picture.width, h = picture.height;
  const page = Object.assign(document.createElement('canvas'), {width: w, height: h});
  const pen = page.getContext('2d');
  pen.drawImage(picture, 0, 0);
  const rgba = pen.getImageData(0, 0, w, h).data;
  const left = new Set();
  for (let i = 0; i < w * h; i++)
    if (colour.every((value, k) => Math.abs(rgba[4 * i + k] - value) < 6)) left.add(i);
  let pieces = 0;
  for (const first of left) {
    const todo = [first];
    let top = h, bottom = 0;
    while (todo.length) {
      const i = todo.pop();
      if (!left.delete(i)) continue;
      const y = Math.floor(i / w);
      top = Math.min(top, y), bottom = Math.max(bottom, y);
      todo.push(i - 1, i + 1, i - w, i + w);
    }
    if (bottom - top >= 14) pieces++;
  }
  done(pieces);
};
picture.src = 'data:image/png;base64,' + png;
"""
COMPLETED = [33, 157, 75]  # the green of a bar in the run's graph


def bars(driver) -> int:
    """Green bars in the graph of the run, one for each completed task run."""
    from selenium.webdriver.common.by import By

    picture = driver.find_element(By.TAG_NAME, "canvas").screenshot_as_base64
    return driver.execute_async_script(PIECES, picture, COMPLETED)


def wait_for_bars(driver, least: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while bars(driver) < least:
        assert time.monotonic() < deadline, f"{bars(driver)} bars, and not {least}"
        time.sleep(0.5)


def test_the_run_its_graph_and_its_states(
    lab: Path, api: str, browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = json.loads((lab.parent / "run.json").read_text())["url"]
    answer = f"{api}/flow_runs/{url.rpartition('/')[2]}/graph-v2"
    with urllib.request.urlopen(answer, timeout=30) as reply:
        nodes = {node["id"]: node for _, node in json.load(reply)["nodes"]}
    drawn = {
        node["label"]: {nodes[parent["id"]]["label"] for parent in node["parents"]}
        for node in nodes.values()
    }
    monkeypatch.chdir(lab)
    assert drawn == bridge.graph(lab)
    assert {node["state_type"] for node in nodes.values()} == {"COMPLETED"}
    browser.get(url)
    wait_for(browser, "Completed", "Task Runs", "Artifacts", f"{len(STAGES)} Task runs")
    wait_for_bars(browser, 6)  # of ten: two that touch count as one
    for tab, words in {
        "Task Runs": [*STAGES, "Completed"],
        "Artifacts": ["summary", "stages"],
    }.items():
        open_tab(browser, tab)
        wait_for(browser, *words)


def test_a_run_without_stages_draws_no_bars(toy: Path, api: str, browser) -> None:
    """What the test before relies on: bars are of stages, and not of the page around them."""
    (toy / "dvc.yaml").write_text("stages: {}\n")
    browser.get(olivepress(toy, "run", api=api)["url"])
    wait_for(browser, "Completed", "Task Runs", "Artifacts")
    time.sleep(3)
    assert bars(browser) == 0


def open_tab(driver, tab: str, seconds: float = 30) -> None:
    from selenium.webdriver.common.by import By

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for element in driver.find_elements(By.XPATH, f"//*[normalize-space(.)='{tab}']"):
            if element.is_displayed():
                element.click()
                return
        time.sleep(0.5)
    pytest.fail(f"no tab {tab}")


def test_the_pictures_of_the_report_in_prefects_pages(lab: Path, api: str, browser) -> None:
    """Shown from the artifact itself: no other host is asked for them."""
    url = json.loads((lab.parent / "run.json").read_text())["url"]
    chosen = {"artifacts": {"flow_run_id": {"any_": [url.rpartition("/")[2]]}}}
    ask = urllib.request.Request(
        f"{api}/artifacts/filter",
        json.dumps(chosen).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(ask, timeout=30) as reply:
        found = {artifact["key"]: artifact["id"] for artifact in json.load(reply)}
    pages = f"{url.partition('/runs/')[0]}/artifacts/artifact"
    browser.get(f"{pages}/{found['report']}")
    wait_for(browser, str(lab / "report/index.html"))
    browser.get(f"{pages}/{found['pictures']}")
    deadline = time.monotonic() + 60
    widths: list[int] = []
    while not any(width >= 600 for width in widths):
        assert time.monotonic() < deadline, widths
        time.sleep(0.2)
        widths = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")


LAYOUT = """
const svgs = [...document.querySelectorAll('figure svg')];
return {
  scroll: document.documentElement.scrollWidth, width: innerWidth,
  svgs: svgs.map(svg => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height]),
  text: Math.min(...svgs.flatMap(svg => [...svg.querySelectorAll('text')])
    .map(text => text.getBoundingClientRect().height)),
  page: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.querySelector('figure svg text')).fill,
  fetched: performance.getEntriesByType('resource').map(entry => entry.name),
};
"""


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (1200, "light")])
def test_the_report_in_a_browser(
    lab_report: dict[str, Any], browser, width: int, scheme: str
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(Path(lab_report["page"]).as_uri())
    seen = browser.execute_script(LAYOUT)
    assert seen["scroll"] <= seen["width"] == width
    assert len(seen["svgs"]) == 6 and all(w > 250 and h > 90 for w, h in seen["svgs"])
    assert seen["text"] >= 10  # pixels from the top of a line to its bottom
    dark = {key: brightness(seen[key]) < 128 for key in ("page", "ink")}
    assert dark == {"page": scheme == "dark", "ink": scheme == "light"}
    assert not [name for name in seen["fetched"] if not name.startswith("data:")]
    assert browser.get_log("browser") == []


def brightness(rgb: str) -> float:
    """Mean of the three channels of `rgb(…)`, 0 to 255."""
    return sum(map(int, re.findall(r"\d+", rgb)[:3])) / 3
