"""The run in Prefect's own pages, in a real browser."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)


@pytest.fixture
def browser() -> Iterator:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--window-size=1500,1400", "--disable-gpu"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def wait_for(driver, *words: str, seconds: float = 60) -> str:
    """The page's text once it holds all the words."""
    deadline = time.monotonic() + seconds
    text = ""
    while time.monotonic() < deadline:
        text = driver.execute_script("return document.body.innerText") or ""
        if all(word in text for word in words):
            return text
        time.sleep(0.5)
    pytest.fail(f"{words} not on the page, which says: {text[:2000]}")


def test_the_run_its_graph_and_its_states(lab: Path, browser) -> None:
    url = json.loads((lab.parent / "run.json").read_text())["url"]
    browser.get(url)
    wait_for(browser, "Completed", "Task Runs", "Artifacts")
    assert browser.execute_script(
        "const c = document.querySelector('canvas'); return c && c.width * c.height > 10000"
    ), "the run's graph is drawn on a canvas"
    for tab, words in {
        "Task Runs": ["quantize", "finetune@travel", "package", "Completed"],
        "Artifacts": ["summary", "stages"],
    }.items():
        open_tab(browser, tab)
        wait_for(browser, *words)


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
