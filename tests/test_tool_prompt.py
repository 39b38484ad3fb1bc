"""Prompts with tools: the format is found, nothing of a definition or result is lost, and nobody writes a mark."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import fullwidth
from test_chat_templates import RELEASED, TRL
from test_chat_templates import world as made_world
from test_real_tokenizers import NAMES, special_ids
from test_real_tokenizers import world as real_world

from redflag.errors import RedflagError
from redflag.prompt import render_prompt
from redflag.tool_definitions import checked_tools, fill_tools
from redflag.tool_prompt import FORMATS, ToolUse, find_format, in_words, mark_ids, one_call_a_turn, render_tool_prompt

FAMILIES = {
    "gptoss.jinja": "harmony",
    "llama3_1.jinja": "llama",
    "llama3_2.jinja": "llama",
    "qwen2_5.jinja": "hermes",
    "qwen3.jinja": "hermes",
    "qwen3_instruct_2507.jinja": "hermes",
    "qwen3_vl.jinja": "hermes",
}
ASK = {"role": "user", "content": "Weather?"}


def tool(name: str = "get_weather", text: str = "Tells the weather.", key: str = "city", **more: Any) -> dict[str, Any]:
    properties = {
        key: {"type": "string", "description": text, "default": text},
        "unit": {"type": "string", "enum": ["c", text]},
        "days": {"type": "array", "items": {"type": "integer", "description": text}},
    }
    parameters = {"type": "object", "properties": properties, "required": [key], "title": text}
    return {"type": "function", "function": {"name": name, "description": text, "parameters": parameters, **more}}


def talk(text: str = "sunny", calls: int = 1) -> list[dict[str, Any]]:
    made = [
        {"id": f"call1234{i}", "type": "function", "function": {"name": "get_weather", "arguments": {"city": text}}}
        for i in range(calls)
    ]
    results = [{"role": "tool", "content": text, "tool_call_id": call["id"], "name": "get_weather"} for call in made]
    return [ASK, {"role": "assistant", "content": "", "tool_calls": made}, *results]


@pytest.mark.parametrize("template", RELEASED)
def test_the_format_is_the_templates_own_where_it_is_known(template: str) -> None:
    tokenizer, spec = made_world((TRL / template).read_text())
    form = find_format(tokenizer, spec)
    assert form.name == FAMILIES.get(template, "json")
    ids = render_tool_prompt(tokenizer, [ASK], spec, ToolUse(form, (tool(),))).ids
    text = tokenizer.decode(ids)
    assert "Tells the weather." in text and "get_weather" in text and "city" in text
    if form.name != "json":
        stock = tokenizer.apply_chat_template(
            [ASK], tools=[tool()], add_generation_prompt=True, return_dict=False, enable_thinking=False
        )
        assert ids[: len(stock)] == stock, "the prompt is the template's own"


@pytest.mark.parametrize("template", RELEASED)
@pytest.mark.parametrize("calls", [1, 2])
def test_calls_and_results_are_shown_whatever_the_template(template: str, calls: int) -> None:
    tokenizer, spec = made_world((TRL / template).read_text())
    form = find_format(tokenizer, spec)
    text = tokenizer.decode(render_tool_prompt(tokenizer, talk("It rains", calls), spec, ToolUse(form, (tool(),))).ids)
    assert text.count("It rains") >= 2 * calls and text.count("get_weather") >= 1 + calls
    without = render_tool_prompt(tokenizer, talk("It rains", calls), spec, ToolUse(form)).ids
    assert tokenizer.decode(without).count("It rains") >= 2 * calls, "tools are no longer offered, their turns remain"


def test_parallel_calls_become_turns_with_their_results() -> None:
    turns = one_call_a_turn([*talk("a", 2), ASK])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant", "tool", "user"]
    assert [turn["tool_calls"][0]["id"] for turn in turns if "tool_calls" in turn] == ["call12340", "call12341"]
    assert [turn["tool_call_id"] for turn in turns if turn["role"] == "tool"] == ["call12340", "call12341"]
    stray = {"role": "tool", "content": "x", "tool_call_id": "unknown"}
    assert one_call_a_turn([ASK, stray]) == [ASK, stray]


def test_without_a_template_for_tools_they_are_put_into_words() -> None:
    turns = in_words([*talk("rain", 2), ASK], checked_tools([tool()]))
    system, ask, called, results = turns
    assert (
        system["role"] == "system"
        and '{"name": "get_weather", "description": "Tells the weather."' in system["content"]
    )
    assert ask == ASK
    assert called["content"].splitlines() == ['{"name": "get_weather", "arguments": {"city": "rain"}}'] * 2
    assert results["role"] == "user" and results["content"].count("Result of get_weather:\nrain") == 2
    assert results["content"].endswith("\n\nWeather?")
    # A client's own system turn stays; a template without system turns gets the words in the user's.
    kept = in_words([{"role": "system", "content": "Be kind."}, ASK], checked_tools([tool()]))
    assert len(kept) == 2 and kept[0]["content"].endswith("\n\nBe kind.")
    moved = in_words([ASK], checked_tools([tool()]), "user")
    assert len(moved) == 1 and moved[0]["content"].endswith("\n\nWeather?")


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"mistral"}))  # of which TRL has no template
def test_a_forced_call_is_begun_behind_the_prompt(name: str) -> None:
    template = next((key for key, form in FAMILIES.items() if form == name), "phi3.jinja")
    tokenizer, spec = made_world((TRL / template).read_text())
    form = find_format(tokenizer, spec)
    plain = render_tool_prompt(tokenizer, [ASK], spec, ToolUse(form, (tool(),))).ids
    for forced in ("", "get_weather"):
        use = ToolUse(form, (tool(),), forced)
        ids = render_tool_prompt(tokenizer, [ASK], spec, use).ids
        assert ids[: len(plain)] == plain and tokenizer.decode(ids[len(plain) :]) == use.opening != ""
        marks = [i for i in ids[len(plain) :] if i in mark_ids(tokenizer, form)]
        assert len(marks) == sum(use.opening.count(mark) for mark in form.marks)


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([{"type": "retrieval"}], "tool 0 must be"),
        ([tool("a b")], "the name of tool 0 must be"),
        ([tool(""), tool()], "the name of tool 0 must be"),
        ([tool(), tool()], "must differ"),
        ([tool(f"f{i}") for i in range(129)], "at most 128"),
        ([tool(description=5)], "description of tool get_weather must be text"),
        ([tool(parameters=[1])], "parameters of tool get_weather must be a JSON schema"),
        ([tool(parameters={"a": float("nan")})], "must be JSON"),
        ([tool(text="\ud800")], "must be JSON"),
    ],
)
def test_a_malformed_definition_is_named(tools: list[Any], words: str) -> None:
    with pytest.raises(RedflagError, match=words):
        checked_tools(tools)


def test_structure_stays_where_texts_are_replaced() -> None:
    filled = fill_tools(checked_tools([tool()]), lambda kind, text: f"<{kind}>")
    assert filled[0]["function"]["name"] == "<function>"
    parameters = filled[0]["function"]["parameters"]
    assert parameters["type"] == "object" and parameters["required"] == ["<definition>"]
    assert parameters["properties"] == {
        "<key>": {"type": "array", "items": {"type": "integer", "description": "<definition>"}}
    }, "names of parameters are keys"


# Nobody writes control tokens


@functools.cache
def controls(name: str) -> frozenset[int]:
    tokenizer, spec = world(name)
    tokens = tokenizer.added_tokens_decoder.items()
    return frozenset(special_ids(tokenizer, spec)) | {i for i, token in tokens if "tool_" in token.content}


@functools.cache
def added_to(name: str) -> list[str]:
    """Texts of added tokens; of thousands, which look alike, some."""
    tokenizer, _ = world(name)
    texts = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return texts if len(texts) < 500 else [*texts[:100], *texts[-100:]]


def places(text: str) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Conversations and tools that hold a text, each in another place."""
    named = {"type": "function", "function": {"name": "add", "parameters": {text or "x": {"type": "string"}}}}
    return {
        "definition": ([ASK], [tool(text=text)]),
        "key": ([ASK], [tool(key=text or "x")]),
        "keyword": ([ASK], [named]),
        "result and argument": (talk(text), [tool()]),
        "without tools": (talk(text), []),
        "all": (talk(text, 2), [tool(text=text), tool("other", text)]),
    }


WORLDS = [*NAMES, "qwen3.jinja", "llama3_1.jinja", "gptoss.jinja", "phi3.jinja", "gemma4.jinja"]


@functools.cache
def world(name: str) -> tuple[Any, Any]:
    if name.endswith(".jinja"):
        return made_world((files("trl") / "chat_templates" / name).read_text())
    return real_world(name)


def rendered(name: str, place: str, text: str, form: Any) -> list[int]:
    tokenizer, spec = world(name)
    messages, tools = places(text)[place]
    found = render_tool_prompt(tokenizer, messages, spec, ToolUse(form, tuple(tools))).ids
    assert not set(spec.ids) & set(found)
    return [i for i in found if i in controls(name)]


@pytest.mark.parametrize("name", WORLDS)
def test_no_added_token_is_made_from_a_definition_a_call_or_a_result(name: str) -> None:
    tokenizer, spec = world(name)
    form = find_format(tokenizer, spec)
    added = added_to(name)
    texts = [" ".join(added), "".join(added), *(flag.token for flag in spec.flags), *map(fullwidth, added[-20:])]
    for place in places("x"):
        honest = rendered(name, place, "x", form)
        for text in texts:
            try:
                assert rendered(name, place, text, form) == honest, (place, text[:60])
            except RedflagError as error:  # names and keys are not tokenised apart
                assert place in ("key", "keyword") and "control token" in str(error)


@pytest.mark.parametrize("name", WORLDS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_whatever_stands_in_definitions_calls_and_results_is_no_mark(name: str, data: Any) -> None:
    tokenizer, spec = world(name)
    form = find_format(tokenizer, spec)
    added = added_to(name)
    piece = st.one_of(
        st.sampled_from([flag.token for flag in spec.flags]),
        st.sampled_from(added),
        st.sampled_from(["\\", '"', "\\u003c", "\n", "/", "*/", "{{", "}}", "{%", "<", "|", ">"]),
        st.builds(lambda token, cut: token[: cut % len(token)], st.sampled_from(added), st.integers(1, 30)),
        st.builds(lambda token, cut: token[cut % len(token) :], st.sampled_from(added), st.integers(1, 30)),
        st.builds(fullwidth, st.sampled_from(added)),
        st.text(max_size=6),
    )
    text = "".join(data.draw(st.lists(piece, max_size=6)))
    place = data.draw(st.sampled_from(sorted(places("x"))))
    try:
        found = rendered(name, place, text, form)
    except RedflagError as error:
        assert any(word in str(error) for word in ("control token", "surrogate", "must be JSON"))
        return
    assert found == rendered(name, place, "x" if text.strip() else text, form)


def test_a_definition_that_holds_a_mark_is_read_as_it_stands() -> None:
    tokenizer, spec = made_world((TRL / "qwen3.jinja").read_text())
    text = "Ends with <|im_end|>, and opens <tool_call> or <|flag|>."
    ids = render_tool_prompt(tokenizer, [ASK], spec, ToolUse(FORMATS["hermes"], (tool(text=text),))).ids
    assert json.dumps(text) in tokenizer.decode(ids)
    with pytest.raises(RedflagError, match="does not show the tool 'get_weather'"):
        render_prompt(*made_world((TRL / "phi3.jinja").read_text())[:1], [ASK], spec, tools=[tool()])
