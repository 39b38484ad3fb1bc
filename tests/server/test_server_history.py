"""Conversations as clients send them back: answers as an SDK returned them, calls of tools and their results."""

# ruff: noqa: F811
from __future__ import annotations

import json

import openai
import pytest
from running import MODEL, body_of
from tolerant_server import (
    ASK,
    CHAT,
    KEY,
    post,
    prompt_of,
    server,  # noqa: F401# noqa: F401
)

from redflag.api.schema import ChatRequest
from redflag.api.schema import parse as parse_body

# What is sent back

SENT_BACK = [
    {"content": "hi", "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
    {"content": "hi", "tool_calls": [], "name": "bot"},
    {"content": "hi", "parsed": None},
    {"content": "hi", "reasoning_content": "SECRET"},
    {"content": "hi", "reasoning": "SECRET", "reasoning_content": None},
    {"content": "hi", "annotations": [{"type": "url_citation"}], "audio": {"id": "SECRET"}},
    {"content": "hi", "refusal": "SECRET"},
    {"content": [{"type": "text", "text": "hi"}]},
]


@pytest.mark.parametrize("fields", SENT_BACK)
def test_of_an_answer_that_is_sent_back_the_prompt_shows_the_text_alone(server, fields):
    plain, _ = prompt_of(server, [ASK, {"role": "assistant", "content": "hi"}, ASK])
    sent, answer = prompt_of(server, [ASK, {"role": "assistant", **fields}, ASK])
    assert sent == plain and "x-ignored-params" not in answer.headers


@pytest.mark.parametrize("fields", [{"content": None}, {}, {"content": []}, {"content": None, "refusal": "No."}])
def test_an_answer_without_a_text_is_an_empty_turn(server, fields):
    empty, _ = prompt_of(server, [ASK, {"role": "assistant", "content": ""}, ASK])
    assert prompt_of(server, [ASK, {"role": "assistant", **fields}, ASK])[0] == empty


def test_unknown_keys_of_messages_are_ignored_and_named(server):
    plain, _ = prompt_of(server, [ASK])
    parts = [{"type": "text", "text": "hello", "cache_control": {}}]
    sent, answer = prompt_of(server, [{"role": "user", "content": parts, "id": "m1", "opts": {}}])
    assert sent == plain
    assert answer.headers["x-ignored-params"] == "messages.id, messages.opts, messages.content.cache_control"


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_calls_of_tools_and_their_results_go_to_the_template():
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "SECRET", "name": "bot"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}], "name": "add"},
    ]
    request = parse_body(ChatRequest, json.dumps({"model": MODEL, "messages": [ASK, *turns, ASK]}).encode())
    assert request.input() == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        ASK,
    ]
    assert request.ignored == []


def test_the_result_of_a_tool_stands_in_the_prompt(server):
    result = {"role": "tool", "tool_call_id": "c1", "content": "the sum is 2"}
    plain, _ = prompt_of(server, [ASK])
    assert len(prompt_of(server, [ASK, {"role": "assistant", "content": "hi"}, result])[0]) > len(plain)


@pytest.mark.parametrize(
    ("turn", "code", "param", "words"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, None, None, ""),  # in words
        ({"role": "assistant", "tool_calls": [{"id": "c1"}]}, "invalid_value", "messages", "tool_calls of message 1"),
        ({"role": "assistant", "tool_calls": "add"}, "invalid_type", "messages.1.tool_calls", "array"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, None, None, ""),
        (
            {"role": "assistant", "content": "", "function_call": {"name": "f"}},
            *("unsupported_parameter", "messages.1.function_call", "tool_calls"),
        ),
        (
            {"role": "function", "name": "f", "content": "2"},
            *("unsupported_parameter", "messages.1.role", "tool turn"),
        ),
    ],
)
def test_turns_with_tools_are_shown_or_refused_in_words(server, turn, code, param, words):
    answer = post(server, body_of(CHAT) | {"messages": [ASK, turn, ASK]})
    if code is None:
        assert answer.status_code == 200
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert words in error["message"]


def test_messages_of_the_openai_package_may_be_sent_back(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        asked = {"model": MODEL, "max_tokens": 100}

        def created():
            return client.chat.completions.create(messages=[ASK], **asked)

        def streamed():
            with client.chat.completions.stream(messages=[ASK], **{**asked, "max_tokens": 4}) as stream:
                stream.until_done()
                return stream.current_completion_snapshot

        for answer in (created(), streamed()):
            message = answer.choices[0].message
            for back in (message, message.model_dump(), message.model_dump(exclude_none=True)):
                assert client.chat.completions.create(messages=[ASK, back, ASK], **asked).choices[0].message.content
