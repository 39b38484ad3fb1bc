"""Promises of the page, kept in a real headless Chromium: what is moved, filtered, covered and must never run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import browser
from reports import HOSTILE, bare_report, make_report, make_traces, trace, write

from redflag.watching.monitor import Monitor, MonitorConfig

__all__ = ["browser"]


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Writes a report and opens it from disk; whatever the page complains of or asks the network for is an error."""
    contexts, wrong = [], []

    def visit(report: dict[str, Any], traces: list[dict[str, Any]], **options: Any) -> Any:
        write(report, traces, tmp_path)
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        address = (tmp_path / "report.html").as_uri()
        page.on("request", lambda request: None if request.url == address else wrong.append(request.url))
        page.goto(address)
        page.evaluate("redflag.drawn")
        page.complaints = wrong
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def move(page: Any, value: float) -> None:
    """Drags the slider to where a threshold stands."""
    page.evaluate(
        """(value) => {
            const slider = document.getElementById("threshold");
            slider.step = "any";
            slider.value = Math.log(value / (1 - value));
            slider.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        value,
    )
    settle(page)


def counts(page: Any, row: int = 0) -> dict[str, int]:
    cells = page.locator("#counts tbody tr").nth(row).locator("td").all()
    return {cell.get_attribute("data-count"): int(cell.locator("b").inner_text()) for cell in cells}


def settle(page: Any) -> None:
    """Waits for what the page does at its next frame."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def listed(page: Any) -> list[str]:
    settle(page)
    places = page.eval_on_selector_all(
        ".response", "rows => rows.map(r => [Number(r.dataset.place), Number(r.dataset.response)])"
    )
    names = page.evaluate("redflag.rows.id")
    return [names[response] for _, response in sorted(places)]


def choose(page: Any, name: str) -> None:
    page.evaluate("(name) => redflag.select(redflag.rows.id.indexOf(name))", name)


def marked(page: Any) -> dict[str, int | None]:
    """The token before which each mark stands."""
    return page.evaluate(
        """() => Object.fromEntries(["onset", "alarm"].map((name) => {
            let at = document.querySelector(`#trace .marker.${name}`);
            while (at && !at.classList.contains("token")) at = at.nextElementSibling;
            return [name, at ? Number(at.dataset.step) : null];
        }))"""
    )


def test_the_slider_moves_alarms_counts_and_curve(visit):
    page = visit(bare_report(thresholds={"harm": 0.5}), make_traces())
    assert counts(page) == {"caught": 3, "missed": 1, "false": 1, "quiet": 1}
    choose(page, "late")
    assert marked(page) == {"onset": 2, "alarm": 4}
    assert page.locator(".said").inner_text() == "Caught 2 tokens after the onset."
    at_four = float(page.get_attribute("#trace .curve line.alarm", "x1"))

    for value, found, alarm, said in (
        (0.35, {"caught": 4, "missed": 0, "false": 1, "quiet": 1}, 3, "Caught 1 token after the onset."),
        (0.15, {"caught": 4, "missed": 0, "false": 2, "quiet": 0}, 2, "Caught at the onset: no harmful token passed."),
        (0.05, {"caught": 4, "missed": 0, "false": 2, "quiet": 0}, 1, "Alarm 1 token before the onset (early)."),
        (0.99, {"caught": 0, "missed": 4, "false": 0, "quiet": 2}, None, "Missed: no alarm."),
    ):
        move(page, value)
        assert counts(page) == found, value
        assert marked(page) == {"onset": 2, "alarm": alarm}
        assert page.locator(".said").inner_text() == said
        after = page.eval_on_selector_all("#trace .token.after", "all => all.map(t => Number(t.dataset.step))")
        assert after == ([] if alarm is None else list(range(alarm, 6)))
        line = page.locator("#trace .curve line.alarm")
        if alarm is None:
            assert line.get_attribute("visibility") == "hidden"
        else:
            assert float(line.get_attribute("x1")) < at_four
    # Ties alarm, exactly: a score at its threshold is an alarm, the next float above it is none.
    page.fill("#exact", "0.949999988079071")  # 0.95 as the engine's float32
    assert counts(page)["caught"] == 1
    page.fill("#exact", "0.95")
    assert counts(page)["caught"] == 0
    page.click("#to-force")
    assert counts(page) == {"caught": 3, "missed": 1, "false": 1, "quiet": 1}
    assert marked(page) == {"onset": 2, "alarm": 4}


def test_filters_search_and_order(visit):
    page = visit(bare_report(thresholds={"harm": 0.5}), make_traces())
    everything = ["late", "ontime", "early", "hidden", "loud", "calm"]
    assert listed(page) == everything
    for control, value, names in (
        ("by-outcome", "caught", ["late", "ontime", "early"]),
        ("by-outcome", "early", ["early"]),
        ("by-outcome", "missed", ["hidden"]),
        ("by-outcome", "false", ["loud"]),
        ("by-kind", "harmless", ["loud", "calm"]),
        ("order", "peak", ["early", "late", "ontime", "loud", "hidden", "calm"]),
        ("order", "delay", ["late", "ontime", "early", "hidden", "loud", "calm"]),
    ):
        page.select_option(f"#{control}", value)
        assert listed(page) == names, value
        page.select_option(f"#{control}", "")
    page.select_option("#by-set", label="prefill")
    assert listed(page) == ["hidden"] and counts(page, 1) == {"caught": 0, "missed": 1, "false": 0, "quiet": 0}
    assert counts(page) == {"caught": 3, "missed": 1, "false": 1, "quiet": 1}, "of all responses, whatever is filtered"
    page.select_option("#by-set", "")
    page.select_option("#by-source", label="rare")
    assert listed(page) == ["ontime"]
    page.select_option("#by-source", "")
    for words, names in (("LATE1", ["late"]), ("theft", everything[:4]), ("sure, h", ["hidden"]), ("no such", [])):
        page.fill("#search", words)
        assert listed(page) == names, words
    assert page.locator("#trace").inner_text() == "No response fits."
    # An outcome follows the threshold.
    page.fill("#search", "")
    page.select_option("#by-outcome", "missed")
    move(page, 0.99)
    assert listed(page) == ["late", "ontime", "early", "hidden"]


def test_harmful_text_is_covered_until_asked_for(visit):
    page = visit(bare_report(thresholds={"harm": 0.5}), make_traces())
    choose(page, "hidden")
    text = page.locator("#trace .text")
    assert text.get_attribute("aria-hidden") == "true"
    style = page.eval_on_selector(
        "#trace .token", "t => { const s = getComputedStyle(t); return [s.filter, s.userSelect]; }"
    )
    assert style == ["blur(5px)", "none"]
    # Nor is it in the document to be found or copied: not in the trace, not in the list, not the prefill.
    covered = page.inner_text("#traces")
    assert "hidden1" not in covered and "Sure, here" not in covered and "late1" not in covered
    assert "loud1" in covered, "harmless text is plain"
    page.click(".reveal")
    settle(page)
    assert text.inner_text() == "Sure, here hidden0onset hidden1 hidden2⏎" and text.get_attribute("aria-hidden") is None
    assert "late1" not in page.inner_text("#traces"), "one was asked for, not all"
    page.click(".reveal")
    settle(page)
    assert "hidden1" not in page.inner_text("#traces")
    page.check("#uncover")
    settle(page)
    assert "hidden1" in page.inner_text("#trace") and "late1" in page.inner_text("#list")
    page.uncheck("#uncover")
    settle(page)
    assert "hidden1" not in page.inner_text("#traces") and "late1" not in page.inner_text("#traces")


def test_an_answer_that_nobody_judged_is_covered_too(visit):
    loud = trace("loud", [0.1, 0.2, 0.3], set="prefill")
    page = visit(bare_report(), [loud, {**loud, "id": "judged", "judged": False}])
    choose(page, "loud")
    assert page.locator("#trace .text.covered").count() == 1
    choose(page, "judged")
    assert page.locator("#trace .text.covered").count() == 0


def test_keys(visit):
    page = visit(bare_report(thresholds={"harm": 0.5}), make_traces())
    page.focus("#list")
    current = "redflag.rows.id[redflag.current()]"
    for key, name in (("ArrowDown", "ontime"), ("j", "early"), ("k", "ontime"), ("End", "calm"), ("Home", "late")):
        page.keyboard.press(key)
        assert page.evaluate(current) == name, key
    page.keyboard.press("r")
    assert "late1" in page.inner_text("#trace")
    page.keyboard.press("]")
    assert page.evaluate("redflag.thresholds[0]") > 0.5
    page.keyboard.press("0")
    assert page.evaluate("redflag.thresholds[0]") == 0.5
    page.keyboard.press("/")
    page.keyboard.type("calm")
    assert listed(page) == ["calm"]
    page.focus("#threshold")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.evaluate("redflag.thresholds[0]") < 0.5


def test_hostile_text_does_not_run(visit):
    report = make_report((HOSTILE,))
    report |= {"title": HOSTILE, "warnings": [HOSTILE]}
    report["methods"] = {HOSTILE: report["methods"]["redflag"], f"2{HOSTILE}": report["methods"]["TF-IDF"]}
    report["methods"][HOSTILE]["slices"]["source"][HOSTILE] = report["methods"][HOSTILE]["pooled"]
    report["attacks"][0]["name"] = HOSTILE
    traces = [
        trace(
            HOSTILE, [0.9, 0.9, 0.1], onset=1, tokens=[HOSTILE, "<b>"], source=HOSTILE, set=HOSTILE, category=HOSTILE
        ),
        trace(f"2{HOSTILE}", [0.1, 0.1, 0.1], tokens=[HOSTILE, "'\"`${1}"], given=HOSTILE, set="x"),
    ]
    page = visit(report, traces)
    page.check("#uncover")
    for name in (HOSTILE, f"2{HOSTILE}"):
        choose(page, name)
        assert HOSTILE in page.inner_text("#trace .text")
    page.hover(".token")
    page.fill("#search", "onerror")
    page.mouse.move(300, 300)
    page.hover("[data-chart=caught] .mark-symbol path >> nth=0")
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert HOSTILE[:9] in page.inner_text("#vg-tooltip-element")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    # Should text ever become markup all the same, the security policy still keeps it from running.
    blocked = page.evaluate(
        """() => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            document.body.setAttribute("onclick", "window.hacked = 3");
            document.body.click();
            setTimeout(() => done("nothing"), 2000);
        })"""
    )
    assert blocked.startswith("script-src") and page.evaluate("window.hacked") is None
    wrong = page.complaints
    assert all("Content Security Policy" in complaint for complaint in wrong)
    wrong.clear()


def test_charts_are_drawn_and_switch(visit):
    page = visit(make_report(), make_traces())
    drawn = page.eval_on_selector_all(
        "figure.chart", "all => all.map(f => [f.dataset.chart, f.querySelectorAll('svg path').length > 3])"
    )
    assert dict(drawn) == dict.fromkeys(
        ["roc", "caught", "compute", "delays", "earliness", "reliability", "slices", "over-refusal", "attacks"], True
    )
    roc = page.locator("[data-chart=roc]")
    assert "0.1%" in roc.locator("svg").text_content()
    roc.get_by_role("button", name="linear").click()
    page.wait_for_selector("[data-chart=roc][data-drawn=linear]")
    assert "0.1%" not in roc.locator("svg").text_content() and "80%" in roc.locator("svg").text_content()
    assert "false alarms at this threshold: 1.2%" in page.inner_text("[data-chart=delays] .note").lower()


def test_dark_light_phone_and_print(visit):
    ground = "getComputedStyle(document.body).backgroundColor"
    page = visit(make_report(), make_traces(), color_scheme="dark", viewport={"width": 390, "height": 800})
    assert page.evaluate(ground) == "rgb(22, 23, 26)"
    line = "getComputedStyle(document.querySelector('[data-chart=roc] .mark-line path')).stroke"
    dark = page.evaluate(line)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "a phone need not scroll sideways"
    )
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(253, 252, 250)" and page.evaluate(line) != dark
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(22, 23, 26)"
    unnamed = "all => all.filter(c => !c.labels.length && !c.ariaLabel).map(c => c.outerHTML)"
    assert page.eval_on_selector_all("input, select", unnamed) == []
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink')").strip() == "#1d1c1a"
    assert (
        not page.is_visible(".controls")
        and page.is_visible("#trace .curve")
        and page.is_visible("[data-chart=roc] svg")
    )
    assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.parametrize(
    ("config", "theft", "fraud"),
    [
        pytest.param(MonitorConfig(), 0.62, 0.71, id="max"),
        pytest.param(MonitorConfig(aggregation="run", window=3, warm_up=1), 0.25, 0.3, id="run"),
        pytest.param(MonitorConfig(aggregation="ema", decay=0.3, prior=0.02, warm_up=2), 0.36, 0.41, id="ema"),
        pytest.param(MonitorConfig(aggregation="cusum", prior=0.05, drift=0.4), 3.0, 5.5, id="cusum"),
        pytest.param(MonitorConfig(aggregation="first"), 0.5, 0.6, id="first"),
    ],
)
def test_the_page_alarms_as_the_guard_does(visit, config, theft, fraud):
    rng = np.random.default_rng(5)
    values = {"theft": theft, "fraud": fraud}
    traces, expected = [], []
    for number in range(60):
        probs = rng.beta(0.6, 1.4, size=(int(rng.integers(0, 12)), 2)).astype(np.float32)
        traces.append({"tokens": ["x"] * max(0, len(probs) - 1), "probs": probs.tolist(), "harmful": number % 2 == 0})
        monitor, first = Monitor(config, 2), (-1, -1)
        for step, row in enumerate(probs.tolist()):
            over = [k for k, (s, t) in enumerate(zip(monitor.feed(row), values.values(), strict=True)) if s >= t]
            if over and first[0] < 0:
                first = (step, over[0])
        expected.append(first)
    page = visit(bare_report(vars(config), values), traces)
    found = page.evaluate("[Array.from(redflag.alarms), Array.from(redflag.alarmFlags)]")
    assert list(zip(*found, strict=True)) == expected
    assert 5 < sum(first[0] >= 0 for first in expected) < 60, "the case is no case"
    # The slider moves the chosen flag's threshold and leaves the other where it is.
    page.select_option("#flag", label="fraud")
    page.fill("#exact", "1000000")
    assert page.evaluate("redflag.thresholds") == [values["theft"], 1e6]
    assert page.evaluate("redflag.alarmFlags.includes(1)") is False


@pytest.mark.slow
def test_two_thousand_responses_stay_smooth(visit):
    rng = np.random.default_rng(1)
    words = [f" w{i}" for i in range(5000)]
    traces = [
        {
            "id": f"r{i}",
            "tokens": [words[w] for w in rng.integers(0, 5000, 200)],
            "harmful": i % 3 == 0,
            "probs": rng.beta(0.3, 3, size=(201, 1)).astype(np.float32),
            "onset": 40 if i % 3 == 0 else None,
        }
        for i in range(2000)
    ]
    page = visit(bare_report(thresholds={"harm": 0.9}), traces)
    assert page.locator(".response").count() < 60
    size = Path(page.url.removeprefix("file://")).stat().st_size
    assert size < 4_000_000
    took = page.evaluate(
        """async () => {
            const slider = document.getElementById("threshold");
            const start = performance.now();
            for (let i = 0; i < 20; i++) {
                slider.value = -3 + i / 3;
                slider.dispatchEvent(new Event("input"));
                await new Promise((done) => requestAnimationFrame(done));
            }
            return (performance.now() - start) / 20;
        }"""
    )
    assert took < 250, "milliseconds per move; a busy machine is slower than a reader's"
    page.evaluate("document.getElementById('list').scrollTop = 1e9")
    assert listed(page)[-1] == "r1999"
