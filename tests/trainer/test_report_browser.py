"""The report opened from disk in a real browser: it is drawn, the console is empty, nothing is fetched."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from report_cases import build

from prism.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# nothing listens on port 9: requests fail
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--hide-scrollbars --enable-logging=stderr --proxy-server=http://127.0.0.1:9"
)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH")
    return found


def shown(browser, page, folder):
    """Returns a picture of a page, its messages on the console, and the addresses that it requested."""
    picture, log = folder / "page.png", folder / "net.json"
    options = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    options += [f"--screenshot={picture}", "--window-size=1200,3000"]
    done = subprocess.run(
        [browser, *QUIET.split(), *options, page.as_uri()], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    # requests of the browser itself have no page as their origin
    started = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = [one["url"] for one in started if one.get("initiator", "not an origin") != "not an origin"]
    return np.asarray(Image.open(picture).convert("RGB")), re.findall(r"CONSOLE.*", done.stderr), asked


def test_a_page_that_fetches_and_fails_is_noticed(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://images.invalid/x.png"><script>undefined.x</script>')
    _, said, asked = shown(browser, page, tmp_path)
    assert asked == ["http://images.invalid/x.png"]
    assert any("Cannot read properties of undefined" in line for line in said)


def test_the_report_opens_from_the_disk(browser, tmp_path):
    page = write_report(build(tmp_path / "run"))
    pixels, said, asked = shown(browser, page, tmp_path)
    assert said == [] and asked == []
    assert pixels.shape == (3000, 1200, 3)
    # text or drawings appear in every 400 pixels of the window's height
    drawn = np.flatnonzero((pixels != pixels[0, 0]).any((1, 2)))
    assert drawn[0] < 100 and np.diff(drawn).max() < 400 and drawn[-1] > 2600
    # nothing is cut off at the right edge: the page's margin is empty
    assert (pixels[:, -6:] == pixels[0, 0]).all()
    # the colours of the lines are there
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x8A, 0x63)):
        assert (pixels == colour).all(-1).sum() > 200
