"""Debian's chromium, driven by selenium: the flags that it needs in a container, and what a page of it has fetched."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def missing() -> str:
    """Say which program is not installed; empty if both are."""
    lacking = [name for name, found in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if found is None]
    return f"not installed: {', '.join(lacking)} (apt-get install chromium chromium-driver)" if lacking else ""


@contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Any]:
    """A fresh browser, with a profile of its own, that notes its requests."""
    from selenium import webdriver

    options, service = webdriver.ChromeOptions(), webdriver.ChromeService(DRIVER)
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, service)
        try:
            # Headless windows cannot be narrower than 500 pixels; the emulated screen can.
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            yield driver
        finally:
            driver.quit()


def requested(driver: Any) -> list[str]:
    """The addresses that the browser has asked for since the last call, without those of the browser's own pages."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    opened = [event["params"] for event in events if event["method"] == "Network.webSocketCreated"]
    found = [params["request"]["url"] for params in sent] + [params["url"] for params in opened]
    return [address for address in found if address.startswith(("http", "ws", "ftp"))]
