"""Thoughts behind the OpenAI-compatible API: asked for or not, shown apart or hidden, judged always."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from running import engine, running
from test_real_tokenizers import world
from thinking import encoded

from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.thoughts import thought_marks
from redflag.trace import Step
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

MODEL = "thinker"
CHAT = "/v1/chat/completions"
ASK = {"role": "user", "content": "Hi"}
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
THOUGHT, ANSWER = "Let me think. Hm", "Hello there"


def play(token_ids, sampling):
    """Qwen3 as it is asked: behind an opened thought it thinks first."""
    tokenizer, _ = world("qwen3")
    marks = thought_marks(tokenizer)
    close = marks.end_ids[0]
    opened = close not in token_ids[-4:]
    text = [*encoded(tokenizer, THOUGHT + marks.before_end), close, *encoded(tokenizer, marks.before_answer + ANSWER)]
    ids = text if opened else encoded(tokenizer, ANSWER)
    return [Step(i, play.high.get(at, (0.01, 0.0))) for at, i in enumerate([*ids, tokenizer.eos_token_id])]


def serving(policy=None, limits=None, high=None, thinking="off"):
    tokenizer, spec = world("qwen3")
    play.high = high or {}
    _, turns = engine(play, tokenizer.eos_token_id)
    thresholds = Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    guard = Guard(turns, tokenizer, spec, thresholds, policy or Policy(), thinking=thinking)
    return running(guard, limits or Limits(MODEL))


def ask(server, **fields):
    return httpx.post(server.url + CHAT, json={"model": MODEL, "messages": [ASK], **fields}, timeout=20)


def streamed(server, **fields):
    """The parts of the deltas of a stream, and its usage."""
    found = {"content": "", "reasoning_content": "", "reasoning": ""}
    usage = None
    answer = ask(server, stream=True, stream_options={"include_usage": True}, **fields)
    for line in answer.text.splitlines():
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line[6:])
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            assert not (choice["delta"].get("content") and choice["delta"].get("reasoning"))
            for name in found:
                found[name] += choice["delta"].get(name) or ""
    return found, usage


@pytest.mark.parametrize(
    "thinking, fields, thinks",
    [
        ("off", {}, False),
        ("on", {}, True),
        ("template", {}, True),
        ("off", THINK, True),
        ("off", {"chat_template_kwargs": {"thinking": True}}, True),
        ("on", {"chat_template_kwargs": {"enable_thinking": False}}, False),
        ("off", {"reasoning_effort": "low"}, True),
        ("on", {"reasoning_effort": "none"}, False),
        ("on", {"reasoning_effort": "minimal"}, False),
        ("off", {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
)
def test_a_request_says_whether_the_model_thinks_and_else_the_operator(thinking, fields, thinks):
    with serving(Policy(thoughts="show"), thinking=thinking) as server:
        answer = ask(server, **fields)
    message = answer.json()["choices"][0]["message"]
    assert message["content"] == ANSWER and "x-ignored-params" not in answer.headers
    assert message.get("reasoning_content") == message.get("reasoning") == (THOUGHT + "\n" if thinks else None)


@pytest.mark.parametrize("shown", ["hide", "show"])
def test_a_thought_is_never_content_and_counted_apart(shown):
    with serving(Policy(thoughts=shown)) as server:
        body = ask(server, **THINK).json()
        deltas, usage = streamed(server, **THINK)
        plain = ask(server).json()
        metrics = httpx.get(server.url + "/metrics").text
    message = body["choices"][0]["message"]
    expected = THOUGHT + "\n" if shown == "show" else ""
    assert message["content"] == deltas["content"] == ANSWER
    assert message.get("reasoning_content", "") == deltas["reasoning_content"] == deltas["reasoning"] == expected
    assert body["usage"] == usage
    details = usage["completion_tokens_details"]
    tokenizer, _ = world("qwen3")
    thought = len(encoded(tokenizer, THOUGHT + "\n")) + 1
    assert details["reasoning_tokens"] == thought
    assert details["hidden_tokens"] == (0 if shown == "show" else thought)
    assert usage["completion_tokens"] == details["released_tokens"] + details["hidden_tokens"]
    assert "reasoning_tokens" not in plain["usage"]["completion_tokens_details"]
    assert f"redflag_tokens_thought_total {2 * thought:.1f}" in metrics


@pytest.mark.parametrize("shown", ["hide", "show"])
def test_an_alarm_in_a_thought_is_a_halt_before_any_content(shown):
    with serving(Policy(thoughts=shown), high={2: (0.9, 0.0)}) as server:
        body = ask(server, **THINK).json()
        deltas, _ = streamed(server, **THINK)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "content_filter" and choice["message"]["content"] == ""
    assert choice["message"]["refusal"] and body["redflag"]["category"] == "harm"
    assert deltas["content"] == "" and deltas["reasoning"] == ("Let me" if shown == "show" else "")


def test_a_decoy_looks_like_an_answer_behind_a_thought():
    policy = Policy(default="replace", replacement="No.", decoy=True)
    with serving(policy, high={2: (0.9, 0.0)}) as server:
        body = ask(server, **THINK).json()
    assert body["choices"][0]["finish_reason"] == "stop" and "redflag" not in body
    assert body["choices"][0]["message"]["content"] == "No."
    details = body["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == details["hidden_tokens"] == 3


def test_a_length_limit_inside_the_thought_leaves_the_content_empty():
    with serving(Policy(thoughts="show")) as server:
        body = ask(server, max_tokens=2, **THINK).json()
    (choice,) = body["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert choice["message"]["reasoning_content"] == "Let me" and choice["message"]["refusal"] is None


def test_the_openai_client_reads_both_parts():
    with serving(Policy(thoughts="show")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client:
            whole = client.chat.completions.create(model=MODEL, messages=[ASK], reasoning_effort="medium")
            stream = client.chat.completions.create(model=MODEL, messages=[ASK], extra_body=THINK, stream=True)
            deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].message.model_extra["reasoning_content"] == THOUGHT + "\n"
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas) == THOUGHT + "\n"


def test_what_a_model_without_a_thinking_mode_is_asked_for(tokenizer, spec, script):
    thresholds = Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    _, turns = engine(script("abc"), tokenizer.eos_token_id)
    with running(Guard(turns, tokenizer, spec, thresholds), Limits(MODEL)) as server:
        refused = ask(server, **THINK)
        ignored = ask(server, reasoning_effort="high")
        off = ask(server, reasoning_effort="none", chat_template_kwargs={"enable_thinking": False})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "chat_template_kwargs")
    assert ignored.status_code == off.status_code == 200
    assert ignored.headers["x-ignored-params"] == "reasoning_effort" and "x-ignored-params" not in off.headers


@pytest.mark.parametrize("fields", [{"custom": 1}, {"enable_thinking": "yes"}, {"enable_thinking": True, "tools": []}])
def test_other_options_of_the_chat_template_are_refused_by_name(fields):
    with serving() as server:
        answer = ask(server, chat_template_kwargs=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("chat_template_kwargs.")


def test_the_operator_sees_the_thoughts_peaks_apart():
    key = "operator-key-of-16-or-more"
    with serving(limits=Limits(MODEL, operator_key=key), high={1: (0.4, 0.0), 9: (0.2, 0.0)}) as server:
        headers = {"X-Redflag-Operator": key, "X-Redflag-Trace": "1"}
        answer = httpx.post(
            server.url + CHAT, json={"model": MODEL, "messages": [ASK], **THINK}, headers=headers, timeout=20
        )
    seen = answer.json()["redflag"]
    assert seen["thought"]["peak"]["harm"] == 0.4 and seen["peak"]["harm"] == 0.2
