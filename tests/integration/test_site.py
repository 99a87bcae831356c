"""The documentation site, as a reader meets it: in a browser, with no network but this machine's.

Needs mkdocs, Chromium and its driver; skipped where one of them is absent.
"""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ARGUMENTS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
).split()


pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="there is no Chromium, or no driver for it"
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that does not write a line for each request."""

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site, strictly, and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Serve the site and return where."""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Start a browser whose requests to anywhere but this machine fail, and are told."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ARGUMENTS:
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


def pages_of(site):
    """Return the paths of all pages, as a browser asks for them."""
    files = sorted(file.relative_to(site) for file in site.rglob("*.html"))
    return [str(file).removesuffix("index.html") for file in files if file.name != "404.html"]


def screen(browser, width, scheme="light"):
    """Make the screen so wide, and let the reader prefer a scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def requests_of(browser):
    """Yield the address of everything that the browser has asked for since the last call."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


@pytest.fixture(scope="module")
def visited(site, address, browser):
    """Open every page on a phone, and tell what it says, asks for, links to, and its width."""
    links = "return [...document.querySelectorAll('a[href]')].map(link => link.href)"
    told = {}
    screen(browser, 360)
    browser.get(f"{address}/")
    for kind in ("browser", "performance"):  # what the browser did before belongs to no page
        browser.get_log(kind)
    for page in pages_of(site):
        browser.get(f"{address}/{page}")
        linked = browser.execute_script(links)
        told[page] = {
            "wide": browser.execute_script("return document.documentElement.scrollWidth"),
            "errors": [log for log in browser.get_log("browser") if log["level"] == "SEVERE"],
            "requests": [url for url in requests_of(browser) if url.startswith("http")],
            "links": {url for url in linked if url.startswith(address)},
        }
    return told


def test_pages_load_without_errors_and_ask_nobody_else(address, visited):
    assert len(visited) > 40
    for page, told in visited.items():
        assert not told["errors"], (page, told["errors"])
        assert not [url for url in told["requests"] if not url.startswith(address)], page


def test_links_lead_to_what_is_there(site, address, visited):
    """Links to other pages and to places on them; a strict build looks at those in Markdown."""
    for url in set().union(*(told["links"] for told in visited.values())):
        path, _, place = url.removeprefix(f"{address}/").partition("#")
        file = site / path
        file = file / "index.html" if file.is_dir() else file
        assert file.is_file(), url
        if place and file.suffix == ".html":
            assert f'id="{place}"' in file.read_text(encoding="utf-8"), url


def test_pages_fit_on_a_phone(visited):
    assert not {page: told["wide"] for page, told in visited.items() if told["wide"] > 360}


def test_the_search_finds_a_ratio(address, browser):
    screen(browser, 1280)
    browser.get(f"{address}/")
    browser.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys("ratio")
    found = ".md-search-result__link"
    WebDriverWait(browser, 20).until(lambda one: one.find_elements(By.CSS_SELECTOR, found))
    links = [link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, found)]
    assert any("what-a-ratio-means" in link for link in links)


BRIGHTNESS = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"


def brightness(browser, selector, colour):
    """Return the sum of red, green and blue of what is found."""
    told = browser.execute_script(BRIGHTNESS, selector, colour)
    return sum(int(part) for part in re.findall(r"\d+", told)[:3])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_formulas_and_diagrams_show_in_both_schemes(address, browser, scheme):
    screen(browser, 1280, scheme)
    browser.get(f"{address}/explanation/how-prunenet-works/")
    formulas = browser.find_elements(By.CSS_SELECTOR, ".arithmatex")
    assert len(formulas) > 20
    assert len(browser.find_elements(By.CSS_SELECTOR, ".arithmatex > .katex, .katex-display")) >= 20
    assert not browser.find_elements(By.CSS_SELECTOR, ".katex-error")
    ground = brightness(browser, "body", "backgroundColor")
    assert (ground > 600) == (scheme == "light")
    assert abs(ground - brightness(browser, ".katex", "color")) > 250
    browser.get(f"{address}/explanation/the-design/")
    words = browser.find_element(By.CSS_SELECTOR, "article svg[viewBox] text")
    assert words.size["width"] > 20
    assert abs(ground - brightness(browser, "article svg[viewBox] text", "fill")) > 250
