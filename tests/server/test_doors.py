"""`/v1/responses` and `/v1/messages`, by the clients that people use: openai and anthropic."""

from __future__ import annotations

import itertools
import math

import anthropic
import httpx
import openai
import pytest
from running import MODEL, engine, events_of, running, shown_by, text_of_events, wait_for

from redflag.api.wire import REFUSAL
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.watching.policy import Policy

KEY = "client-key-0123456789"
OPERATOR = "operator-key-0123456789"
ASK = [{"role": "user", "content": "hello"}]
WHOLE = "abcdefghij"
ALARM = {"verdict": "halted", "reason": "alarm", "category": "harm"}
ENDS = {  # what the engine does (probabilities, where it is lost, tokens asked for), and what is shown
    "whole": ({}, None, 64, WHOLE),
    "length": ({}, None, 4, "abcd"),
    "halted": ({6: (0.9, 0.0)}, None, 64, "abcdef"),
    "empty": ({0: (0.9, 0.0)}, None, 64, ""),
    "fault": ({}, 4, 64, "abcd"),
    "nan": ({4: (math.nan, 0.0)}, None, 64, "abcd"),
    "at once": ({}, 0, 64, ""),
}


@pytest.fixture
def serve(tokenizer, spec, thresholds, script):
    def start(name="whole", policy=None, limits=None):
        high, fail_at, _, _ = ENDS[name]
        _, turns = engine(script(WHOLE, high), tokenizer.eos_token_id, fail_at=fail_at)
        limits = limits or Limits(MODEL, api_keys=(KEY,), operator_key=OPERATOR)
        return running(Guard(turns, tokenizer, spec, thresholds, policy or Policy()), limits)

    return start


def openai_of(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)


def anthropic_of(server):
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


STATUS = {"whole": ("completed", None), "length": ("incomplete", "max_output_tokens")}
REASON = {"whole": "end_turn", "length": "max_tokens"}


@pytest.mark.parametrize("name", ["whole", "length", "halted", "empty"])
def test_the_openai_client_reads_responses(name, serve):
    _, _, most, shown = ENDS[name]
    status, reason = STATUS.get(name, ("incomplete", "content_filter"))
    asked = {"model": MODEL, "input": "hello", "instructions": "Be kind.", "max_output_tokens": most}
    with serve(name) as server, openai_of(server) as client:
        whole = client.responses.create(**asked)
        events = list(client.responses.create(stream=True, **asked))
        wait_for(lambda: len(server.traces) == 2)  # a trace is reported behind the last byte
        assert whole.id == server.traces[0].id and server.traces[0].id.startswith("resp_")
        for answer, trace in zip((whole, events[-1].response), server.traces, strict=True):
            assert answer.output_text == shown == shown_by(trace) and answer.status == status
            assert (answer.incomplete_details and answer.incomplete_details.reason) == reason
            assert (answer.store, answer.previous_response_id, answer.error) == (False, None, None)
            [part] = answer.output[0].content
            assert part.type == ("refusal" if name == "empty" else "output_text")
            assert name != "empty" or part.refusal == REFUSAL
            assert (answer.model_extra or {}).get("redflag") == (ALARM if reason == "content_filter" else None)
            details = answer.usage.output_tokens_details
            assert answer.usage.output_tokens == trace.generated == details.released_tokens + details.hidden_tokens
            assert (answer.instructions, answer.max_output_tokens) == ("Be kind.", most)
        assert events[-1].type == f"response.{status}"
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == shown


def test_the_stream_helper_of_openai_finishes(serve):
    with serve() as server, openai_of(server) as client, client.responses.stream(model=MODEL, input=ASK) as stream:
        assert [event for event in stream][-1].type == "response.completed"
        assert stream.get_final_response().output_text == WHOLE


@pytest.mark.parametrize("name", ["whole", "length", "halted", "empty"])
def test_the_anthropic_client_reads_messages(name, serve):
    _, _, most, shown = ENDS[name]
    asked = {"model": MODEL, "messages": ASK, "system": "Be kind.", "max_tokens": most}
    with serve(name) as server, anthropic_of(server) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        wait_for(lambda: len(server.traces) == 2)  # a trace is reported behind the last byte
        assert whole.id == server.traces[0].id and server.traces[0].id.startswith("msg_")
        assert text == shown
        for answer, trace in zip((whole, final), server.traces, strict=True):
            assert "".join(block.text for block in answer.content) == shown == shown_by(trace)
            assert answer.stop_reason == REASON.get(name, "refusal")
            assert (answer.stop_details.explanation if name not in REASON else None) == (
                REFUSAL if name not in REASON else None
            )
            assert answer.usage.output_tokens == trace.generated and answer.usage.input_tokens > 0
        assert whole.model_extra.get("redflag") == (None if name in REASON else ALARM)


def test_a_stop_text_is_named(serve):
    with serve() as server, anthropic_of(server) as client:
        asked = {"model": MODEL, "messages": ASK, "max_tokens": 64, "stop_sequences": ["zz", "de"]}
        answer = client.messages.create(**asked)
        assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("abc", "stop_sequence", "de")
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        assert (final.content[0].text, final.stop_reason, final.stop_sequence) == ("abc", "stop_sequence", "de")


@pytest.mark.parametrize("name", ["fault", "nan", "at once"])
def test_a_fault_is_no_refusal(name, serve):
    shown = ENDS[name][3]
    with serve(name) as server, openai_of(server) as one, anthropic_of(server) as other:
        with pytest.raises(openai.InternalServerError) as failed:
            one.responses.create(model=MODEL, input="hello")
        assert failed.value.status_code == 503 and failed.value.code == "engine_unavailable"
        with pytest.raises(anthropic.InternalServerError) as failed:
            other.messages.create(model=MODEL, messages=ASK, max_tokens=9)
        assert failed.value.status_code == 503 and failed.value.body["error"]["type"] == "api_error"

        text = ""
        if shown:
            events = list(one.responses.create(model=MODEL, input="hello", stream=True))
            assert events[-1].type == "response.failed" and events[-1].response.error.code == "server_error"
            assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == shown
        else:
            with pytest.raises(openai.InternalServerError):
                one.responses.create(model=MODEL, input="hello", stream=True)
        with (
            pytest.raises(anthropic.APIStatusError),
            other.messages.stream(model=MODEL, messages=ASK, max_tokens=9) as stream,
        ):
            for piece in stream.text_stream:
                text += piece
        assert text == shown
        assert server.ends() == {"fault"}


@pytest.mark.parametrize("hold_back", [0, 3])
@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
def test_no_unjudged_token_leaves(route, hold_back, tokenizer, spec, thresholds, script):
    """Whatever the step at which something happens, what left is what was judged that long before, and no more."""
    playing = []

    def play(prompt, sampling):
        for step in playing[-1]:
            if step is None:
                raise ConnectionError("lost")
            yield step

    _, turns = engine(play, tokenizer.eos_token_id)
    guard = Guard(turns, tokenizer, spec, thresholds, Policy(hold_back=hold_back))
    body = {"model": MODEL, "input": "hello"} if "responses" in route else asked_messages()
    harmless = script(WHOLE)
    with running(guard) as server, httpx.Client(base_url=server.url) as client:
        for step, bad in itertools.product(range(10), ((0.9, 0.0), (math.nan, 0.0), None)):
            playing.append(script(WHOLE, {step: bad}) if bad else [*harmless[:step], None])
            answer = client.post(route, json={**body, "stream": True})
            left = text_of_events(events_of(answer.content)) if answer.status_code == 200 else ""
            assert left == shown_by(server.told(len(playing))) == WHOLE[: max(0, step - hold_back)]


def asked_messages(**fields):
    return {"model": MODEL, "messages": ASK, "max_tokens": 64, **fields}


HEADERS = {"x-api-key": KEY}


def prompts_of(serve, route, bodies):
    """The prompts that requests lead to, as text."""
    with serve() as server:
        backend = server.server.guard.backend._worker._backend
        for body in bodies:
            answer = httpx.post(server.url + route, json=body, headers=HEADERS)
            assert answer.status_code == 200, answer.text
        tokenizer = server.server.guard.tokenizer
        return [tokenizer.decode(ids) for ids in backend.prompts]


def test_items_of_responses_become_the_turns_of_a_chat(serve):
    parts = [{"type": "input_text", "text": "hello"}]
    back = {
        "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    thought = {"id": "rs_1", "type": "reasoning", "summary": []}
    bodies = [
        {"model": MODEL, "instructions": "kind", "input": "hello"},
        {"model": MODEL, "input": [{"role": "developer", "content": "kind"}, {"role": "user", "content": parts}]},
        {"model": MODEL, "input": [*ASK, thought, back, *ASK]},
    ]
    chats = [
        [{"role": "system", "content": "kind"}, *ASK],
        [{"role": "system", "content": "kind"}, *ASK],
        [*ASK, {"role": "assistant", "content": "hi"}, *ASK],
    ]
    wanted = prompts_of(serve, "/v1/chat/completions", [{"model": MODEL, "messages": chat} for chat in chats])
    assert prompts_of(serve, "/v1/responses", bodies) == wanted
    blocks = [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    bodies = [
        asked_messages(system="kind"),
        asked_messages(system=[{"type": "text", "text": "kind"}], messages=[{"role": "user", "content": blocks}]),
        asked_messages(
            messages=[*ASK, {"role": "assistant", "content": [thought, {"type": "text", "text": "hi"}]}, *ASK]
        ),
    ]
    assert prompts_of(serve, "/v1/messages", bodies) == wanted


def test_an_answer_may_be_sent_back(serve):
    with serve() as server, openai_of(server) as one, anthropic_of(server) as other:
        first = one.responses.create(model=MODEL, input=ASK)
        assert one.responses.create(model=MODEL, input=[*ASK, *first.output, *ASK]).output_text == WHOLE
        said = other.messages.create(model=MODEL, messages=ASK, max_tokens=9)
        turn = {"role": "assistant", "content": said.content}
        assert other.messages.create(model=MODEL, messages=[*ASK, turn, *ASK], max_tokens=9).content
    with serve("empty") as server, openai_of(server) as one, anthropic_of(server) as other:
        first = one.responses.create(model=MODEL, input=ASK)
        assert one.responses.create(model=MODEL, input=[*ASK, *first.output, *ASK]).status == "incomplete"
        assert other.messages.create(
            model=MODEL, messages=[*ASK, {"role": "assistant", "content": []}, *ASK], max_tokens=9
        ).stop_reason == "refusal"  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored here"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored here"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search are not supported"),
        ({"tools": [{"type": "mcp", "server_label": "a"}]}, "tools.0.type", "mcp are not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name", "missing"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice", "not supported"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "tools has none"),
        ({"background": True}, "background", "not supported"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": 5}}}, "text.format.schema", "JSON schema"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort", "string"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "nothing is stored"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type", "type text"),
        ({"input": [*ASK, {"role": "assistant", "content": "I"}]}, "input.1.role", "the assistant's"),
        ({"input": []}, "input", "at least one"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1 or more"),
        ({"model": "gpt-6"}, "model", "there is no model"),
    ],
)
def test_what_responses_refuse_is_named(fields, param, words, serve):
    with serve() as server:
        body = {"model": MODEL, "input": "hello", **fields}
        answer = httpx.post(server.url + "/v1/responses", json=body, headers=HEADERS)
        error = answer.json()["error"]
        assert answer.status_code in (400, 404) and error["param"] == param and words in error["message"], error
        assert not server.traces


def test_what_changes_no_token_is_ignored_and_named(serve):
    fields = {"store": True, "include": ["reasoning.encrypted_content"],
              "reasoning": {"effort": "low", "summary": "auto"},
              "text": {"verbosity": "low", "format": {"type": "text"}}, "truncation": "disabled", "tools": [],
              "tool_choice": "auto", "parallel_tool_calls": True}  # fmt: skip
    with serve() as server:
        body = {"model": MODEL, "input": "hello", **fields}
        answer = httpx.post(server.url + "/v1/responses", json=body, headers=HEADERS)
        assert answer.status_code == 200 and answer.json()["store"] is False
        named = set(answer.headers["x-ignored-params"].split(", "))
        assert named == {"store", "include", "reasoning.effort", "reasoning.summary", "text.verbosity"}


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "claude"}, 404, "not_found_error", "there is no model"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "bash_20250124 are not"),
        ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools.0.input_schema is missing"),
        ({"tool_choice": "auto"}, 400, "invalid_request_error", "tool_choice: it must be"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tools has none"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice: it must be"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 400, "invalid_request_error", "no thinking mode"),
        ({"thinking": {"type": "between_tools"}}, 400, "invalid_request_error", "thinking.type"),
        ({"output_config": {"format": {"type": "x"}}}, 400, "invalid_request_error", "output_config.format.type"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "images"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error", "role"),
    ],
)
def test_messages_refuse_in_anthropics_shape(fields, status, kind, words, serve):
    with serve() as server:
        answer = httpx.post(server.url + "/v1/messages", json=asked_messages(**fields), headers=HEADERS)
        assert answer.status_code == status
        body = answer.json()
        assert set(body) == {"type", "error"} and body["type"] == "error"
        assert body["error"]["type"] == kind and words in body["error"]["message"]


def test_keys_of_both_kinds_open_all_doors(serve):
    doors = (("/v1/responses", {"model": MODEL, "input": "hello"}), ("/v1/messages", asked_messages()))
    with serve() as server:
        for (route, body), headers in itertools.product(doors, (HEADERS, {"Authorization": f"Bearer {KEY}"})):
            assert httpx.post(server.url + route, json=body, headers=headers).status_code == 200
        for (route, body), headers in itertools.product(doors, ({}, {"x-api-key": "another-key-0123456789"})):
            answer = httpx.post(server.url + route, json=body, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"


def test_the_operator_sees_the_trace_there_too(serve):
    keys = {**HEADERS, "X-Redflag-Operator": OPERATOR, "X-Redflag-Trace": "1"}
    with serve("halted") as server:
        body = {"model": MODEL, "input": "hello"}
        whole = httpx.post(server.url + "/v1/responses", json=body, headers=keys).json()
        streamed = httpx.post(server.url + "/v1/responses", json={**body, "stream": True}, headers=keys)
        other = httpx.post(server.url + "/v1/messages", json=asked_messages(stream=True), headers=keys)
        for seen in (whole, events_of(streamed.content)[-1]["response"], events_of(other.content)[-2]):
            assert seen["redflag"]["peak"]["harm"] == 0.9 and seen["redflag"]["category"] == "harm"


def test_a_decoy_is_a_decoy_at_every_door(serve):
    policy = Policy(default="replace", replacement="Bread.", decoy=True)
    with serve("halted", policy) as server, openai_of(server) as one, anthropic_of(server) as other:
        answer = one.responses.create(model=MODEL, input="hello")
        assert (answer.status, answer.output_text) == ("completed", "abcdefBread.")
        assert "redflag" not in (answer.model_extra or {})
        said = other.messages.create(model=MODEL, messages=ASK, max_tokens=64)
        assert (said.stop_reason, said.content[0].text) == ("end_turn", "abcdefBread.")
