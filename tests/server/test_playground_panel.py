"""The playground's panel in a real headless Chromium: threshold, timeline, export, looks, keys, screen readers."""

from __future__ import annotations

import itertools

import pytest
from chromium import browser
from playground_page import answer, ask, serve, settle, tokens_after, visit
from running import MODEL

from redflag.server.access import Limits
from redflag.terminal.show import what_is_in
from redflag.trace import read_traces
from redflag.watching.policy import Policy, Reflect

__all__ = ["browser", "serve", "visit"]

REFLECT = Reflect(cue="Hm.", words=("yes", "no"), verdict_cue="So:", stop=("|",), max_tokens=40)


def test_the_threshold_moves_over_what_was_recorded(serve, visit):
    high = {2: (0.3, 0.0), 5: (0.45, 0.0), 6: (0.9, 0.0)}
    page = visit(serve("abcdefgh", high, Policy(hold_back=1)))
    ask(page)
    assert answer(page).inner_text() == "abcdealarm harm", "the alarm's token is not shown, nor the one held back"
    assert page.inner_text(".turn .end") == "halted: harm"
    assert page.inner_text("#said") == "Halted: alarm (harm)."
    told = page.locator("#what-if")
    assert told.inner_text() == "harm: first alarm before token 6 of 7; a halt there shows 5 tokens (5 were shown)."
    for value, words, after, marks in (
        ("0.4", "harm: first alarm before token 5 of 7; a halt there shows 4 tokens (5 were shown).", "", 2),
        ("0.3", "harm: first alarm before token 2 of 7; a halt there shows 1 token (5 were shown).", "cde", 2),
        ("0.95", "No alarm in the 7 tokens measured. It was halted there: what would have followed was never "
         "written.", "", 1),
    ):  # fmt: skip
        page.fill("#exact", value)
        settle(page)
        assert (told.inner_text(), tokens_after(page)) == (words, after), value
        assert page.locator(".marker").count() == marks
    assert page.get_attribute("#in-force", "aria-pressed") == "false"
    page.click("#in-force")
    settle(page)
    assert page.input_value("#exact") == "0.5" and page.get_attribute("#in-force", "aria-pressed") == "true"
    # By the keyboard, and by hand: the line itself.
    page.focus("#threshold")
    before = page.get_attribute("#threshold", "aria-valuetext")
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    settle(page)
    assert float(page.get_attribute("#threshold", "aria-valuetext")) < float(before)
    frame = page.locator(".curve .handle").bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 40, y - 20, steps=4)
    page.mouse.up()
    settle(page)
    raised = float(page.input_value("#exact"))
    assert raised > 0.9
    page.mouse.move(x - 40, y + 20)
    settle(page)
    assert float(page.input_value("#exact")) == raised, "it was let go"


def test_events_stand_on_a_timeline_and_hidden_text_is_folded(serve, visit):
    policy = Policy(actions={"harm": "reflect"}, reflect=REFLECT)
    page = visit(serve("abcdefghij", {3: (0.9, 0.0), 7: (0.0, 0.8)}, policy))
    ask(page)
    rows = page.locator("#events li")
    assert [row.split("\n")[-1] for row in rows.locator(".what").all_inner_texts()[:1]] == [
        "alarm: harm, 0.900 ≥ 0.500, so reflect"
    ]
    kinds = page.eval_on_selector_all("#events li", "all => all.map(e => e.className)")
    assert kinds == ["alarm", "reflection", "resume", "alarm", "halt"]
    assert rows.locator(".at").all_inner_texts() == [f"token {n}" for n in (3, 3, 4, 7, 7)]
    assert page.locator(".curve .event").count() == 5
    places = page.eval_on_selector_all(".curve .event circle", "all => all.map(c => Number(c.getAttribute('cx')))")
    assert all(right - left >= 14 for left, right in itertools.pairwise(places)), "none covers another"
    assert not page.is_visible("#events pre")
    rows.nth(1).locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#events pre") == "SECRET thought|"
    assert "SECRET" not in page.inner_text("#log"), "the answer is what any client gets"


def test_the_step_slider_reads_every_token_out(serve, visit):
    page = visit(serve("abé", {1: (0.25, 0.125)}))
    ask(page)
    page.focus("#step")
    texts = []
    for _ in range(5):
        settle(page)
        texts.append(page.get_attribute("#step", "aria-valuetext"))
        page.keyboard.press("ArrowRight")
    assert texts[1] == 'Before token 1 "b": harm 0.250, theft 0.125'
    assert [text.split(":")[0] for text in texts] == [
        'Before token 0 "a"', 'Before token 1 "b"', 'Before token 2 "é"', 'Before token 3 "é"',
        "Before token 4 (no text)",
    ]  # fmt: skip
    page.hover(".token >> nth=1")
    settle(page)
    assert page.inner_text("#readout") == texts[1] and page.inner_text(".token.pointed") == "b"


def test_the_exported_trace_is_one_that_redflag_reads(serve, visit, tmp_path):
    server = serve("abcdefgh", {5: (0.9, 0.0)})
    page = visit(server)
    assert page.is_disabled("#export")
    ask(page, "my question")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    (trace,) = read_traces(file)
    told = server.told()
    assert (trace.id, trace.flag_probs, trace.events) == (told.id, told.flag_probs, told.events)
    assert trace.meta["request"]["messages"] == [{"role": "user", "content": "my question"}]
    assert file.name == f"{trace.id}.json" and what_is_in(str(file)) == "traces"


def test_each_answer_can_be_inspected(serve, visit):
    page = visit(serve("abc", {1: (0.4, 0)}))
    ask(page)
    ask(page, "again", 2)
    assert page.inner_text("#which").startswith("Answer 2")
    page.get_by_role("button", name="inspect answer 1").click()
    settle(page)
    assert page.inner_text("#which").startswith("Answer 1")
    assert page.eval_on_selector_all(".turn.assistant", "all => all.map(t => t.classList.contains('chosen'))") == [
        True,
        False,
    ]


def test_a_screen_reader_is_told(serve, visit):
    page = visit(serve("abcdefgh", {5: (0.9, 0.0)}))
    assert page.get_attribute("#log", "role") == "log" and page.get_attribute("#log", "aria-live") == "polite"
    assert page.get_attribute("#status", "role") == "status"
    page.evaluate(
        """() => {
            window.told = [];
            new MutationObserver(() => window.told.push(document.getElementById("status").textContent))
                .observe(document.getElementById("status"), { childList: true });
        }"""
    )
    ask(page)
    assert sorted(page.evaluate("window.told")) == ["Alarm: harm, before token 5", "Halted: harm"]
    assert page.get_attribute(".curve", "aria-label") == "Score of harm before each of 6 tokens; highest 0.900"
    unnamed = "all => all.filter(c => !c.labels?.length && !c.ariaLabel && !c.textContent.trim()).map(c => c.outerHTML)"
    assert page.eval_on_selector_all("input, select, textarea, button, summary", unnamed) == []
    headings = page.eval_on_selector_all(
        "h1, h2, h3", "all => all.filter(h => h.checkVisibility()).map(h => h.tagName)"
    )
    assert headings[0] == "H1" and headings.count("H1") == 1


def test_whatever_takes_the_focus_shows_it_and_all_can_be_reached(serve, visit):
    page = visit(serve("abc"))
    ask(page)
    page.reload()
    page.evaluate("playground.ready")
    ask(page)
    page.focus(".skip")
    page.keyboard.press("Shift+Tab")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, width = page.evaluate(
            """() => {
                const at = document.activeElement;
                return [at.id || at.className || at.tagName, parseFloat(getComputedStyle(at).outlineWidth)];
            }"""
        )
        if name == "BODY":
            break
        reached.append(name)
        assert width >= 2 or name == "BODY", name
    for name in ("skip", "clear", "theme", "log", "choose", "question", "send", "export", "flag", "threshold", "exact",
                 "in-force", "step"):  # fmt: skip
        assert name in reached, name


@pytest.mark.parametrize("width", [320, 390, 768, 1360])
def test_dark_light_narrow_and_wide(serve, visit, width):
    ground = "getComputedStyle(document.body).backgroundColor"
    page = visit(serve("word " * 30 + "w" * 300), color_scheme="dark", viewport={"width": width, "height": 800})
    ask(page, "q" * 300)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nobody scrolls sideways"
    assert page.evaluate(ground) == "rgb(22, 23, 26)"
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(253, 252, 250)"
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(22, 23, 26)"
    assert page.get_attribute("#theme", "aria-label") == "Colours: dark"


def test_a_long_answer_does_not_slow_the_page_down(serve, visit):
    server = serve("the cat sat on the mat. " * 80, limits=Limits(MODEL, default_tokens=2000))
    page = visit(server)
    ask(page)
    steps = page.evaluate("playground.shown().probs.length")
    assert steps > 500
    took = page.evaluate(
        """async () => {
            const slider = document.getElementById("threshold"), start = performance.now();
            for (let i = 0; i < 20; i++) {
                slider.value = i / 3 - 3;
                slider.dispatchEvent(new Event("input"));
                await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            }
            return (performance.now() - start) / 20;
        }"""
    )
    assert took < 400, "milliseconds per move; a busy machine is slower than a reader's"
