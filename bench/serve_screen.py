"""Serve fashion-dit and an artifact of it, draw an image in a browser, and keep a picture of the page.

python bench/serve_screen.py --artifact w8a8 --out docs/images/serve.png --json bench/results/serve-screen.json
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdit.runtime.target import Target
from tqdit.serving import gallery
from tqdit.serving.server import served
from tqdit.system.environment import environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "serving"))

from browser import browser

WIDTH = 1200  # pixels; the height is the page's
PATIENCE = 300.0  # seconds for a drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--name", default="sneaker", help="the class that is drawn")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    models = gallery.load(["fashion-dit", args.artifact], Target(device=args.device))
    with served(models) as address, browser(args.width, 1000) as driver:
        driver.get(address)
        _until(lambda: driver.find_elements("id", "draw"))
        driver.find_element("css selector", "#condition input").send_keys("\ue009a\ue000", args.name, "\ue007")
        driver.find_element("id", "draw").click()
        _until(lambda: "dB" in _text(driver, 1))
        time.sleep(1.0)  # the last picture fades in
        args.out.write_bytes(_picture(driver, args.width))
        shown = [_text(driver, number).splitlines() for number in range(len(models.models))]
    result = {"environment": environment(args.device), "class": args.name, "shown": shown}
    args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _text(driver: Any, number: int) -> str:
    return driver.find_element("id", f"model-{number}").text


def _picture(driver: Any, width: int) -> bytes:
    """Return the whole page as a PNG."""
    height = driver.execute_script("return document.querySelector('.gradio-container').scrollHeight")
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    time.sleep(0.5)
    return driver.get_screenshot_as_png()


def _until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the page was not ready in {PATIENCE:g} seconds")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
