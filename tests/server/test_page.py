"""The page at / in a real browser: it chats, its counters move, errors leave the question to be
changed. Needs playwright (pip install playwright) and Chromium, and says so where there is none."""

import shutil

import pytest

pytest.importorskip("uvicorn")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is tried with playwright, which is not installed"
)

from tests.server.small import answering, save_small  # noqa: E402

pytestmark = pytest.mark.cpu

KEY = "a key"


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            made = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to try the page with: {error.message.splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = save_small(tmp_path_factory.mktemp("small"), context=256)
    with answering(folder, KEY) as address:
        yield address


@pytest.fixture
def page(browser, url):
    context = browser.new_context(color_scheme="dark", viewport={"width": 390, "height": 700})
    context.set_default_timeout(60_000)
    made = context.new_page()
    problems = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    # It is asked for as soon as a call is refused without it.
    made.on("dialog", lambda dialog: dialog.accept(KEY))
    made.goto(url)
    made.get_by_text("small").wait_for()
    yield made
    assert problems == []
    context.close()


def ask(page, text):
    page.fill("#text", text)
    page.keyboard.press("Enter")


def test_it_chats_and_its_counters_move(page):
    ask(page, "Say something.")
    took = page.locator(".took")
    took.first.wait_for()
    assert page.locator(".user").all_text_contents() == ["Say something."]
    assert "0 of them known" in took.first.text_content()
    page.click("#new")
    assert page.locator(".turn").count() == 0
    ask(page, "Say something.")
    took.first.wait_for()
    assert " 0 of them known" not in took.first.text_content()
    # Nobody runs any more, and what was said stays known.
    page.wait_for_function("document.getElementById('running').textContent === '0'")
    used, pages = page.text_content("#pages").replace(",", "").split(" / ")
    assert 0 < int(used) < int(pages)
    assert float(page.text_content("#saved").split(" ")[0]) > 0
    # Narrow as it is, nothing stands beside the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_is_refused_is_said_and_the_question_stays(page):
    ask(page, "x" * 300)
    page.locator(".error").wait_for()
    assert "max_tokens: expected at most 256" in page.text_content(".error")
    assert page.input_value("#text") == "x" * 300
    ask(page, "Shorter.")
    page.locator(".took").wait_for()


def test_an_answer_can_be_stopped(page):
    page.route("**/v1/chat/completions", lambda route: None)
    ask(page, "Go on for ever.")
    page.get_by_role("button", name="Stop").click()
    page.locator(".took").wait_for()
    assert "stopped" in page.text_content(".took")
    page.get_by_role("button", name="Send").wait_for()
