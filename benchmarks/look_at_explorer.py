"""The notebook in JupyterLab, in headless Chromium: a slider moves, the architecture changes, a point is clicked.

Runs in an environment of its own (``pip install jupyterlab ipywidgets anywidget playwright``; Chromium is the
system's), the kernel in puzzle's::

    python benchmarks/look_at_explorer.py runs/demo shots --kernel .venv/bin/python

Works on copies of run and notebook. Asserts what it sees, writes screenshots, light and dark, and prints what it took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "pareto.ipynb"
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SLOW_MS = 150_000


@dataclass
class Seen:
    """What the page said and asked for: errors in its console, and requests to anywhere else."""

    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


@contextlib.contextmanager
def served(folder: Path, run: Path, kernel: Path, theme: str) -> Iterator[str]:
    """JupyterLab on ``folder``; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = folder / ".jupyter"
    spec = home / "data" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [str(kernel.absolute()), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": THEMES[theme]}))
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    whole = home / "settings" / "@jupyterlab" / "notebook-extension"
    whole.mkdir(parents=True)
    (whole / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))  # all cells are there
    environment = {
        **os.environ,
        "PUZZLE_RUN": str(run),
        "JUPYTER_PATH": str(home / "data"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "own"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={folder}"]  # fmt: skip
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api", server, home / "log")
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5)
            return
        time.sleep(0.2)
    sys.exit(f"JupyterLab did not start:\n{log.read_text()}")


def watched(page: Page, address: str) -> Seen:
    seen = Seen()
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith((address, "data:", "blob:", "ws:")) else seen.foreign.append(asked.url)
        ),
    )
    return seen


def label(page: Page, name: str) -> str:
    """What the strip called ``name`` says to those who cannot see it."""
    return page.locator(f'.puzzle svg[aria-label^="{name}:"]').first.get_attribute("aria-label") or ""


def changed(page: Page, name: str, before: str) -> str:
    """The strip's label once it is another one."""
    wanted = f'() => {{ const s = document.querySelector(`.puzzle svg[aria-label^="{name}:"]`); '
    page.wait_for_function(f"{wanted} return s && s.getAttribute('aria-label') !== {json.dumps(before)}; }}")
    return label(page, name)


def drag(page: Page, handle: Locator, by_pixels: float) -> None:
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by_pixels, y, steps=5)
    page.mouse.up()


def look(page: Page, address: str, out: Path, theme: str) -> None:
    seen = watched(page, address)
    begin = time.perf_counter()
    page.goto(f"{address}/lab/tree/{NOTEBOOK.name}")
    page.get_by_text("| Idle").wait_for()  # before, there is no kernel to run anything
    page.keyboard.press("Control+B")  # without the list of files
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".puzzle .js-plotly-plot .scatterlayer").wait_for()
    page.locator(".jp-Notebook .jp-CodeCell").last.locator(".jp-OutputArea-output").first.wait_for()
    print(f"{theme}: the whole notebook, with JupyterLab's start, {time.perf_counter() - begin:.0f} s")
    explorer = page.locator(".jp-OutputArea-output:has(.puzzle .js-plotly-plot)").first
    explorer.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)
    explorer.screenshot(path=out / f"explorer-{theme}.png")

    before = label(page, "chosen")
    handle = page.locator(".puzzle .noUi-handle").first
    drag(page, handle, -40)
    after = changed(page, "chosen", before)
    print(f"{theme}: the slider moved\n  {before}\n  {after}")
    points = page.locator(".puzzle .scatterlayer .trace").first.locator(".point")
    point = points.nth(points.count() * 2 // 3)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    compared = changed(page, "compared", "")
    print(f"{theme}: a point was clicked\n  {compared}")
    page.wait_for_timeout(2000)
    explorer.screenshot(path=out / f"compared-{theme}.png")

    drag(page, handle, -1000)
    page.get_by_text("Nothing fits here").first.wait_for()
    page.wait_for_timeout(2000)
    explorer.screenshot(path=out / f"infeasible-{theme}.png")
    page.get_by_role("button", name=re.compile("to the nearest")).click()
    page.get_by_text("Nothing fits here").first.wait_for(state="detached")
    solution = page.locator(".jp-OutputArea-output:has(.puzzle > svg)").first
    solution.scroll_into_view_if_needed()
    solution.screenshot(path=out / f"solution-{theme}.png")
    assert not seen.errors, seen.errors
    assert not seen.foreign, seen.foreign
    print(f"{theme}: no error in the console, no request to anywhere else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run; it is copied")
    parser.add_argument("out", type=Path, help="folder for the screenshots")
    parser.add_argument("--kernel", type=Path, default=Path(sys.executable), help="the interpreter that has puzzle")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="its executable")
    parser.add_argument("--theme", action="append", choices=[*THEMES], help="default: both")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for theme in options.theme or THEMES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            shutil.copytree(options.run, folder / "runs" / "demo")
            shutil.copyfile(NOTEBOOK, folder / NOTEBOOK.name)
            with served(folder, folder / "runs" / "demo", options.kernel, theme) as address, sync_playwright() as play:
                browser = play.chromium.launch_persistent_context(
                    folder / "profile",
                    executable_path=options.chromium,
                    args=FLAGS,
                    viewport={"width": 1500, "height": 1600},
                )
                page = browser.new_page()
                page.set_default_timeout(SLOW_MS)
                try:
                    look(page, address, options.out, theme)
                except BaseException:
                    page.screenshot(path=options.out / f"failed-{theme}.png")
                    raise
                browser.close()


if __name__ == "__main__":
    main()
