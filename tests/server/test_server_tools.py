"""Tools over HTTP: calls leave once the response has ended by itself, and nothing of them leaves behind a halt."""

# ruff: noqa: F811
from __future__ import annotations

import json
from typing import Any

import pytest
from running import chunks_of, text_of_chunks
from tool_server import ADD, ASK, FAMILIES, World, _closed, answer_of, family, post  # noqa: F401

from redflag.api.wire import REFUSAL
from redflag.watching.policy import Policy


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_read_in_the_format_of_the_models_family(family: Any, stream: bool) -> None:
    made, server, written, shown = family
    made.say(written)
    answer = answer_of(post(server, stream), stream)
    assert answer["content"] == shown and answer["finish"] == "tool_calls" and answer["refusal"] is None
    (call,) = answer["calls"]
    assert call["type"] == "function" and call["id"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1})


def test_the_prompt_names_the_tool_and_the_turns_may_be_sent_back(family: Any) -> None:
    made, server, written, _ = family
    made.say(written)
    first = post(server).json()["choices"][0]["message"]
    assert "Adds two numbers." in made.prompt() and "add" in made.prompt()
    made.say("It is 2." if "<|channel|>" not in written else "<|channel|>final<|message|>It is 2.")
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "the sum is 2"}
    answer = answer_of(post(server, messages=[ASK, first, result]), False)
    assert answer["content"] == "It is 2." and answer["finish"] == "stop" and not answer["calls"]
    assert "the sum is 2" in made.prompt() and '"a": 1' in made.prompt()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_back", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_halt_at_any_token_leaves_no_call(name: str, hold_back: int, stream: bool) -> None:
    made = World(name, Policy(hold_back=hold_back))
    _, written, shown = FAMILIES[name]
    ids = made.say(written)
    with made.running() as server:
        for position in range(0, len(ids), 1 if hold_back and stream else 4):
            made.say(written, position)
            response = post(server, stream)
            answer = answer_of(response, stream)
            assert not answer["calls"] and answer["finish"] == "content_filter"
            assert shown.startswith(answer["content"])
            assert (answer["refusal"] == REFUSAL) == (answer["content"] == "")
            assert "tool_calls" not in response.text and "arguments" not in response.text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fault_at_any_token_leaves_no_call(name: str) -> None:
    made = World(name)
    _, written, shown = FAMILIES[name]
    ids = made.say(written)
    with made.running() as server:
        for position in range(0, len(ids), 3):
            made.say(written, lost=position)
            assert post(server).status_code == 503
            streamed = post(server, stream=True)
            assert "tool_calls" not in streamed.text
            if streamed.status_code == 200:
                *chunks, last = chunks_of(streamed.content)
                assert "error" in last and shown.startswith(text_of_chunks(chunks))
            else:
                assert streamed.status_code == 503


def test_a_second_call_that_is_halted_takes_the_first_one_with_it() -> None:
    made = World("hermes")
    written = f"<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>"
    ids = made.say(written)
    with made.running() as server:
        made.say(written, len(ids) - 2)
        for stream in (False, True):
            answer = answer_of(post(server, stream), stream)
            assert (answer["finish"], answer["calls"], answer["content"]) == ("content_filter", [], "")
        made.say(written)
        assert len(answer_of(post(server), False)["calls"]) == 2
        assert len(answer_of(post(server, parallel_tool_calls=False), False)["calls"]) == 1


def test_a_replacement_takes_the_place_of_a_call() -> None:
    made = World("json", Policy(actions={"harm": "replace"}, replacement="Ask something else."))
    made.say(ADD, 5)
    with made.running() as server:
        for stream in (False, True):
            answer = answer_of(post(server, stream), stream)
            assert answer["content"] == "Ask something else." and not answer["calls"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_valid_call_is_content(stream: bool) -> None:
    made = World("hermes")
    with made.running() as server:
        for written, content in [
            ("<tool_call>\n{'name': 'add'}\n</tool_call>", "\n{'name': 'add'}\n"),
            (f"<tool_call>{ADD.replace('add', 'rm')}</tool_call>", ADD.replace("add", "rm")),
            ("no call", "no call"),
        ]:
            made.say(written)
            answer = answer_of(post(server, stream), stream)
            assert (answer["content"], answer["calls"], answer["finish"]) == (content, [], "stop")
        ids = made.say(f"<tool_call>{ADD}</tool_call>")
        answer = answer_of(post(server, stream, max_tokens=len(ids) - 4), stream)
        assert answer["calls"] == [] and answer["finish"] == "length" and answer["content"] in ADD


@pytest.mark.parametrize("stop", ["<tool_call>", "ol_call>", "add"])
def test_a_stop_text_may_cut_a_mark_or_a_call(stop: str) -> None:
    made = World("hermes")
    made.say(f"Well.<tool_call>{ADD}</tool_call>")
    with made.running() as server:
        for stream in (False, True):
            answer = answer_of(post(server, stream, stop=[stop]), stream)
            assert (answer["calls"], answer["finish"]) == ([], "stop")
            assert answer["content"] == "Well." + ('{"name": "' if stop == "add" else "")


def test_counts_tell_the_tokens_of_a_call_that_was_not_sent_from_those_that_were() -> None:
    made = World("hermes")
    written = f"Well.<tool_call>{ADD}</tool_call>"
    ids = made.say(written)
    with made.running() as server:
        usage = post(server).json()["usage"]
        details = usage["completion_tokens_details"]
        assert usage["completion_tokens"] == len(ids) == details["released_tokens"] and details["hidden_tokens"] == 0
        made.say(written, len(ids) - 2)
        usage = post(server).json()["usage"]
        shown = len(made.tokenizer("Well.", add_special_tokens=False)["input_ids"])
        assert usage["completion_tokens"] == len(ids) - 1
        assert usage["completion_tokens_details"]["released_tokens"] == shown
