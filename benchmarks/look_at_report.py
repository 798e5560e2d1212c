"""Opens a report in headless Chromium, uses it, and keeps what it looks like: light and dark, wide and narrow, printed.

    /venvs/selenium/bin/python benchmarks/look_at_report.py RUN/report.html --pictures FOLDER [--output RESULT.json]

Needs Debian's chromium and chromium-driver, and in an environment of its own `pip install selenium`. Fails unless the
page opens without a word in the console and without a request for anything but itself, a click on a point of the front
and the arrow keys show that point's layers, and a cell of a heat map is told. Not a test of the suite, which has no browser.
"""  # noqa: E501

from __future__ import annotations

import argparse
import base64
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip
WIDTHS = {"wide": 1280, "narrow": 390}


def browser(profile: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))


def requests(driver: webdriver.Chrome) -> list[str]:
    """What was asked for since this was last called, the page itself and what is written in it left out."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if url != driver.current_url.split("#")[0] and not url.startswith("data:")]


def layers(driver: webdriver.Chrome) -> list[str]:
    """What the strip shows, site by site."""
    return [bar.get_attribute("data-told") for bar in driver.find_elements(By.CSS_SELECTOR, "#strip [data-site]")]


def use(driver: webdriver.Chrome, data: dict[str, Any]) -> dict[str, Any]:
    """Clicks, presses keys and points; what came of it. ``data``: what the page's script draws from."""
    found: dict[str, Any] = {}
    output = driver.find_element(By.CSS_SELECTOR, ".selected output")
    first, dots = layers(driver), driver.find_elements(By.CSS_SELECTOR, "#front [data-point]")
    place = len(dots) // 4
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", dots[place])
    ActionChains(driver).move_to_element(dots[place]).click().perform()
    checked = driver.find_element(By.CSS_SELECTOR, "#front [aria-checked=true]")
    picked = data["points"][int(checked.get_attribute("data-point"))]
    assert output.text == picked["said"] != data["points"][data["chosen"]]["said"], output.text
    names = [data["blocks"][block][0] for block in picked["blocks"]]
    shown = layers(driver)
    assert all(f": {name}, " in told for name, told in zip(names, shown, strict=True)), shown
    assert shown != first
    found["click"] = {"point": picked["said"], "layers": shown}
    ActionChains(driver).send_keys(Keys.ARROW_RIGHT).perform()
    moved = driver.find_element(By.CSS_SELECTOR, "#front [aria-checked=true]")
    assert moved == driver.switch_to.active_element and moved != checked
    found["arrow key"] = output.text
    driver.find_element(By.CSS_SELECTOR, ".selected button").click()
    assert layers(driver) == first
    chart = driver.find_element(By.CSS_SELECTOR, "#choices .frame, #choices .bar")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(driver).move_to_element(chart).perform()
    told = driver.find_element(By.CSS_SELECTOR, ".tip")
    assert told.is_displayed() and told.text.startswith("layer "), told.text
    found["heat map"] = told.text
    ActionChains(driver).move_to_element(driver.find_element(By.TAG_NAME, "h1")).perform()
    return found


def picture(driver: webdriver.Chrome, path: Path, scheme: str, width: int) -> None:
    """Of the whole page."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_script("scrollTo(0, 0)")
    beyond = driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert beyond <= 0, f"{path.name}: the page is {beyond} pixels wider than the window"
    height = driver.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))


def part(driver: webdriver.Chrome, path: Path, first: str, last: str) -> None:
    """Of the sections from ``first`` to ``last``, at the width of the last picture."""
    ends = "return [...arguments].map(one => document.getElementById(one).getBoundingClientRect())"
    top, bottom = driver.execute_script(ends, first, last)
    clip = {
        "x": top["x"] - 16,
        "y": top["y"] - 16,
        "width": top["width"] + 32,
        "height": bottom["bottom"] - top["y"] + 32,
    }
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True}
    )
    path.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--pictures", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, metavar="RESULT")
    options = parser.parse_args()
    options.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        driver = browser(profile)
        try:
            driver.get("about:blank")
            driver.get_log("performance")  # of the browser's own first page
            driver.get(options.report.resolve().as_uri())
            data = json.loads(driver.find_element(By.ID, "data").get_attribute("textContent"))
            choice = data is not None and data["chosen"] is not None and len(data["points"]) > 4
            found = use(driver, data) if choice else {}
            for scheme in ("dark", "light"):
                for name, width in reversed(WIDTHS.items()):
                    picture(driver, options.pictures / f"{scheme}-{name}.png", scheme, width)
            if choice:
                part(driver, options.pictures / "front.png", "what-fits", "layers")
            printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
            (options.pictures / "printed.pdf").write_bytes(base64.b64decode(printed["data"]))
            result = {
                "date": str(date.today()),
                "chromium": driver.capabilities["browserVersion"],
                "bytes": options.report.stat().st_size,
                "console": [entry["message"] for entry in driver.get_log("browser")],
                "requests": requests(driver),
                **found,
            }
        finally:
            driver.quit()
    assert not result["console"], result["console"]
    assert not result["requests"], result["requests"]
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
