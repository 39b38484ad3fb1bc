"""Tools and thoughts are the same at every door: what is asked, what is shown, and what is never sent."""

# ruff: noqa: F811
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from running import MODEL, Running
from tool_doors import ALONE, DOORS, NO_THOUGHT, THINK, TOOLS, ask, choice, read, result, turns
from tool_server import ADD, ASK, CLIENT, FAMILIES, World, _closed, family  # noqa: F401

from redflag.watching.policy import Policy

CALL = f"<tool_call>\n{ADD}\n</tool_call>"
THOUGHT = "Let me think.\n</think>\n\n"
LIMIT = dict(zip(DOORS, ("max_tokens", "max_output_tokens", "max_tokens"), strict=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_call_is_read_in_the_format_of_the_models_family(family: Any, door: str, stream: bool) -> None:
    made, server, written, shown = family
    made.say(written)
    answer = read(door, ask(server, door, stream), stream)
    assert (answer.text, answer.calls, answer.how) == (shown, [("add", {"a": 1})], "calls")
    assert "Adds two numbers." in made.prompt()


@pytest.fixture(scope="module", params=[(name, hold_back) for name in FAMILIES for hold_back in (0, 3)], ids=str)
def guarded(request: pytest.FixtureRequest) -> Iterator[tuple[World, Running, str, str]]:
    name, hold_back = request.param
    made = World(name, Policy(hold_back=hold_back))
    with made.running() as server:
        yield made, server, *FAMILIES[name][1:]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_halt_or_a_fault_at_any_token_leaves_no_call_at_any_door(guarded: Any, door: str, stream: bool) -> None:
    made, server, written, shown = guarded
    for position in range(0, len(made.say(written)), 5):
        for how, happens in (("halted", {"alarm": position}), ("fault", {"lost": position})):
            made.say(written, **happens)
            response = ask(server, door, stream)
            answer = read(door, response, stream)
            assert (answer.calls, answer.how) == ([], how)
            assert shown.startswith(answer.text)
            # Not even a part of one: nothing that a client could run, whatever it thinks of the end.
            said = response.text.replace(" ", "")
            assert not any(f'"type":"{kind}"' in said for kind in ("function_call", "tool_use", "input_json_delta"))
            assert '"tool_calls"' not in said and '"arguments"' not in said


@pytest.mark.parametrize("door", DOORS)
def test_a_second_call_that_is_halted_takes_the_first_one_with_it(door: str) -> None:
    made = World("hermes")
    ids = made.say(CALL + CALL)
    with made.running() as server:
        for stream in (False, True):
            made.say(CALL + CALL, len(ids) - 2)
            answer = read(door, ask(server, door, stream), stream)
            assert (answer.how, answer.calls, answer.text) == ("halted", [], "")
            made.say(CALL + CALL)
            assert len(read(door, ask(server, door, stream), stream).calls) == 2
            assert len(read(door, ask(server, door, stream, **ALONE[door]), stream).calls) == 1


def test_the_model_is_asked_alike_at_every_door() -> None:
    """The prompt of the first request, of the turns with call and result, and of every choice."""
    prompts: dict[str, list[str]] = {}
    made = World("hermes", Policy(thoughts="show"))
    with made.running() as server:
        for door in DOORS:
            seen = prompts[door] = []

            def asked(door: str = door, seen: list[str] = seen, **fields: Any) -> Any:
                answer = read(door, ask(server, door, **fields), False)
                seen.append(made.prompt())
                return answer

            made.say(f"{THOUGHT}Well.{CALL}")
            answer = asked(**THINK[door])
            assert (answer.thought, answer.text, answer.how) == ("Let me think.\n", "Well.", "calls")
            made.say("It is 2.")
            asked(**turns(door, *answer.turn, result(door, answer.ids[0], "the sum is 2")))
            assert "Well." in seen[-1] and "the sum is 2" in seen[-1] and '"a": 1' in seen[-1]
            for wanted in ("auto", "none", "required", "add"):
                made.say(' {"a": 1}}\n</tool_call>')
                assert asked(**choice(door, wanted)).how == ("calls" if wanted in ("required", "add") else "done")
            for switch in (THINK, NO_THOUGHT):
                made.say(f"{THOUGHT}x")
                asked(tools=[], **switch[door])
    assert prompts[DOORS[0]] == prompts[DOORS[1]] == prompts[DOORS[2]]
    assert len({*prompts[DOORS[0]]}) == 6, "named or any: there is one function; none: as without tools"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shown", ["hide", "show"])
@pytest.mark.parametrize("door", DOORS)
def test_a_thought_is_shown_apart_or_not_at_all(door: str, shown: Any, stream: bool) -> None:
    made = World("hermes", Policy(thoughts=shown))
    thought = "Let me think.\n" if shown == "show" else ""
    with made.running() as server:
        for written, text, calls, how in (
            (f"{THOUGHT}Well.", "Well.", 0, "done"),
            (f"{THOUGHT}Well.{CALL}", "Well.", 1, "calls"),
            (f"{THOUGHT}{CALL}", "", 1, "calls"),
        ):
            ids = made.say(written)
            answer = read(door, ask(server, door, stream, **THINK[door]), stream)
            assert (answer.thought, answer.text, len(answer.calls), answer.how) == (thought, text, calls, how)
            made.say(written, len(ids) - 1)
            answer = read(door, ask(server, door, stream, **THINK[door]), stream)
            assert (answer.thought, answer.text, answer.calls, answer.how) == (thought, text, [], "halted")
        made.say(f"{THOUGHT}Well.", 2)  # in the thought
        answer = read(door, ask(server, door, stream, **THINK[door]), stream)
        assert answer.how == "halted" and answer.text == "" and thought.startswith(answer.thought)
        made.say(f"{THOUGHT}Well.", lost=6)
        answer = read(door, ask(server, door, stream, **THINK[door]), stream)
        assert answer.how == "fault" and answer.text == "" and thought.startswith(answer.thought)


@pytest.mark.parametrize("door", DOORS)
def test_a_call_behind_a_stop_text_or_a_limit_is_read_alike(door: str) -> None:
    made = World("hermes")
    ids = made.say(f"Well.{CALL}")
    with made.running() as server:
        answer = read(door, ask(server, door, **{LIMIT[door]: len(ids) - 4}), False)
        assert answer.calls == [] and answer.how == "length" and answer.text.startswith("Well.")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_whole_call_in_an_answer_cut_at_its_limit_is_sent_and_the_end_says_that_it_was_cut(
    family: Any, door: str, stream: bool
) -> None:
    made, server, written, shown = family
    ids = made.say(written)
    answer = read(door, ask(server, door, stream, **{LIMIT[door]: len(ids) - 1}), stream)
    assert (answer.text, answer.calls, answer.how) == (shown, [("add", {"a": 1})], "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_call_that_the_limit_cut_is_not_sent_with_the_whole_one_before_it(door: str, stream: bool) -> None:
    made = World("hermes")
    ids = made.say(CALL + CALL)
    with made.running() as server:
        answer = read(door, ask(server, door, stream, **{LIMIT[door]: len(ids) - 8}), stream)
        assert (answer.calls, answer.how) == ([("add", {"a": 1})], "length")


@pytest.mark.parametrize("door", DOORS)
def test_the_operator_may_switch_tools_off_at_every_door(door: str) -> None:
    with World("hermes", tool_format="off").running() as server:
        answer = ask(server, door)
        assert answer.status_code == 400 and "tools are switched off" in answer.json()["error"]["message"]


@pytest.mark.parametrize("door", DOORS)
def test_what_does_not_go_with_tools_is_refused_at_every_door(door: str) -> None:
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    fields: dict[str, Any] = {
        "/v1/chat/completions": {"response_format": {"type": "json_object"}},
        "/v1/responses": {"text": {"format": schema}},
        "/v1/messages": {"output_config": {"format": schema}},
    }[door]
    with World("json").running() as server:
        answer = ask(server, door, **fields)
        assert answer.status_code == 400 and "not supported beside tools" in answer.json()["error"]["message"]


def test_names_that_mean_nothing_are_named() -> None:
    made = World("json")
    with made.running() as server:
        made.say("x")
        for door, tool in TOOLS.items():
            answer = ask(server, door, tools=[{**tool, "cache_control": {}}])
            assert answer.headers["x-ignored-params"] == "tools.cache_control"
        strict = {**TOOLS["/v1/responses"], "strict": True}
        answer = ask(server, "/v1/responses", tools=[strict])
        assert answer.headers["x-ignored-params"] == "tools.strict"
        thinking = {"type": "disabled", "display": "omitted"}
        answer = ask(server, "/v1/messages", tools=[], thinking=thinking, output_config={"effort": "low"})
        assert answer.headers["x-ignored-params"] == "thinking.display, output_config.effort"


def test_an_adaptive_thought_is_one_where_the_model_can_think() -> None:
    for name, thinks in (("hermes", True), ("json", False)):
        made = World(name)
        with made.running() as server:
            made.say("x")
            answer = ask(server, "/v1/messages", tools=[], thinking={"type": "adaptive"})
            assert made.prompt().endswith("<think>\n") == thinks
            assert answer.headers.get("x-ignored-params") == (None if thinks else "thinking")


def test_tokens_are_counted_with_tools_and_thoughts() -> None:
    made = World("hermes")
    with made.running() as server:
        made.say("x")
        for fields in ({"tools": [TOOLS["/v1/messages"]]}, THINK["/v1/messages"], {}):
            usage = ask(server, "/v1/messages", **{"tools": [], **fields}).json()["usage"]
            body = {"model": MODEL, "messages": [ASK], **fields}
            counted = CLIENT.post(server.url + "/v1/messages/count_tokens", json=body).json()
            assert counted == {"input_tokens": usage["input_tokens"]}


# The packages that people use


def test_the_openai_package_reads_calls_and_thoughts_of_responses_and_sends_them_back() -> None:
    made = World("hermes", Policy(thoughts="show"))
    asked: dict[str, Any] = {
        "model": MODEL,
        "tools": [TOOLS["/v1/responses"]],
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
    }
    with made.running() as server, openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        made.say(f"{THOUGHT}Well.{CALL}{CALL}")
        whole = client.responses.create(input=[ASK], **asked)
        with client.responses.stream(input=[ASK], **asked) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds.count("response.function_call_arguments.done") == 2
        for answer in (whole, final):
            thought, _, *calls = answer.output
            assert (thought.type, thought.status) == ("reasoning", "completed")
            assert thought.content[0].text == "Let me think.\n"
            assert answer.output_text == "Well." and answer.status == "completed"
            assert [(call.name, call.arguments) for call in calls] == [("add", '{"a": 1}')] * 2
            assert answer.usage.output_tokens_details.reasoning_tokens > 0
            assert [tool.name for tool in answer.tools] == ["add"] and answer.reasoning.effort == "low"
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "2"} for call in calls]
        made.say("It is 2.")
        again = client.responses.create(input=[ASK, *whole.output, *results], **{**asked, "reasoning": None})
        assert again.output_text == "It is 2." and made.prompt().count('"a": 1') == 2


def test_the_anthropic_package_reads_calls_and_thoughts_of_messages_and_sends_them_back() -> None:
    made = World("hermes", Policy(thoughts="show"))
    asked: dict[str, Any] = {
        "model": MODEL,
        "tools": [TOOLS["/v1/messages"]],
        "max_tokens": 2048,
    }
    with made.running() as server, anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as client:
        made.say(f"{THOUGHT}Well.{CALL}{CALL}")
        thinking: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
        whole = client.messages.create(messages=[ASK], **asked, **thinking)
        with client.messages.stream(messages=[ASK], **asked, **thinking) as stream:
            assert "".join(stream.text_stream) == "Well."
            final = stream.get_final_message()
        for answer in (whole, final):
            assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
            assert answer.content[0].thinking == "Let me think.\n" and answer.stop_reason == "tool_use"
            assert [block.input for block in answer.content[2:]] == [{"a": 1}] * 2
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "2"}]}
            for block in whole.content[2:]
        ]
        made.say("It is 2.")
        history = [ASK, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
        again = client.messages.create(messages=history, **asked)
        assert again.content[0].text == "It is 2." and made.prompt().count('"a": 1') == 2
        assert again.stop_reason == "end_turn"
