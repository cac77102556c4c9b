"""The page at `/`, used in a real browser over a server that runs: what it asks, shows, keeps, and leaves to others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from helpers.browser import Page, browser
from helpers.places import ROOT
from helpers.serving import NAME, Served, served
from pixtral_runtime import Model
from pixtral_runtime.server.page import HEADERS

PICTURES = sorted((ROOT / "tests" / "data" / "images").glob("*.png"))
QUESTION = "what shape is in the image?"
NASTY = (
    "<img src=x onerror=\"document.title='broken'\"><b>bold</b></p><script>document.title='broken'</script> & \"so on\""
)


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_three_files_of_this_server_and_nothing_inline(server: Served) -> None:
    parser = Elements()
    parser.feed(server.get("/").text)
    sources = [str(about.get("src") or about.get("href")) for _, about in parser.found if {"src", "href"} & set(about)]
    assert sources == ["data:,", "page.css", "page.js"]
    assert [tag for tag, about in parser.found if any(name.startswith(("on", "style")) for name in about)] == []
    kinds = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
    for path, kind in kinds.items():
        response = server.get(path)
        assert response.headers["content-type"] == f"{kind}; charset=utf-8"
        assert HEADERS.items() <= response.headers.items()
        assert not re.search(r"https?://|//\w+\.\w+/", response.text)
    policy = dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in HEADERS["content-security-policy"]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(tab: Page, server: Served) -> Page:
    tab.complaints.clear()
    tab.open(server.url)
    tab.until("at('model').value || at('notice').textContent")
    return tab


def ask(page: Page, text: str) -> None:
    """Type a question, send it by the keyboard, and wait until the answer is over."""
    page.run("at('question').focus()")
    page.type(text)
    page.press("Enter")
    page.until("asking === null")


def last(page: Page, selector: str) -> list[str]:
    """The text of parts of the newest answer."""
    found: list[str] = page.run(
        f"[...at('talk').lastElementChild.querySelectorAll('{selector}')].map(one => one.textContent)"
    )
    return found


def completed(server: Served, messages: object, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = server.post("/v1/chat/completions", {"messages": messages} | options).json()
    return found


def test_a_conversation_about_pictures_is_answered_as_by_the_api(page: Page, server: Served) -> None:
    page.run("at('system').value = 'Be exact.'")
    page.choose("#files", PICTURES[:2])
    page.until("pictures.length === 2")
    ask(page, QUESTION)
    page.run("at('detail').value = 'low'")
    page.choose("#files", PICTURES[2:3])
    page.until("pictures.length === 1")
    ask(page, "and here?")
    conversation = page.run("conversation")
    assert [message["role"] for message in conversation] == ["user", "assistant"] * 2
    parts = [part for message in conversation[::2] for part in message["content"]]
    assert [part["image_url"]["detail"] for part in parts if part["type"] == "image_url"] == ["high", "high", "low"]
    assert [part["text"] for part in parts if part["type"] == "text"] == [QUESTION, "and here?"]
    system = {"role": "system", "content": "Be exact."}
    for number, end in enumerate((1, 3)):
        found = completed(server, [system, *conversation[:end]])
        said = found["choices"][0]["message"]["content"]
        answers = page.run("[...document.querySelectorAll('.answer')].map(one => one.textContent)")
        assert conversation[end]["content"] == answers[number] == said
    usage = found["usage"]
    timing, tokens = last(page, ".facts")
    assert re.fullmatch(r"first token after [\d.]+ s · [\d.]+ tokens/s · [\d.]+ s in all", timing)
    assert tokens.startswith(
        f"{usage['prompt_tokens']} prompt tokens ({usage['prompt_tokens_details']['image_tokens']} "
    )
    assert tokens.endswith(f" · {usage['completion_tokens']} new")
    assert page.run("[...document.images].every(one => one.naturalWidth)")
    page.run("at('new').click()")
    assert page.run("[conversation.length, at('talk').childElementCount, pictures.length]") == [0, 0, 0]
    assert page.complaints == []


def test_settings_go_along_and_a_cut_is_said(page: Page) -> None:
    page.run("at('max_tokens').value = 1")
    ask(page, "what is shown?")
    assert last(page, ".cut") == ["cut off: no more tokens were allowed"]
    assert last(page, ".facts")[-1].endswith("· 1 new")


def test_what_fails_is_said_and_can_be_asked_again(page: Page, server: Served) -> None:
    page.choose("#files", PICTURES[:1])
    page.until("pictures.length === 1")
    page.run("at('temperature').value = 101")
    ask(page, QUESTION)
    failed = completed(server, [{"role": "user", "content": QUESTION}], temperature=101)
    assert last(page, ".error") == [failed["error"]["message"]]
    assert page.run("[at('question').value, pictures.length, conversation.length]") == [QUESTION, 1, 0]
    page.run("at('temperature').value = 0")
    page.press("Enter")
    page.until("asking === null")
    assert (last(page, ".error"), page.run("conversation.length")) == ([], 2)


def test_escape_stops_an_answer_and_frees_its_slot(page: Page, server: Served) -> None:
    page.run("at('temperature').value = 100")  # goes on for long, unless it draws the token that ends it
    answer = "at('talk').lastElementChild.querySelector('.answer')"
    escape = "new KeyboardEvent('keydown', {key: 'Escape', bubbles: true})"  # pressed from here it may come too late
    for _ in range(8):
        page.run("at('question').focus()")
        page.type("what is shown?")
        page.press("Enter")
        begun = f"asking === null || {answer}?.textContent"
        page.until(f"({begun}) && (document.activeElement.dispatchEvent({escape}), true)")
        page.until("asking === null")
        if last(page, ".cut") == ["stopped"]:
            break
    assert last(page, ".cut") == ["stopped"]
    assert page.run(f"conversation.at(-1).content === {answer}.textContent")
    aborted = r"/finished_reason=\"abort\"} [1-9]/.test(await (await fetch('metrics')).text())"
    page.until(aborted)
    assert server.service.places.taken == 0


def test_pictures_are_dropped_pasted_and_taken_away_again(page: Page) -> None:
    page.run(
        """(async () => {
            const dropped = new DataTransfer(), pasted = new DataTransfer(), cells = new DataTransfer();
            dropped.items.add(new File(["a"], "a.png", {type: "image/png"}));
            dropped.items.add(new File(["text"], "notes.txt", {type: "text/plain"}));
            pasted.items.add(new File(["b"], "b.jpg", {type: "image/jpeg"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, cancelable: true}));
            await reading;
            window.told = at("notice").textContent;
            cells.items.add("1\\t2", "text/plain");
            cells.items.add(new File(["c"], "c.png", {type: "image/png"}));
            for (const clipboardData of [pasted, cells])
                document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, cancelable: true}));
            await reading;
        })()"""
    )
    assert page.run("told") == "notes.txt: it is no picture"
    assert page.run("pictures.map(one => one.name)") == ["a.png", "b.jpg"]
    assert page.run("pictures[0].url") == "data:image/png;base64,YQ=="
    page.run("document.querySelector('[aria-label=\"Remove a.png\"]').click()")
    assert page.run("pictures.map(one => one.name)") == ["b.jpg"]


def test_shift_and_enter_begin_a_line(page: Page) -> None:
    page.run("at('question').focus()")
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert page.run("[at('question').value, asking]") == ["one\ntwo", None]


def say(page: Page, *events: str) -> None:
    """Let the server of the page say this to the next question, cut into pieces where it hurts."""
    text = "".join(f"data: {event}\n\n" for event in events)
    pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
    stream = "new ReadableStream({start(to) { for (const piece of pieces) to.enqueue(piece); to.close(); }})"
    encoded = f"{json.dumps(pieces)}.map(piece => new TextEncoder().encode(piece))"
    page.run(f"{{ const pieces = {encoded}; window.fetch = async () => new Response({stream}); }}")


def test_text_of_answers_stays_text_and_thinking_is_folded(page: Page) -> None:
    deltas: list[dict[str, str]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": f"hm {NASTY}"},
        {"content": NASTY[:9]},
        {"content": NASTY[9:]},
    ]
    say(page, *(json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas), "[DONE]")
    ask(page, NASTY)
    assert (last(page, ".question"), last(page, ".answer")) == ([NASTY], [NASTY])
    assert last(page, ".thinking p") == [f"hm {NASTY}"]
    assert page.run("document.querySelector('.thinking').open") is False
    assert page.run("[document.title, at('talk').querySelectorAll('b, script, img').length]") == ["pixtral", 0]
    assert page.run("conversation[1].content") == NASTY


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (['{"error": {"message": "no <b>whole</b> answer"}}', "[DONE]"], "no <b>whole</b> answer"),
        ([], "The answer broke off."),
    ],
)
def test_an_answer_that_breaks_off_is_no_part_of_the_conversation(page: Page, end: list[str], said: str) -> None:
    say(page, '{"choices": [{"index": 0, "delta": {"content": "a circ"}}]}', *end)
    ask(page, QUESTION)
    assert (last(page, ".answer"), last(page, ".error")) == (["a circ"], [said])
    assert page.run("[at('question').value, conversation.length]") == [QUESTION, 0]


def test_a_server_that_asks_for_a_key_gets_it_and_nobody_else(tab: Page, model: Model) -> None:
    with served(model, keys=("secret",)) as locked:
        tab.open(locked.url)
        tab.until("at('notice').textContent")
        assert tab.run("[at('settings').open, at('model').value]") == [True, ""]
        assert "key" in tab.run("at('notice').textContent")
        tab.run("at('key').focus()")
        tab.type("secret")
        tab.run("at('key').blur()")
        tab.until("at('model').value")
        assert tab.run("[at('notice').textContent, at('model').value]") == ["", NAME]
        ask(tab, "what is shown?")
        assert last(tab, ".error") == []
        kept = tab.run("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert kept == [0, 0, "", f"{locked.url}/"]
        tab.open(f"{locked.url}/?again")
        assert tab.run("at('key').value") == ""
