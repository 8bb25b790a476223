"""The page in a real browser: from a dropped file to a trained, tried and exported model."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_lit.run import Run
from qwen_lit.studio import runs

BROWSERS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
BROWSER = next((one for one in BROWSERS if os.access(one, os.X_OK)), None)
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"there is no Chromium in {', '.join(BROWSERS)}")
pytest.importorskip("nicegui", reason="the extra studio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder, rows):
    """A folder with a model, hostile rows to drop, and a run of a hostile name."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "model").symlink_to(model_folder)
    base = folder / "base"
    base.mkdir()
    for one in model_folder.iterdir():
        (base / one.name).write_bytes(one.read_bytes())
    (folder / "<img src=x onerror=hacked=1>").mkdir()
    (folder / "<img src=x onerror=hacked=1>" / ".lock").write_text("")
    dropped = tmp_path_factory.mktemp("elsewhere") / "rows <b>.jsonl"
    content = [*rows, {"instruction": HOSTILE, "output": f"{HOSTILE} & good."}]
    dropped.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in content))
    return folder, dropped


class Page:
    """The server, which can be killed and started again at its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self):
        command = [sys.executable, "-m", "qwen_lit", "studio", "--port", str(self.port), "--folder", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.address = self.process.stdout.readline().split()[1]

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(place):
    page = Page(place[0])
    yield page
    page.kill()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=OPTIONS.split())
        yield opened
        opened.close()


def opened(browser, width=1280):
    """A page that notes every request that leaves this machine."""
    context = browser.new_context(viewport={"width": width, "height": 900}, locale="en-US")
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.elsewhere = []
    page.on(
        "request",
        lambda one: "//127.0.0.1:" in one.url or one.url[:5] in ("data:", "blob:") or page.elsewhere.append(one.url),
    )
    return page


def goto(page, server, tab):
    """Open a view; a server that has just been started may need a moment."""
    for _ in range(100):
        try:
            page.goto(f"{server.address}?tab={tab}")
            break
        except playwright.Error:
            time.sleep(0.1)
    page.get_by_test_id(f"tab_{tab}").wait_for()


def status(page, kind, words="done"):
    playwright.expect(page.get_by_test_id(f"status_{kind}").first).to_have_text(words, timeout=40_000)


def test_from_a_dropped_file_to_a_model_that_is_tried_and_exported(place, server, browser, tmp_path):
    folder, dropped = place
    page = opened(browser)
    goto(page, server, "data")
    with page.expect_file_chooser() as chooser:
        page.locator(".q-uploader__input").evaluate("one => one.click()")
    chooser.value.set_files(str(dropped))
    page.get_by_test_id("source").wait_for()
    page.get_by_test_id("model").fill("base")
    page.get_by_test_id("max_length").fill("256")
    page.get_by_test_id("val_size").fill("0.2")
    page.wait_for_timeout(600)
    page.get_by_test_id("inspect").click()
    status(page, "inspect")
    assert "nothing is lost" in page.get_by_test_id("verdict").inner_text()
    page.get_by_test_id("search").fill("onerror")
    playwright.expect(page.get_by_test_id("row")).to_have_count(1)
    row = page.get_by_test_id("row")
    assert "".join(row.locator(".trained").all_inner_texts()).startswith(f"{HOSTILE} & good.")

    page.get_by_test_id("tab_run").click()
    page.get_by_test_id("output_dir").fill("output/first")
    page.get_by_test_id("epochs").fill("8")
    page.wait_for_timeout(600)
    page.get_by_test_id("fit").click()
    playwright.expect(page.get_by_test_id("step")).to_have_text(re.compile(r"step [1-9]\d* of"), timeout=60_000)
    page.reload()
    playwright.expect(page.get_by_test_id("state")).to_have_text("running")

    run = Run(folder / "output" / "first")
    server.kill()
    assert runs.holder(run.output_dir / ".lock") is not None, "the run has ended with the page"
    server.start()
    goto(page, server, "run")
    playwright.expect(page.get_by_test_id("state")).to_have_text("running")
    page.get_by_test_id("stop").click()
    playwright.expect(page.get_by_test_id("state")).to_have_text("stopped")
    assert runs.checkpoints(run) and runs.holder(run.output_dir / ".lock") is None
    page.get_by_test_id("go_on").click()
    playwright.expect(page.get_by_test_id("state")).to_have_text("finished", timeout=60_000)
    assert page.get_by_test_id("sample").count()

    page.get_by_test_id("tab_try").click()
    # Two of the three that it offers, as each loads all libraries.
    page.get_by_test_id("kind_merge").click()
    page.get_by_test_id("question").fill("What is 1 plus 2?")
    page.get_by_test_id("send").click()
    for kind in ("base", "adapter"):
        playwright.expect(page.get_by_test_id(f"answer_{kind}")).not_to_have_text("…", timeout=40_000)
    page.get_by_test_id("stop_answer").click()
    for kind in ("base", "adapter"):
        page.locator(f"[data-testid=answer_{kind}].answered").wait_for()
    page.get_by_test_id("tab_export").click()
    page.get_by_test_id("export").click()
    # It takes its time, in which the pictures are taken.
    shots(browser, server, tmp_path)
    status(page, "export")
    page.get_by_test_id("verdict_table").wait_for()
    assert page.evaluate("window.hacked") is None
    assert page.elsewhere == []


def shots(browser, server, folder):
    """Pictures to look at, in both languages, wide and narrow; nothing is wider than the screen."""
    for language, width in (("en", 390), ("zh", 390), ("en", 1280), ("zh", 1280)):
        page = opened(browser, width)
        page.context.add_cookies([{"name": "language", "value": language, "url": server.address}])
        wide, chinese = width > 390, language == "zh"
        for tab in ("data", "plan", "run", "try", "export") if wide != chinese else ("run",):
            goto(page, server, tab)
            page.wait_for_timeout(1200 if tab == "run" else 400)
            page.screenshot(path=folder / f"{tab}-{language}-{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (tab, language, width)
        assert page.evaluate("window.hacked") is None and page.elsewhere == []
        page.context.close()
