"""Tool turns and reasoning: rendered where the template can, else refused with a reason; never control tokens."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
from test_chat_templates import world

from redflag.errors import RedflagError
from redflag.prompt import render_prompt, render_response

TRL = files("trl") / "chat_templates"


def talk(arguments: Any, name: str = "get_weather", **more: Any) -> list[dict[str, Any]]:
    call = {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call], **more},
        {"role": "tool", "content": "sunny", "tool_call_id": "call12345", "name": name},
    ]


def rendered(template: str, messages: list[dict[str, Any]]) -> str:
    tokenizer, spec = world((TRL / template).read_text())
    return str(tokenizer.decode(render_prompt(tokenizer, messages, spec)))


@pytest.mark.parametrize(
    "template, call",
    [
        ("qwen3.jinja", '{"name": "get_weather", "arguments": {"city": "Paris \\"Nord\\"", "days": 3}}'),
        ("llama3_1.jinja", '{"name": "get_weather", "parameters": {"city": "Paris \\"Nord\\"", "days": 3}}'),
        (
            "deepseekv3.jinja",
            'get_weather\n```json\n{"city": "Paris \\"Nord\\"", "days": 3}\n```',
        ),  # text, None content
        ("gptoss.jinja", 'functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris'),
        ("glm4moe.jinja", '<arg_value>Paris "Nord"</arg_value>'),
    ],
)
def test_calls_are_rendered_as_each_template_wants_them(template: str, call: str) -> None:
    arguments = {"city": 'Paris "Nord"', "days": 3}
    text = rendered(template, talk(arguments))
    assert call in text and "sunny" in text
    assert text == rendered(template, talk(json.dumps(arguments))), "JSON text and objects are the same"


@pytest.mark.parametrize("template", ["llama3.jinja", "phi3.jinja", "gemma3.jinja", "llava_next.jinja"])
def test_a_template_that_cannot_show_a_call_is_refused_with_the_reason(template: str) -> None:
    with pytest.raises(RedflagError, match=r"does not show the argument 'Paris' of message 1|refuses the turns"):
        rendered(template, talk({"city": "Paris"}))


@pytest.mark.parametrize("template", ["qwen3.jinja", "llama3_1.jinja", "deepseekv3.jinja", "gptoss.jinja"])
@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"city": "{}"}, "get_weather"),
        ({"city": ["x", {"inner": "a{}b"}]}, "get_weather"),
        ("no JSON {}", "get_weather"),
        ({"{}": "Paris"}, "get_weather"),
        ({"city": "Paris"}, "get{}"),
    ],
)
def test_nothing_in_a_call_becomes_a_control_token(template: str, arguments: Any, name: str) -> None:
    tokenizer, spec = world((TRL / template).read_text())
    added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if "qwen3" in template:  # ordinary tokens by which the template marks a call
        special.update(tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>", "<tool_response>"]))

    def filled(value: Any, text: str) -> Any:
        return json.loads(json.dumps(value).replace("{}", json.dumps(text)[1:-1]))

    def marks(text: str) -> list[int]:
        messages = talk(filled(arguments, text), filled(name, text), reasoning_content=text)
        messages[2]["content"] = text
        return [i for i in render_prompt(tokenizer, messages, spec) if i in special]

    honest = marks("x")
    for token in sorted(special):
        try:
            assert marks(added[token]) == honest, added[token]
        except RedflagError:  # names and keys are not tokenised apart: the conversation is refused
            assert "{}" in name or "{}" in arguments


def test_reasoning_of_an_earlier_turn_may_be_left_out_and_is_a_thought_in_the_last_one() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "He greets me."},
        {"role": "user", "content": "Bye"},
    ]
    text = rendered("qwen3.jinja", messages)
    assert "Hello" in text and "He greets me." not in text
    assert "He greets me." in rendered("qwen3_8.jinja", messages)
    tokenizer, spec = world((TRL / "qwen3.jinja").read_text())
    row = render_response(tokenizer, messages[:2], spec)
    assert tokenizer.decode(row.response_ids) == "He greets me.\n</think>\n\nHello"
    assert tokenizer.decode(row.prompt_ids).endswith("assistant\n<think>\n")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tool_calls": "f(x)"}, "tool_calls of message 1 must be a list"),
        ({"tool_calls": [{"name": "f"}]}, "tool_calls of message 1 must be a list"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, "tool_calls of message 1 must be a list"),
        ({"reasoning_content": ["Hm"]}, "reasoning_content of message 1 must be text"),
        ({"name": 3}, "name of message 1 must be text"),
        ({"role": "user"}, "message 1 must not have tool_calls. Only an assistant turn can have"),
        ({"reasoning_content": "a\ud800b"}, "message 1 must not hold half of a surrogate pair"),
    ],
)
def test_a_malformed_turn_is_named(change: dict[str, Any], words: str) -> None:
    messages = talk({"city": "Paris"})
    messages[1] |= change
    with pytest.raises(RedflagError, match=words):
        rendered("qwen3.jinja", messages)


def test_a_response_that_calls_tools_is_not_judged_as_text() -> None:
    tokenizer, spec = world((TRL / "qwen3.jinja").read_text())
    with pytest.raises(RedflagError, match="last turn must not call tools, since only text is judged"):
        render_response(tokenizer, talk({"city": "Paris"})[:2], spec)
