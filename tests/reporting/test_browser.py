"""Reports opened in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from apot_fat import quantize
from apot_fat.checkpoint import save_packed
from apot_fat.models import create_model
from apot_fat.reporting.contents import build_report
from apot_fat.reporting.page import page
from apot_fat.reporting.subject import load_subjects

if TYPE_CHECKING:
    from tests.reporting.conftest import Demo

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not binary or not chromedriver:
        pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def file(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(demo.report), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of one network with the same bits everywhere and two without."""
    folder = tmp_path_factory.mktemp("mixed")
    overrides: tuple[dict[str, dict[str, int]], ...] = ({}, {"layer1.*": {"bits": 5}}, {"layer1.*": {"act_bits": 8}})
    for number, own in enumerate(overrides):
        model = create_model("resnet20", bits=32)
        quantize(model, bits=3, overrides=own)
        save_packed(model.eval(), folder / f"{number}.safetensors")
    subjects = [load_subjects(folder / f"{number}.safetensors")[0] for number in range(3)]
    path = folder / "report.html"
    path.write_text(page(build_report(subjects)), encoding="utf-8")
    return path


def opened(browser: Any, file: Path, width: int, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(file.as_uri())
    drawn(browser, 1)


def drawn(browser: Any, times: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    counter = "return Number(document.documentElement.dataset.drawn || 0)"
    WebDriverWait(browser, 60, 0.05).until(lambda driver: driver.execute_script(counter) >= times)


def said(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (390, "light"), (390, "dark")])
def test_a_page_opens_without_error_scrolling_or_request(browser: Any, file: Path, width: int, scheme: str) -> None:
    opened(browser, file, width, scheme)
    assert said(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.innerWidth") == width
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} <= {file.as_uri()}
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
    empty = """return [...document.querySelectorAll('.chart:not([hidden])')].filter((chart) => {
        const svg = chart.querySelector('svg');
        return !svg || svg.clientWidth > chart.clientWidth + 1;
    }).length"""
    assert browser.execute_script(empty) == 0


def test_controls_work_from_the_keyboard(browser: Any, file: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, file, 1400, "light")
    label = "return document.querySelector('[data-chart=weight-histogram]').getAttribute('aria-label')"
    assert "layer1.0.conv1 in APoT 3 bits" in browser.execute_script(label)
    browser.find_element(By.CSS_SELECTOR, '[data-select="layer"]').send_keys(Keys.ARROW_DOWN)
    drawn(browser, 2)
    assert "layer1.0.conv2 in APoT 3 bits" in browser.execute_script(label)
    spectrum = browser.find_element(By.CSS_SELECTOR, '[data-chart="spectrum"]')
    assert not spectrum.is_displayed()
    browser.find_element(By.CSS_SELECTOR, '[data-select="run"]').send_keys(Keys.ARROW_DOWN)
    drawn(browser, 3)
    assert spectrum.is_displayed()
    lines = "return document.querySelectorAll('[data-chart=error] path[aria-roledescription=\"line mark\"]').length"
    before = browser.execute_script(lines)
    browser.find_element(By.CSS_SELECTOR, '[data-show="0"]').send_keys(Keys.SPACE)
    drawn(browser, 4)
    assert browser.execute_script(lines) == before - 2 > 0  # one network's training and test line
    head = browser.find_element(By.CSS_SELECTOR, '#costs [data-of-run="2"] thead th:nth-child(4) button')
    column = "document.querySelectorAll('#costs [data-of-run=\"2\"] tbody td:nth-child(4)')"
    cells = f"return [...{column}].map((cell) => cell.dataset.value)"
    for order in (sorted, lambda values: sorted(values, reverse=True)):
        head.send_keys(Keys.ENTER)
        values = [int(value) for value in browser.execute_script(cells)]
        assert values == order(values)
    assert said(browser) == []


def test_a_figure_is_zoomed_and_moved_from_the_keyboard(browser: Any, file: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    opened(browser, file, 1400, "light")
    figure = browser.find_element(By.CSS_SELECTOR, '[data-chart="thresholds-layers"]')

    def names() -> set[str]:
        labels = "return [...arguments[0].querySelector('.role-axis-label').children].map((text) => text.textContent)"
        return set(browser.execute_script(labels, figure))

    def after(key: str) -> set[str]:
        before = names()
        figure.send_keys(key)
        WebDriverWait(browser, 10, 0.05).until(lambda driver: names() != before)
        return names()

    whole = names()
    assert {"1", "20"} <= whole
    assert not {"1", "20"} & after("+")
    assert not {"1", "20"} & after("+")
    assert "20" in after(Keys.ARROW_RIGHT) | after(Keys.ARROW_RIGHT)
    assert after("0") == whole
    assert said(browser) == []


def test_bits_of_each_layer_come_and_go_with_their_network(browser: Any, mixed_file: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, mixed_file, 1400, "light")
    bars = '[data-chart="bits-layers-{}"] path[aria-roledescription=bar]'
    for number, run in ((2, 1), (3, 2)):
        found = browser.find_elements(By.CSS_SELECTOR, bars.format(number))
        assert len(found) == 22
        assert {bar.get_attribute("fill") for bar in found} == {f"var(--run-{run})"}
    figure = browser.find_element(By.CSS_SELECTOR, '[data-chart="bits-layers-2"]')
    browser.find_element(By.CSS_SELECTOR, '[data-show="1"]').send_keys(Keys.SPACE)
    drawn(browser, 2)
    assert not figure.is_displayed()
    assert len(browser.find_elements(By.CSS_SELECTOR, bars.format(3))) == 22
    browser.find_element(By.CSS_SELECTOR, '[data-show="1"]').send_keys(Keys.SPACE)
    drawn(browser, 3)
    assert figure.is_displayed()
    assert said(browser) == []
    opened(browser, mixed_file, 390, "dark")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert said(browser) == []
