"""Headless Chromium for the tests of pages; skips with a line where it or selenium is not installed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

SHOTS = Path(os.environ.get("SURGERY_SCREENSHOTS", Path(__file__).parents[3] / "out" / "screenshots"))
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1440,900",
)  # fmt: skip


class Browser:
    """A browser with one page."""

    def __init__(self) -> None:
        webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
        binary = shutil.which("chromium") or shutil.which("chromium-browser")
        driver = shutil.which("chromedriver")
        if binary is None or driver is None:
            pytest.skip("chromium or chromedriver is not installed (Debian: chromium, chromium-driver)")
        options = webdriver.ChromeOptions()
        self.profile = tempfile.mkdtemp(prefix="surgery-chromium-")
        for flag in (*FLAGS, f"--user-data-dir={self.profile}"):
            options.add_argument(flag)
        options.binary_location = binary
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))

    def open(self, path: Path) -> None:
        self.driver.get("about:blank")
        self.driver.get(path.resolve().as_uri())

    def run(self, script: str, *args: Any) -> Any:
        """Result of JavaScript in the page."""
        return self.driver.execute_script(script, *args)

    def texts(self, selector: str) -> list[str]:
        """Texts of all elements of a CSS selector."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
        )

    def click(self, selector: str, text: str) -> None:
        """Click, with the mouse, the first element of a CSS selector that contains a text."""
        found = [e for e in self.driver.find_elements("css selector", selector) if text in e.text]
        assert found, f"no {selector} has {text!r}: {self.texts(selector)}"
        found[0].click()

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def errors(self) -> list[str]:
        """Lines of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, name: str) -> Path:
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        assert self.driver.save_screenshot(str(path))
        return path

    def close(self) -> None:
        self.driver.quit()
        shutil.rmtree(self.profile, ignore_errors=True)
