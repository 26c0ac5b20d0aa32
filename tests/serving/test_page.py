"""The page in a headless Chromium: prompt, text by block, bits that commit, stop, refusals; nothing from outside."""

import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Where the test leaves its picture, to look at it.
PICTURES = os.environ.get("BITLM_TEST_PICTURES")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


@pytest.fixture
def page(server):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="light")
        opened.set_default_timeout(60_000)
        playwright.expect.set_options(timeout=60_000)
        opened.problems, opened.hosts = [], set()
        opened.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.on("request", lambda request: opened.hosts.add(request.url.split("/")[2]))
        opened.goto(server.url)
        yield opened
        browser.close()


def test_the_page(page, server, tmp_path):
    expect = pytest.importorskip("playwright.sync_api").expect
    status = page.locator("#status")
    expect(page.locator("#about")).to_contain_text("4 tokens × 9 bits")
    expect(page.locator("#title")).to_have_text("toy")
    assert page.locator("#grid .cell").count() == 36
    # As someone who cannot see it would find the fields: by their labels.
    page.get_by_label("Prompt").fill("abc def")
    page.get_by_label("New tokens at most").fill("24")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Denoising steps").fill("6")
    page.get_by_label("Guidance").fill("1.5")
    page.get_by_label("Shown per step").fill("10")
    # Every colour that the first cell goes through, to see that the bits move.
    page.evaluate(
        """() => { window.colours = new Set(); const cell = document.querySelector('#grid .slot:last-child .cell');
        new MutationObserver(() => colours.add(cell.style.background)).observe(cell, {attributes: true}); }"""
    )
    page.get_by_role("button", name="Generate").click()
    expect(status).to_contain_text("done")
    expected = server.complete(seed=5, max_tokens=24, num_steps=6, guidance=1.5).choices[0].text
    assert page.evaluate("document.getElementById('text').textContent") == "abc def" + expected
    assert page.evaluate("colours.size") > 6
    expect(status).to_contain_text("tokens/s")
    expect(status).to_contain_text("seed 5")
    assert page.locator("#past figure").count() == 7  # one of the prompt's last three tokens and a new one, six more
    picture = Path(PICTURES or tmp_path) / "serve.png"
    page.screenshot(path=str(picture))
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # A refusal is shown.
    page.get_by_label("Prompt").fill("")
    page.get_by_role("button", name="Generate").click()
    expect(status).to_contain_text("prompt is empty")
    # Stop ends it here and in the engine.
    page.get_by_label("Prompt").fill("abc")
    page.get_by_label("New tokens at most").fill("500")
    page.get_by_label("Denoising steps").fill("60")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#past figure").first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(status).to_contain_text("stopped")
    server.wait_for(lambda: not server.service.worker.engine.has_work)
    assert page.problems == [] and page.hosts == {server.url.split("/")[2]}
