"""A real browser without a window, for the tests of pages."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """One browser for all tests: it takes 1 to 2 s to begin."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    quiet = ("--disable-background-networking", "--disable-component-update")  # it calls home else
    shape = ("--headless=new", "--no-sandbox", "--disable-gpu")
    for flag in (*shape, *quiet):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser on an empty page, of the same size and colours for each test."""
    chromium.get("about:blank")
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.set_window_size(1500, 1400)
    chromium.get_log("browser")  # what is read is gone
    return chromium


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
