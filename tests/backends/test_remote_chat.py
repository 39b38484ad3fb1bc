"""The chat route: the server renders, redflag compares, judges by ids, and goes on by ids."""

from __future__ import annotations

import asyncio
import json

import pytest
from upstream import DONE, EOS, FLAG, Upstream

from redflag.backends import ChatInput, Sampling
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_chat import PromptMismatchError
from redflag.backends.remote_handshake import handshake
from redflag.errors import RedflagError

PROMPT = [20, 30, 40]
CHAT = ChatInput(({"role": "user", "content": "20 30 40"},))


def connect(upstream, **options):
    return RemoteBackend(upstream.url, [FLAG], [EOS], step_timeout=10.0, route="chat", **options)


def chunk(**more):
    return b"data: " + json.dumps({"choices": [], **more}).encode() + b"\n\n"


def content(token, tops):
    top = [{"token": f"token_id:{i}", "logprob": value} for i, value in tops.items()]
    return {"token": f"token_id:{token}", "logprob": tops.get(token, -9999.0), "top_logprobs": top}


def choice(token, tops, finish=None, **more):
    logprobs = {"content": [content(token, tops)]}
    return {
        "index": 0,
        "delta": {"content": "x"},
        "token_ids": [token],
        "logprobs": logprobs,
        "finish_reason": finish,
    } | more


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_are_those_of_the_other_route(per_chunk, temperature):
    with Upstream(per_chunk=per_chunk).serve() as upstream:
        sampling = dict(max_new_tokens=30, seed=3, temperature=temperature)
        by_ids = list(RemoteBackend(upstream.url, [FLAG], [EOS]).stream(PROMPT, Sampling(**sampling)))
        backend = connect(upstream)
        assert list(backend.stream(PROMPT, Sampling(**sampling, chat=CHAT))) == by_ids

        async def collect():
            try:
                return [step async for step in backend.astream(PROMPT, Sampling(**sampling, chat=CHAT))]
            finally:
                await backend.aclose()

        assert asyncio.run(collect()) == by_ids
        ids, chat = upstream.bodies[0], upstream.bodies[-1]
        assert chat["messages"] == list(CHAT.messages) and "prompt" not in chat and chat["logprobs"] is True
        same = ("logit_bias", "logprob_token_ids", "stop_token_ids", "max_tokens", "temperature", "top_p", "seed")
        assert {name: chat[name] for name in same} == {name: ids[name] for name in same}


def test_tools_and_thoughts_are_the_servers_to_show_and_never_to_call():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": "é", "b": [1]}}}
    turns = (
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c", "content": "20 30 40"},
    )
    with Upstream().serve() as upstream:
        for chat in (ChatInput(turns, (tool,), thinking=True), CHAT):
            assert list(connect(upstream).stream(PROMPT, Sampling(max_new_tokens=5, seed=0, chat=chat)))
    shown, plain = upstream.bodies
    assert shown["tools"] == [tool] and shown["tool_choice"] == "none"
    assert shown["chat_template_kwargs"] == {"enable_thinking": True, "thinking": True}
    assert shown["messages"][0] == turns[0] and shown["messages"][2] == turns[2]
    assert shown["messages"][1]["reasoning"] == "hm", "as vLLM reads it"
    (sent,) = shown["messages"][1]["tool_calls"]
    assert sent == {**call, "function": {"name": "add", "arguments": '{"a": "é", "b": [1]}'}}
    assert call["function"]["arguments"] == {"a": "é", "b": [1]}, "the caller's own stays"
    assert plain["chat_template_kwargs"] == {"enable_thinking": False}
    assert "tools" not in plain and "tool_choice" not in plain, "vLLM refuses an empty list"


def test_without_a_conversation_it_goes_by_ids():
    with Upstream().serve() as upstream:
        assert list(connect(upstream).stream(PROMPT, Sampling(max_new_tokens=3, seed=0)))
        assert upstream.bodies[-1]["prompt"] == PROMPT and "messages" not in upstream.bodies[-1]


@pytest.mark.parametrize("rendered", [[20, 30], [20, 30, 40, 50], [20, FLAG, 40], [21, 30, 40], []])
def test_another_prompt_is_refused_before_the_first_step(rendered):
    with Upstream(render=lambda body: rendered).serve() as upstream:
        steps = []
        with pytest.raises(PromptMismatchError, match="same prompt here and in the upstream"):
            steps.extend(connect(upstream).stream(PROMPT, Sampling(max_new_tokens=5, seed=0, chat=CHAT)))
        assert not steps and len(upstream.bodies) == 1, "refused once, not tried again"


FIRST = chunk(prompt_token_ids=PROMPT)
GOOD = choice(9, {9: -1.0, FLAG: -2.0})
LAST = choice(EOS, {EOS: -0.1, FLAG: -4.0}, "stop")


@pytest.mark.parametrize(
    ("items", "named"),
    [
        ([chunk(choices=[GOOD]), chunk(choices=[LAST])], "before the prompt's ids"),
        ([chunk(choices=[GOOD]), FIRST, chunk(choices=[LAST])], "before the prompt's ids"),
        ([FIRST, chunk(choices=[choice(9, {FLAG: -2.0})])], "of another token"),
        ([FIRST, chunk(choices=[choice(9, {9: -1.0})])], "no log-probability of token_id:5"),
        ([FIRST, chunk(choices=[choice(FLAG, {FLAG: -1.0})])], "which logit_bias bans"),
        ([FIRST, chunk(choices=[GOOD | {"logprobs": None}])], "without log-probabilities"),
        ([FIRST, chunk(choices=[GOOD | {"token_ids": None, "logprobs": None}])], "without log-probabilities"),
        ([FIRST, chunk(choices=[{"index": 0, "delta": {"reasoning": "x"}}])], "without log-probabilities"),
        ([FIRST, chunk(choices=[{"index": 0, "delta": {"tool_calls": [{}]}}])], "without log-probabilities"),
        ([FIRST, chunk(choices=[GOOD]), chunk(choices=[GOOD | {"finish_reason": "stop"}])], "end-of-sequence ids"),
        ([FIRST, chunk(choices=[GOOD]), DONE], "without a finish_reason"),
        ([FIRST, chunk(choices=[GOOD | {"index": 1}])], "second response"),
        ([FIRST, chunk(choices=[GOOD | {"token_ids": [9, 9]}])], "2 tokens"),
        ([FIRST, chunk(choices=[GOOD | {"logprobs": {"content": [5]}}])], "unexpected shape"),
    ],
)
def test_what_cannot_be_judged_is_a_fault(items, named):
    with Upstream(script=lambda body, count: items).serve() as upstream, pytest.raises(ConnectionError, match=named):
        list(connect(upstream, retries=0).stream(PROMPT, Sampling(max_new_tokens=5, chat=CHAT)))


def test_a_call_of_a_tool_ends_like_any_answer():
    ended = LAST | {"finish_reason": "tool_calls", "delta": {}}
    with Upstream(
        script=lambda body, count: [FIRST, chunk(choices=[GOOD]), chunk(choices=[ended]), DONE]
    ).serve() as up:
        steps = list(connect(up).stream(PROMPT, Sampling(max_new_tokens=5, chat=CHAT)))
    assert [step.token_id for step in steps] == [9, EOS]


def test_hands_are_shaken_over_both_routes():
    with Upstream().serve() as upstream:
        handshake(connect(upstream), chat=(CHAT, PROMPT))
        assert "messages" in upstream.bodies[-1]
        with pytest.raises(RedflagError, match="same prompt"):
            handshake(connect(upstream), chat=(CHAT, [20, 30]))
    with Upstream(hides_prompt=True).serve() as upstream, pytest.raises(RedflagError, match="before the prompt's ids"):
        handshake(connect(upstream, retries=0), chat=(CHAT, PROMPT))
    with pytest.raises(RedflagError, match="upper_bound"):
        RemoteBackend("http://x", [FLAG], [EOS], route="chat", upper_bound=True)
