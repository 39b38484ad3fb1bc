"""Calls read from text: each format, however the text is cut; what is no valid call is content; no mark, no flag."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.api.tool_calls import CallReader
from redflag.tool_prompt import FORMATS, MARK, MISTRAL_11, ToolFormat, ToolUse

NAMES = ("add", "get.weather")
TOOLS = tuple({"type": "function", "function": {"name": name}} for name in NAMES)
FLAGS = ("<|flag|>",)
ADD = '{"name": "add", "arguments": {"a": 1}}'
SUN = '{"name": "get.weather", "arguments": {"city": "日本 \\"x\\""}}'
CALLED = [("add", {"a": 1})]
BOTH = [*CALLED, ("get.weather", {"city": '日本 "x"'})]


def marked(form: ToolFormat, text: str) -> str:
    """The text as a response holds it whose marks are tokens."""
    for mark in form.marks:
        text = text.replace(mark, MARK + mark)
    return text


def read(form: ToolFormat, pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, Any]]]:
    marks = options.pop("marks", form.marks)
    reader = CallReader(ToolUse(form, TOOLS, options.pop("forced", None)), marks, flags=FLAGS, **options)
    content = "".join(map(reader.push, pieces)) + reader.finish()
    assert len({call.id for call in reader.calls}) == len(reader.calls)
    return content, [(call.name, json.loads(call.arguments)) for call in reader.calls]


# format, what the model writes, content, calls
CASES = [
    ("hermes", f"<tool_call>\n{ADD}\n</tool_call>", "", CALLED),
    ("hermes", f"Let me see.\n\n<tool_call>\n{ADD}\n</tool_call>\n<tool_call>{SUN}</tool_call>\n", "Let me see.", BOTH),
    ("hermes", f"<tool_call>{ADD}", "", CALLED),  # the turn ended before the call's own end
    ("hermes", f"<tool_call>{ADD}</tool_call> Done.", " Done.", CALLED),
    ("hermes", f"<tool_call>{ADD[:-1]}</tool_call>", ADD[:-1], []),
    ("hermes", "<tool_call>{'name': 'add'}</tool_call>", "{'name': 'add'}", []),
    ("hermes", f"<tool_call>{ADD}</tool_call><tool_call>no</tool_call>", "no", CALLED),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", "two lines \n\n", "two lines \n\n", []),
    ("hermes", "a</tool_call>b", "ab", []),
    ("hermes", ADD, ADD, []),
    ("llama", ADD.replace("arguments", "parameters"), "", CALLED),
    ("llama", "<|python_tag|>" + ADD.replace("arguments", "parameters"), "", CALLED),
    ("llama", f"{ADD}; {SUN}", "", BOTH),
    ("llama", '{"type": "function", "function": "add", "parameters": {"a": 1}}', "", CALLED),
    ("json", ADD, "", CALLED),
    ("json", f" \n{ADD}\n{SUN}\n", "", BOTH),
    ("json", f"[{ADD}, {SUN}]", "", BOTH),
    ("json", f"```json\n{ADD}\n```", "", CALLED),
    ("json", f"```\r\n[{ADD}]```", "", CALLED),
    ("json", f'{{"type": "function", "function": {ADD}}}', "", CALLED),
    ("json", '{"name": "add", "arguments": "{\\"a\\": 1}"}', "", CALLED),
    ("json", '{"name": "add", "arguments": {"a": "two\nlines"}}', "", [("add", {"a": "two\nlines"})]),
    # None of it is a call where not all of it is: it may be an example.
    ("json", f"{ADD} is how to call it.", f"{ADD} is how to call it.", []),
    ("json", f"Call it so: {ADD}", f"Call it so: {ADD}", []),
    ("json", f"{ADD}\n{ADD[:-1]}", f"{ADD}\n{ADD[:-1]}", []),
    ("json", ADD.replace("add", "sub"), ADD.replace("add", "sub"), []),
    ("json", '{"name": "add"}', '{"name": "add"}', []),
    ("json", '{"name": "add", "arguments": [1]}', '{"name": "add", "arguments": [1]}', []),
    ("json", '{"name": "add", "arguments": {"a": NaN}}', '{"name": "add", "arguments": {"a": NaN}}', []),
    ("json", '{"name": "add", "arguments": {"a": 1e999}}', '{"name": "add", "arguments": {"a": 1e999}}', []),
    ("json", '{"name": "add", "arguments": {"a": "\\ud800"}}', '{"name": "add", "arguments": {"a": "\\ud800"}}', []),
    ("json", ADD.replace("1", '"\\u003c|flag|>"'), ADD.replace("1", '"\\u003c|flag|>"'), []),  # a flag's text in it
    ("json", '{"answer": 42}', '{"answer": 42}', []),
    ("json", '```json\n{"answer": 42}\n```', '```json\n{"answer": 42}\n```', []),
    ("json", "[" * 3000, "[" * 3000, []),
    ("json", '{"name": "add", "arguments": ' + "[" * 9000, '{"name": "add", "arguments": ' + "[" * 9000, []),
    ("json", "Hello {there}", "Hello {there}", []),
    ("json", " ", " ", []),
    ("mistral", f"[TOOL_CALLS][{ADD}, {SUN}]", "", BOTH),
    ("mistral", f"[TOOL_CALLS] [{ADD}]", "", CALLED),
    ("mistral", 'Well. [TOOL_CALLS]add[ARGS]{"a": 1}', "Well.", CALLED),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}', "", CALLED),
    ("mistral", '[TOOL_CALLS]add{"a": 1}[TOOL_CALLS]get.weather[ARGS]{"city": "日本 \\"x\\""}', "", BOTH),
    ("mistral", "[TOOL_CALLS]add[ARGS]{", "add{", []),
    ("mistral", "[1] [TOO", "[1] [TOO", []),
    ("harmony", "<|channel|>final<|message|>Hello", "Hello", []),
    ("harmony", ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}', "", CALLED),
    ("harmony", '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>x', "", CALLED),
    (
        "harmony",
        "<|channel|>analysis<|message|>SECRET<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see."
        '<|end|><|start|>assistant<|channel|>commentary to=functions.add json<|message|>{"a": 1}<|call|>',
        "Let me see.",
        CALLED,
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>SECRET<|end|><|start|>assistant<|channel|>final<|message|>One"
        "<|end|><|start|>assistant<|channel|>final<|message|>Two",
        "One\n\nTwo",
        [],
    ),
    ("harmony", "<|channel|>commentary to=functions.add<|message|>{", "{", []),
    ("harmony", "<|channel|>commentary to=python<|message|>{}", "{}", []),
    ("harmony", '<|channel|>final<|message|>Hi<|call|><|start|>tool<|message|>{"a": 1}', "Hi", []),
    ("harmony", "Hello, without any channel", "Hello, without any channel", []),
    ("harmony", "<|channel|>analysis<|message|>SECRET", "", []),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES, ids=lambda value: str(value)[:40])
def test_text_becomes_content_and_calls(name: str, text: str, content: str, calls: list[Any]) -> None:
    form = FORMATS[name]
    text = marked(form, text)
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls), "a character at a time"
    for cut in range(0, len(text), max(1, len(text) // 50)):
        assert read(form, [text[:cut], "", text[cut:]]) == (content, calls), cut


@pytest.mark.parametrize("name", FORMATS)
def test_a_mark_that_is_spelled_out_is_text_where_it_is_a_token(name: str) -> None:
    form = FORMATS[name]
    for text, content, calls in ((case[1:]) for case in CASES if case[0] == name):
        if any(mark in text for mark in form.marks):
            assert read(form, [text])[1] == []
            if name in ("hermes", "mistral") and content:
                assert read(form, [text], marks=())[1] == calls, "where it is none, it is a mark"


@pytest.mark.parametrize(
    ("form", "forced", "written", "calls", "content"),
    [
        (FORMATS["hermes"], "add", ' {"a": 1}}\n</tool_call>', CALLED, ""),
        (FORMATS["hermes"], "", ' "add", "arguments": {"a": 1}}</tool_call>', CALLED, ""),
        (FORMATS["hermes"], "add", " no", [], " no"),
        (FORMATS["llama"], "add", ' {"a": 1}} and so on', CALLED, ""),
        (FORMATS["json"], "add", ' {"a": 1}}\n{"b', CALLED, ""),
        (FORMATS["json"], "", ' "add", "arguments": {"a": 1}}', CALLED, ""),
        (FORMATS["json"], "add", " no", [], " no"),
        (FORMATS["mistral"], "add", ' {"a": 1}}]', CALLED, ""),
        (MISTRAL_11, "add", '{"a": 1}', CALLED, ""),
        (MISTRAL_11, "add", "no", [], "no"),
        (FORMATS["harmony"], "add", '{"a": 1}', CALLED, ""),
        (FORMATS["harmony"], "add", "no", [], "no"),
    ],
)
def test_a_call_that_was_begun_in_the_prompt(
    form: ToolFormat, forced: str, written: str, calls: list[Any], content: str
) -> None:
    written = marked(form, written)
    assert read(form, [written], forced=forced) == (content, calls)
    assert read(form, list(written), forced=forced) == (content, calls)


def test_one_call_where_one_is_wanted() -> None:
    assert read(FORMATS["json"], [ADD, SUN], parallel=False) == ("", CALLED)
    assert read(
        FORMATS["hermes"], [marked(FORMATS["hermes"], f"<tool_call>{ADD}<tool_call>{SUN}")], parallel=False
    ) == (
        "",
        CALLED,
    )


def test_ids_are_such_as_the_template_takes_back() -> None:
    for name, length in (("mistral", 9), ("hermes", 29)):
        form = FORMATS[name]
        reader = CallReader(ToolUse(form, TOOLS), form.marks)
        reader.push(marked(form, f"[TOOL_CALLS][{ADD}]" if name == "mistral" else f"<tool_call>{ADD}"))
        reader.finish()
        assert len(reader.calls[0].id) == length


MARKS = [mark for form in FORMATS.values() for mark in form.marks]
WORDS = [ADD, SUN, ADD[:9], ADD[9:], "add", "final", "analysis", "assistant", " to=functions.add", '{"a": 1}', "é日"]
SIGNS = ["{", "}", "[", "]", "```json\n", "```", "\n", " ", "<|fl", "ag|>", "<|flag|>", '"\\u003c|flag|>"']
PIECES = st.sampled_from([*MARKS, *(MARK + mark for mark in MARKS), *WORDS, *SIGNS])


@settings(max_examples=400)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    parts=st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    forced=st.sampled_from([None, "", "add"]),
)
def test_any_text_cut_anywhere_is_read_alike_and_shows_no_mark_and_no_flag(
    name: str, parts: list[str], cuts: list[int], forced: str | None
) -> None:
    form = FORMATS[name]
    parts = [part for part in parts if MARK not in part or part[1:] in form.marks]
    text = "".join(parts)
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    content, calls = read(form, [text], forced=forced)
    assert read(form, [text[a:b] for a, b in itertools.pairwise(edges)], forced=forced) == (content, calls)
    assert read(form, parts, forced=forced) == (content, calls)
    said = content + json.dumps(calls, ensure_ascii=False)
    assert MARK not in said and "<|flag|>" not in said
    for function, arguments in calls:
        assert function in NAMES and isinstance(arguments, dict)


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(FORMATS)), parts=st.lists(PIECES, max_size=12))
def test_without_its_end_a_response_makes_no_call(name: str, parts: list[str]) -> None:
    form = FORMATS[name]
    reader = CallReader(ToolUse(form, TOOLS), form.marks, flags=FLAGS)
    shown = ""
    for part in parts:
        shown += reader.push(part)
        assert reader.calls == ()
    if name != "harmony":  # There content may follow a call.
        before = shown
        reader.push(marked(form, form.before))
        if reader.state == "held":
            assert reader.push(ADD) == "" and shown == before
