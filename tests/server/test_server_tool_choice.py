"""What a request may say of tools, and what does not go with them."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from running import MODEL, body_of
from tool_server import (
    ADD,
    ASK,
    CHAT,
    TEXT,
    TOOL,
    World,
    _closed,  # noqa: F401
    answer_of,
    post,
)

from redflag.errors import RedflagError
from redflag.watching.monitor import MonitorConfig

# tool_choice


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments":'),
        ("llama", '{"name": "add", "parameters":'),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments":'),
        ("harmony", " to=functions.add<|channel|>commentary json<|message|>"),
        ("json", '{"name": "add", "arguments":'),
    ],
)
def test_a_call_that_has_to_be_made_is_begun_in_the_prompt(name: str, opening: str) -> None:
    made = World(name)
    closing = {"harmony": "", "mistral": "}]", "hermes": "}\n</tool_call>"}.get(name, "}")
    with made.running() as server:
        for choice in ("required", {"type": "function", "function": {"name": "add"}}):
            made.say(' {"a": 1}' + closing)
            answer = answer_of(post(server, tool_choice=choice), False)
            assert made.prompt().endswith(opening)
            assert answer["finish"] == "tool_calls" and answer["calls"][0]["function"]["arguments"] == '{"a": 1}'
            made.say(" not at all")
            answer = answer_of(post(server, tool_choice=choice), False)
            assert (answer["finish"], answer["calls"], answer["content"]) == ("stop", [], " not at all")
            made.say(' {"a": 1}' + closing, 3)
            assert answer_of(post(server, tool_choice=choice), False)["calls"] == []
        other = {**TOOL, "function": {"name": "sub"}}
        made.say("x")
        httpx.post(server.url + CHAT, json=body_of(CHAT, tools=[TOOL, other], tool_choice="required"))
        assert made.prompt().endswith(opening.partition("add")[0].rstrip(' "'))


def test_none_leaves_tools_out_of_the_prompt_and_calls_in_the_content() -> None:
    made = World("json")
    with made.running() as server:
        made.say(ADD)
        answer = answer_of(post(server, tool_choice="none"), False)
        assert (answer["content"], answer["finish"]) == (ADD, "stop")
        assert "Adds two numbers." not in made.prompt()


def test_no_call_is_begun_where_the_first_token_decides() -> None:
    made = World("json", monitor=MonitorConfig("first"))
    with made.running() as server:
        made.say(ADD)
        assert post(server).status_code == 200
        error = post(server, tool_choice="required").json()["error"]
        assert "tool_choice must be auto or none" in error["message"]


REFUSED = [
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools.0.function"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "invalid_value", "tools.0.type"),
    ({"tools": [{"type": "function", "function": {"name": "with space"}}]}, "invalid_value", "tools"),
    ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
    ({"tools": [TOOL] * 129}, "invalid_value", "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "invalid_type", None),
    ({"tools": "add"}, "invalid_type", "tools"),
    ({"tool_choice": "always"}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "invalid_value", "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "invalid_value", "tool_choice"),
    ({"parallel_tool_calls": "yes"}, "invalid_type", "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
]


@pytest.mark.parametrize(("fields", "code", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_called_is_refused_by_name(fields: dict[str, Any], code: str, param: str | None) -> None:
    with World("json").running() as server:
        answer = httpx.post(server.url + CHAT, json=body_of(CHAT) | {"tools": [TOOL]} | fields)
        assert answer.status_code == 400, answer.content
        assert answer.json()["error"]["code"] == code
        assert param is None or answer.json()["error"]["param"] == param


def test_the_operator_may_switch_tools_off_and_name_the_format() -> None:
    with World("hermes", tool_format="off").running() as server:
        assert post(server).json()["error"]["param"] == "tools"
        assert httpx.post(server.url + CHAT, json=body_of(CHAT)).status_code in (200, 503)
    made = World("hermes", tool_format="json")
    with made.running() as server:
        made.say(ADD)
        assert answer_of(post(server), False)["finish"] == "tool_calls"
        assert "<tools>" not in made.prompt()
    made = World("json", tool_format="hermes")
    with pytest.raises(RedflagError, match="tool_format must be auto or json"), made.running():
        pass


def test_a_definition_is_not_held_to_its_schema_and_says_so() -> None:
    made = World("json")
    with made.running() as server:
        made.say(ADD)
        strict = {"type": "function", "function": {**TOOL["function"], "strict": True, "x": 1}, "cache_control": {}}
        answer = httpx.post(server.url + CHAT, json=body_of(CHAT, tools=[strict]))
        assert answer.headers["x-ignored-params"] == "tools.cache_control, tools.function.x, tools.function.strict"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_behind_a_thought(stream: bool) -> None:
    made = World("hermes")
    asked = {"chat_template_kwargs": {"enable_thinking": True}}
    with made.running() as server:
        made.say(f"<tool_call>{ADD}</tool_call> is a thought.\n</think>\n\nWell.<tool_call>{ADD}</tool_call>")
        answer = answer_of(post(server, stream, **asked), stream)
        assert (answer["content"], answer["finish"], len(answer["calls"])) == ("Well.", "tool_calls", 1)
        assert made.prompt().endswith("<think>\n")
        made.say(' {"a": 1}}')
        answer = answer_of(post(server, stream, tool_choice="required", **asked), stream)
        assert made.prompt().endswith('"arguments":') and len(answer["calls"]) == 1


def test_what_does_not_go_with_tools_is_refused_by_name() -> None:
    with World("json", logprobs=True).running() as server:
        for fields, param in (
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"logprobs": True}, "logprobs"),
        ):
            error = post(server, **fields)
            assert (error.status_code, error.json()["error"]["param"]) == (400, param)


def test_each_choice_has_its_own_calls() -> None:
    made = World("json")
    made.say(ADD)
    with made.running() as server:
        choices = post(server, n=2).json()["choices"]
        assert [len(choice["message"]["tool_calls"]) for choice in choices] == [1, 1]


def test_tools_belong_to_chats() -> None:
    with World("json").running() as server:
        answer = httpx.post(server.url + TEXT, json=body_of(TEXT, tools=[TOOL]))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


def test_the_openai_package_reads_calls_whole_and_streamed() -> None:
    made = World("hermes")
    made.say(f"Well.<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>")
    with made.running() as server, openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": [ASK], "tools": [TOOL]}
        message = client.chat.completions.create(**asked).choices[0].message
        assert [call.function.arguments for call in message.tool_calls] == ['{"a": 1}'] * 2
        assert message.content == "Well."
        with client.chat.completions.stream(**asked) as events:
            final = events.get_final_completion()
        assert final.choices[0].finish_reason == "tool_calls"
        assert [call.function.arguments for call in final.choices[0].message.tool_calls] == ['{"a": 1}'] * 2
