"""What a halted answer ends with, so that nobody takes half of it for the whole; and a halt on request."""

from __future__ import annotations

import httpx
import pytest
from running import MODEL, ROUTES, body_of, chunks_of, engine, running, text_of_chunks

from redflag.api.wire import REFUSAL
from redflag.cli import parse
from redflag.guard.guard import Guard
from redflag.server import serve
from redflag.server.access import Limits
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy, Reflect
from redflag.watching.thresholds import Thresholds

CHAT, TEXT = ROUTES
CLOSING = " [stopped]"
OPERATOR = "operator-key-0123456789"
KEYS = {"X-Redflag-Operator": OPERATOR}


@pytest.fixture
def serving(tokenizer, spec, thresholds, script):
    def start(high=None, policy=None, answer="abcdefghij", thresholds=thresholds, **limits):
        _, turns = engine(script(answer, high), tokenizer.eos_token_id)
        limits = Limits(MODEL, operator_key=OPERATOR, **{"closing_text": CLOSING, **limits})
        return running(Guard(turns, tokenizer, spec, thresholds, policy), limits)

    return start


def both(server, route, **options):
    """Text, how it ended and usage, whole and streamed, which are the same."""
    fields = options.pop("fields", {})
    whole = httpx.post(server.url + route, json=body_of(route, **fields), **options)
    assert whole.status_code == 200, whole.content
    choice = whole.json()["choices"][0]
    text = choice["message"]["content"] if route == CHAT else choice["text"]
    asked = body_of(route, stream=True, stream_options={"include_usage": True}, **fields)
    *chunks, counts = chunks_of(httpx.post(server.url + route, json=asked, **options).content)
    assert text_of_chunks(chunks) == text and counts["usage"] == whole.json()["usage"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    return text, choice["finish_reason"], whole.json()


@pytest.mark.parametrize(
    ("policy", "high", "shown"),
    [
        (Policy(), 6, "abcdef" + CLOSING),
        (Policy(hold_back=3), 6, "abc" + CLOSING),
        (Policy(hold_back=6), 6, REFUSAL),
        (Policy(release="end"), 6, REFUSAL),
        (Policy(), 0, REFUSAL),
        (Policy(replacement="Sorry, no."), 0, "Sorry, no."),
        (Policy(default="replace", replacement="Sorry."), 6, "abcdefSorry."),
        (Policy(default="replace", replacement=lambda trace: ""), 6, "abcdef" + CLOSING),
        (Policy(replacement="Sorry."), 6, "abcdef" + CLOSING),
    ],
)
def test_a_chat_that_was_halted_after_some_text_says_so(policy, high, shown, serving, tokenizer):
    with serving({high: (0.9, 0.0)}, policy) as server:
        text, finish, body = both(server, CHAT)
        assert (text, finish) == (shown, "content_filter")
        refused = shown if shown in (REFUSAL, "Sorry, no.") else ""
        assert body["choices"][0]["message"]["refusal"] == (refused or None)
        assert body["redflag"] == {"verdict": "halted", "reason": "alarm", "category": "harm"}
        extra = CLOSING if shown.endswith(CLOSING) else "Sorry." if shown.endswith("Sorry.") else ""
        extra_tokens = len(tokenizer(extra)["input_ids"])
        usage = body["usage"]
        assert usage["completion_tokens"] == high + 1 + extra_tokens
        released = 0 if refused else len(shown.removesuffix(extra)) + extra_tokens
        assert usage["completion_tokens_details"]["released_tokens"] == released


def test_nothing_else_gets_a_closing_text(serving):
    decoy = Policy(default="replace", replacement="Bread.", decoy=True)
    failing = Policy(default="replace", replacement=lambda trace: 1 / 0, decoy=True)
    with serving() as server:
        assert both(server, CHAT)[:2] == ("abcdefghij", "stop")
        assert both(server, CHAT, fields={"max_tokens": 3})[:2] == ("abc", "length")
    for policy, text in ((decoy, "abcdefBread."), (failing, "abcdef")):
        with serving({6: (0.9, 0.0)}, policy) as server:
            assert both(server, CHAT)[0] == text
    with serving({0: (0.9, 0.0)}, decoy) as server:
        assert both(server, CHAT)[0] == "Bread."
    with serving({0: (0.9, 0.0)}, failing) as server:
        assert both(server, CHAT)[0] == ""
    with serving({0: (0.9, 0.0)}, closing_text="") as server:
        assert both(server, CHAT)[0] == ""
    with serving({6: (0.9, 0.0)}, closing_text="") as server:
        assert both(server, CHAT)[0] == "abcdef"
    with serving({6: (0.9, 0.0)}) as server:
        assert both(server, TEXT)[0] == "abcdef", "a completion is continued text, not a reader's answer"
    with serving({6: (float("nan"), 0.0)}) as server:
        answer = httpx.post(server.url + CHAT, json=body_of(CHAT, stream=True))
        assert CLOSING.encode() not in answer.content and b'"error"' in answer.content


def test_the_verb_has_a_closing_text_and_no_test_of_the_halt():
    def limits_by(*words):
        return serve.limits_of(parse(serve, ["--model", "m", *words], prog="redflag serve")[0], {})

    assert limits_by().closing_text == " [The answer was stopped here by a safety check.]"
    assert limits_by("--closing_text", "").closing_text == ""
    assert not limits_by().test_halt and limits_by("--test_halt").test_halt


# A halt on request

REHEARSED = [("halt", {}), ("halt-at-once", {}), ("halt", {"max_tokens": 1}), ("halt", {"stop": "a"})]


@pytest.mark.parametrize(
    ("policy", "monitor"),
    [
        (Policy(), "max"),
        (Policy(observe=True), "max"),
        (Policy(default="continue", actions={"harm": "continue"}), "cusum"),
        (Policy(hold_back=2), "first"),
        (Policy(default="reflect", reflect=Reflect(words=("yes", "no"))), "ema"),
        (Policy(release="sentence"), "max"),
        (Policy(default="replace", replacement="Sorry."), "max"),
    ],
)
@pytest.mark.parametrize("answer", ["abcdefghij", "a", "abcdefghij" * 20])
def test_an_operator_may_ask_for_a_halt_that_comes_for_sure(policy, monitor, answer, serving, spec):
    thresholds = Thresholds.manual(
        0.99, spec.categories, MonitorConfig(monitor), run_id=spec.run_id, template_hash=spec.template_hash
    )
    with serving(policy=policy, thresholds=thresholds, answer=answer, test_halt=True) as server:
        for route in ROUTES:
            for test, fields in REHEARSED:
                text, finish, body = both(server, route, headers={**KEYS, "X-Redflag-Test": test}, fields=fields)
                assert finish == "content_filter" and body["redflag"]["reason"] == "alarm"
                assert text.removesuffix("Sorry.").removesuffix(CLOSING) in ("", REFUSAL, answer[:1], answer[:3])
                if test == "halt-at-once":
                    assert text in ("", REFUSAL, "Sorry.")
        if not policy.observe:
            assert httpx.post(server.url + CHAT, json=body_of(CHAT)).json()["choices"][0]["finish_reason"] == "stop"
        assert not [trace for trace in server.traces[:-1]], "made-up alarms are not recorded"


def test_nobody_else_may_and_the_operator_only_where_it_is_on(serving):
    halt = {"X-Redflag-Test": "halt"}
    reason = {"X-Redflag-Override": "why"}
    with serving() as off, serving(test_halt=True) as on:
        for server, headers, status, code in (
            (off, {**KEYS, **halt}, 403, "test_halt_off"),
            (on, halt, 403, "operator_key_required"),
            (on, {**halt, "X-Redflag-Operator": "wrong"}, 403, "invalid_operator_key"),
            (on, {**KEYS, "X-Redflag-Test": "1"}, 400, "invalid_value"),
            (on, {**KEYS, **halt, **reason}, 400, "invalid_value"),
        ):
            answer = httpx.post(server.url + CHAT, json=body_of(CHAT), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
