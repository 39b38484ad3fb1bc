"""The playground's conversation in a real headless Chromium: what is shown and asked for, and what must never run."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from chromium import browser
from playground_page import answer, ask, heats, over, serve, settle, visit
from running import MODEL

from redflag.server.access import Limits
from redflag.watching.policy import Policy, Reflect

__all__ = ["browser", "serve", "visit"]

OPERATOR, API = "operator-key-0123456789", "api-key-0123456789"
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>\'"`${1}&lt;b&gt;'
REFLECT = Reflect(cue="Hm.", words=("yes", "no"), verdict_cue="So:", stop=("|",), max_tokens=90)


def test_an_answer_is_shown_with_the_probability_under_each_token(serve, visit):
    page = visit(serve("abcdé", {2: (0.5, 0.0), 3: (0.9999, 0.0)}, Policy(observe=True)))
    ask(page)
    assert answer(page).inner_text().replace("alarm harm", "") == "abcdé"
    # 0.01 is (log(1/99) + 9.2) / 18.4 of full heat; é are two tokens.
    assert heats(page) == [["a", 0.25], ["b", 0.25], ["c", 0.5], ["d", 1], ["é", 0.25]]
    assert page.inner_text("#which") == "Answer 1: 7 tokens measured, 7 shown."
    page.select_option("#flag", label="theft")
    settle(page)
    assert {heat for _, heat in heats(page)} == {0.288, 0.0}


def test_colour_comes_while_the_answer_is_written(serve, visit):
    page = visit(serve("abcdefgh", pause=(4, 1.5)))
    page.fill("#question", "hello")
    page.press("#question", "Enter")
    page.locator(".token").nth(3).wait_for()
    assert page.locator(".turn.assistant[aria-busy=true]").count() == 1, "before it is over"
    assert heats(page) == [[letter, 0.25] for letter in "abcd"]
    over(page)
    assert len(heats(page)) == 8


def test_an_answer_that_is_over_stands_there_whole(serve, visit):
    page = visit(serve("abc"))
    page.evaluate("window.requestAnimationFrame = () => 0")  # as on a machine too busy to draw
    page.fill("#question", "hello")
    page.press("#question", "Enter")
    page.locator(".turn.assistant[aria-busy=false]").wait_for()
    assert answer(page).inner_text() == "abc"


def test_keys_send_stop_and_keep_the_focus(serve, visit):
    server = serve("abcdefgh", pause=(3, 2.0))
    page = visit(server)
    assert page.evaluate("document.activeElement.id") == "question", "one can type at once"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    page.keyboard.press("Enter")
    assert page.inner_text(".turn.user .text") == "one\ntwo" and page.input_value("#question") == ""
    page.locator(".token").nth(2).wait_for()
    page.keyboard.press("Enter")
    assert page.locator(".turn").count() == 2, "an empty message is not sent, nor one while an answer comes"
    page.keyboard.press("Escape")
    over(page)
    assert page.inner_text(".turn.assistant .end") == "stopped" and server.ends() == {"disconnected"}
    assert page.evaluate("document.activeElement.id") == "question"
    page.focus("#clear")
    page.keyboard.press("Enter")
    assert page.locator(".turn").count() == 0 and page.evaluate("document.activeElement.id") == "question"


def test_the_conversation_goes_on_with_what_was_shown(serve, visit, tokenizer):
    server = serve("abc")
    page = visit(server)
    page.click("#settings summary")
    page.fill("#system", "Be brief.")
    page.fill("#max-tokens", "3")
    page.fill("#fields", '{"top_p": 0.5, "user": "me"}')
    ask(page, "first")
    ask(page, "second", 2)
    assert page.inner_text(".turn.assistant .end >> nth=1") == "cut at its length"
    prompt = tokenizer.decode(server.prompts[-1])
    turns = ["system\nBe brief.", "user\nfirst", "assistant\nabc", "user\nsecond"]
    assert [turn for turn in re.findall(r"<\|turn\|>(.*?)<\|end\|>", prompt, re.S)] == turns
    page.fill("#fields", "[1]")
    page.fill("#question", "third")
    page.press("#question", "Enter")
    assert page.evaluate("document.activeElement.id") == "fields", "what is wrong is pointed at"
    assert "object of JSON" in page.evaluate("document.getElementById('fields').validationMessage")
    assert page.locator(".turn.user").count() == 2


def test_hostile_text_does_not_run(serve, visit):
    policy = Policy(default="reflect", reflect=REFLECT, confirmed="replace", replacement=HOSTILE)
    page = visit(serve(HOSTILE, {20: (0.9, 0)}, policy, harm=0.9, thought=f"{HOSTILE}|"))
    page.click("#settings summary")
    page.fill("#system", HOSTILE)
    ask(page, HOSTILE)
    assert page.inner_text(".turn.user .text") == HOSTILE
    shown = answer(page).inner_text().replace("alarm harm", "")
    assert shown.endswith(HOSTILE) and HOSTILE.startswith(shown.removesuffix(HOSTILE)) and len(shown) > len(HOSTILE)
    for summary in page.locator("#events summary").all():
        summary.click()
    assert page.locator("#events pre").all_inner_texts() == [f"{HOSTILE}|", HOSTILE]
    page.hover(".token >> nth=3")
    settle(page)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, #log script").count() == 0
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
    assert all("Content Security Policy" in complaint for complaint in page.complaints)
    page.complaints.clear()


def test_the_operators_key_is_asked_for_and_kept_nowhere(serve, visit):
    server = serve("abc", limits=Limits(MODEL, api_keys=(API,), operator_key=OPERATOR))
    page = visit(server, ready=False)
    for field, wrong, right in (("#api", "nonsense", API), ("#operator", "nonsense", OPERATOR)):
        for key in (wrong, right):
            page.locator(f"{field}:focus").wait_for()
            page.keyboard.type(key)
            page.keyboard.press("Enter")
            if key == wrong:
                page.locator(f"{field}:focus").wait_for()
                page.fill(field, "")
    page.evaluate("playground.ready")
    sent = []
    page.on("request", lambda request: sent.append((request.url, request.headers)))
    ask(page)
    assert len(heats(page)) == 3
    chat = [headers for url, headers in sent if "chat/completions" in url]
    assert chat and "x-redflag-operator" not in chat[0], "the answer is asked for as by any client"
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.complaints.clear()  # 401 and 403
    assert OPERATOR not in page.content()


def test_without_the_operators_key_there_is_an_answer_and_no_number(serve, visit):
    page = visit(serve("abc", limits=Limits(MODEL, operator_key=OPERATOR)), ready=False)
    page.wait_for_selector("#keys[open]")
    page.keyboard.press("Escape")
    page.evaluate("playground.ready")
    page.fill("#question", "hello")
    page.press("#question", "Enter")
    page.locator(".turn.assistant[aria-busy=false]").wait_for()
    assert answer(page).inner_text() == "abc" and heats(page) == [] and not page.is_visible("#measured")
    page.click("#unlock")
    page.fill("#operator", OPERATOR)
    page.keyboard.press("Enter")
    page.locator("#unlock").wait_for(state="hidden")
    ask(page, answers=2)
    assert len(heats(page)) == 3
    page.complaints.clear()


def sse(*deltas: dict[str, Any], finish: str) -> str:
    chunks = [{"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


@pytest.mark.parametrize("told", [False, True], ids=["found in the text", "told apart"])
def test_thoughts_and_tool_calls_are_folded_and_coloured_apart(serve, visit, told):
    page = visit(serve("abc"))
    words = ["<think>", "They", " ask", "</think>", "They", " call", "<call>", "{}"]
    probs = [[0.01 * (t + 1), 0.0] for t in range(len(words))]
    probs[2][0] = 0.9
    events = [
        {
            "kind": "text",
            "part": "thought" if told and 0 < t < 3 else "answer",
            "position": t,
            "tokens": 1,
            "pieces": [w],
        }
        for t, w in enumerate(words)
    ]
    if told:  # the marks around a thought are no text of either
        events = [event for event in events if event["position"] not in (0, 3)]
    steps = {"start": 0, "flag_probs": probs, "scores": probs, "events": events, "answer_at": 4 if told else 0}
    record = {"trace": {"id": "chatcmpl-1", "meta": {}}}
    stream = sse(
        {"role": "assistant", "content": ""},
        {"reasoning_content": "They "},
        {"reasoning_content": "ask"},
        {"content": "They call"},
        {
            "tool_calls": [
                {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"<b>Bern"}'}}]},
        finish="tool_calls",
    )
    sent = []

    def chat(route):
        sent.append(route.request.post_data_json)
        route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=stream)

    page.route("**/v1/chat/completions", chat)
    page.route(
        "**/playground/traces/*",
        lambda route: route.fulfill(status=200, body=f"{json.dumps(steps)}\n{json.dumps(record)}\n"),
    )
    ask(page)
    assert answer(page).inner_text() == "They call"
    assert page.locator(".thoughts:not([open])").count() == page.locator(".call:not([open])").count() == 1
    for summary in page.locator(".turn summary").all():
        summary.click()
    assert page.inner_text(".thoughts .text") == "They ask"
    assert (
        page.inner_text(".call summary") == "Tool call weather"
        and page.inner_text(".call pre") == '{"city": "<b>Bern"}'
    )
    stepped = page.eval_on_selector_all(".token", "all => all.map(t => [t.textContent, Number(t.dataset.step)])")
    assert stepped == [["They", 1], [" ask", 2], ["They", 4], [" call", 5]]
    what_if = page.inner_text("#what-if")
    if told:  # a thought may name harm: it has thresholds of its own
        assert what_if == "No alarm in the 4 tokens of the answer measured."
        page.fill("#exact", "0.06")
        settle(page)
        assert page.inner_text("#what-if") == (
            "harm: first alarm before token 5 of 8; a halt there shows 1 token of the answer (4 were shown)."
        )
    else:
        assert what_if == "harm: first alarm before token 2 of 8; a halt there shows 2 tokens (8 were shown)."
    assert page.locator(".curve .shown").count() == (2 if told else 1)
    # What is typed next is the call's result.
    assert page.inner_text("label[for=question]") == "Result of the tool weather"
    ask(page, "sunny", 2)
    *_, call, result = sent[-1]["messages"]
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "<b>Bern"}'}
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def test_a_fault_is_told_and_its_trace_shown(serve, visit):
    page = visit(serve("abcdefgh", fail_at=4))
    ask(page)
    alert = page.locator(".turn.assistant [role=alert]")
    assert "failed in the middle of the response" in alert.inner_text()
    assert answer(page).inner_text() == "abcd" and len(heats(page)) == 4
    assert page.inner_text("#said").startswith("Halted: fault")


def test_where_nothing_was_shown_the_message_can_be_sent_again(serve, visit):
    page = visit(serve("abcdefgh", fail_at=4, policy=Policy(hold_back=9)))
    ask(page, "my question")
    assert "failed before anything could be shown" in page.inner_text("[role=alert]")
    assert page.input_value("#question") == "my question"
    assert page.inner_text("#which") == "Answer 1: 4 tokens measured, 0 shown."
    page.complaints.clear()  # 503


def test_a_halt_before_any_text_says_so(serve, visit):
    page = visit(serve("abc", {0: (0.9, 0.0)}))
    ask(page)
    assert page.inner_text(".refusal").startswith("The response was stopped")
    assert page.inner_text(".marker.alarm") == "alarm harm"
