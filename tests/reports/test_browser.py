"""Report pages in a browser: pictures, sorting by headings, contrast."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="a browser: install selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("a browser: install chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def shown(browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> Any:
    """The browser with a page in it, as wide as that, in light or dark."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(file.as_uri())
    return browser


PICTURES = """
return [...document.querySelectorAll("img, svg[role=img]")].map(each => {
  const box = each.getBoundingClientRect();
  const loaded = each.tagName === "IMG" ? each.complete && each.naturalWidth > 0 : true;
  return loaded && box.width > 50 && box.height > 50;
});
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "search", "comparison"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_picture_is_there_and_the_page_fits(
    browser: Any, pages: dict[str, Path], kind: str, width: int
) -> None:
    shown(browser, pages[kind], width)
    assert browser.get_log("browser") == []
    pictures = browser.execute_script(PICTURES)
    assert len(pictures) >= 6
    assert all(pictures)
    page = "document.documentElement"
    wide, seen = browser.execute_script(f"return [{page}.scrollWidth, {page}.clientWidth]")
    assert wide == seen <= width


COLUMN = """
const table = [...document.querySelectorAll("table.sortable")].at(-1);
const at = [...table.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === arguments[0]);
return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
"""


@pytest.mark.slow
def test_headings_sort_the_table_by_mouse_and_by_key(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By

    shown(browser, pages["search"])

    def heading(name: str) -> Any:
        found = browser.find_elements(By.XPATH, f"//th[normalize-space()='{name}']/button")
        return found[-1]

    def column(name: str) -> list[str]:
        values: list[str] = browser.execute_script(COLUMN, name)
        return values

    seconds = column("seconds")
    assert sorted(seconds, key=float) != sorted(seconds)  # so that numbers are no words
    heading("val_accuracy").click()
    assert column("val_accuracy") == sorted(column("val_accuracy"), key=float)
    heading("seconds").send_keys("\ue007")  # Enter
    assert column("seconds") == sorted(seconds, key=float)
    heading("seconds").send_keys(" ")
    assert column("seconds") == sorted(seconds, key=float, reverse=True)
    states = browser.execute_script(
        "return [...document.querySelectorAll('[aria-sort]')].map(each => "
        "[each.textContent.trim(), each.getAttribute('aria-sort')])"
    )
    assert states == [["seconds", "descending"]]
    for _ in range(2):
        heading("reason").click()
        assert column("reason")[-4:] == [""] * 4  # those without one stay after the others
    assert browser.get_log("browser") == []


CONTRAST = """
const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = colour => numbers(colour).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const between = (x, y) => (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
const ground = getComputedStyle(document.querySelector("section")).backgroundColor;
const card = light(ground);
const texts = [...document.querySelectorAll("main svg text, main p, main td, main th, main h2")];
const colour = each => getComputedStyle(each)[each.tagName === "text" ? "fill" : "color"];
// A cell of the confusion matrix lets the ground shine through.
const cells = [...document.querySelectorAll("path[style*='--hue']")].map(each => {
  const {fill, fillOpacity} = getComputedStyle(each);
  const mix = (c, i) => c * fillOpacity + numbers(ground)[i] * (1 - fillOpacity);
  return between(light(`rgb(${numbers(fill).map(mix)})`), light(colour(document.body)));
});
return [card, Math.min(...texts.map(each => between(light(colour(each)), card)), ...cells),
        cells.length];
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "search", "comparison"])
def test_text_can_be_read_in_light_and_in_dark(
    browser: Any, pages: dict[str, Path], kind: str
) -> None:
    cards = []
    for scheme in ("light", "dark"):
        shown(browser, pages[kind], scheme=scheme)
        card, contrast, cells = browser.execute_script(CONTRAST)
        assert cells == (11 if kind == "run" else 0)  # those with images
        assert contrast >= 4.5  # WCAG 2, level AA
        cards.append(card)
    assert cards[0] > 0.8
    assert cards[1] < 0.05
