"""The page of `olivepress serve`, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import needs_browser, wait_for
from tests.serving import ask, slow, text_of

if TYPE_CHECKING:
    from serve.engine import Engine

pytestmark = [needs_browser, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def page(served_package: Path, browser: Any) -> Iterator[tuple[Any, str, Engine]]:
    with slow(served_package, 0.02, slots=4, waiting=4) as (url, engine):
        browser.get(url)
        wait_for(browser, "3 models, 256 tokens")
        yield browser, url, engine


def write(driver: Any, prompt: str, **settings: int) -> None:
    """Type a question and press Enter."""
    for name, value in settings.items():
        driver.execute_script(f"document.getElementById('{name}').value = {value}")
    box = driver.find_element("id", "prompt")
    box.send_keys(prompt + "\n")


def choose(driver: Any, model: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(driver.find_element("id", "model")).select_by_visible_text(model)


def answers(driver: Any) -> list[tuple[str, str]]:
    """Each answer's model and text."""
    return [
        tuple(
            driver.execute_script(
                "return [...arguments[0].querySelectorAll('h2, p')].map(e => e.textContent)", each
            )
        )
        for each in driver.find_elements("css selector", ".answer")
    ]


def test_a_question_is_answered_as_the_api_does(page: tuple[Any, str, Engine]) -> None:
    """Typing, streaming, switching the model, and the base beside it."""
    driver, url, _ = page
    expected = {
        name: text_of(ask(url, model=name, max_tokens=60)) for name in ("base", "one", "two")
    }
    choose(driver, "two")
    write(driver, "Hello", max_tokens=60)
    lengths = set()
    for _ in range(400):
        if found := answers(driver):
            lengths.add(len(found[0][1]))
        if "tokens/s" in driver.execute_script("return document.body.innerText"):
            break
    assert len(lengths) > 3  # it came in pieces
    assert answers(driver) == [("two", expected["two"])]
    choose(driver, "one")
    driver.find_element("id", "beside").click()
    write(driver, "Hello")
    wait_for(driver, "Hello\n", seconds=1)
    for _ in range(400):
        if driver.execute_script("return document.querySelectorAll('.writing').length") == 0:
            break
    assert answers(driver)[1:] == [("base", expected["base"]), ("one", expected["one"])]


def test_an_error_is_shown_and_the_page_goes_on(page: tuple[Any, str, Engine]) -> None:
    driver, _, engine = page
    choose(driver, "base")
    write(driver, "long " * 80)
    text = wait_for(driver, "maximum context length is 256")
    assert "Traceback" not in text
    assert driver.find_elements("css selector", ".answer.failed")
    write(driver, "Hello", max_tokens=2)
    wait_for(driver, "2 tokens")
    write(driver, "Hello", max_tokens=200)
    driver.find_element("id", "stop").click()
    wait_for(driver, "stopped")
    for _ in range(200):
        if engine.scheduler.running == 0:
            break
        driver.execute_script("return 1")
    assert engine.scheduler.running == 0


def test_card_and_lineage_are_a_click_away(page: tuple[Any, str, Engine]) -> None:
    driver, *_ = page
    driver.find_element("link text", "Model card").click()
    wait_for(driver, "# The card")
    driver.find_element("css selector", "dialog button").click()
    driver.find_element("link text", "Lineage").click()
    wait_for(driver, "python -m stages.export")


def test_it_fits_a_phone(page: tuple[Any, str, Engine]) -> None:
    driver, *_ = page
    driver.set_window_size(500, 800)  # as narrow as a window can be; the page is 360 wide
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    driver.find_element("id", "beside").click()
    write(driver, "Hello", max_tokens=60)
    wait_for(driver, "tokens/s")
    wide = driver.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 360
