"""Structured output by the official client: whole, streamed, halted and refused."""

from __future__ import annotations

import json
from typing import Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, ConfigDict
from running import MODEL, running

from redflag.api.doors import DOORS
from redflag.api.schema import ChatRequest, parse
from redflag.backends.turns import Turns
from redflag.guard.guard import Guard

ASK = [{"role": "user", "content": "hello"}]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    lives: Literal[7, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, spec):
    """A random model: as good as any at JSON that it has no choice in."""
    import scripted_guard

    thresholds = scripted_guard.thresholds.__wrapped__(spec)
    return scripted_guard.model_dir.__wrapped__(tmp_path_factory.mktemp("structured"), tokenizer, spec, thresholds)


@pytest.fixture
def client_of(folder):
    def start(thresholds=None):
        guard = Guard.from_pretrained(folder, thresholds=thresholds, device=None)
        guard.backend = Turns(guard.backend)
        return running(guard)

    return start


def asked(**fields):
    return {"model": MODEL, "messages": ASK, "max_tokens": 100, "temperature": 1.0, **fields}


def test_parse_gives_the_object_of_the_schema(client_of):
    with client_of() as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        found = [client.chat.completions.parse(response_format=Answer, **asked(seed=seed)) for seed in range(6)]
        for answer in found:
            if answer.choices[0].finish_reason == "stop":
                assert answer.choices[0].message.parsed.kind in ("cat", "dog")
        assert "stop" in [answer.choices[0].finish_reason for answer in found]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": Answer.model_json_schema()},
            }
        },
        {"extra_body": {"structured_outputs": {"json": Answer.model_json_schema()}}},
        {"extra_body": {"guided_json": json.dumps(Answer.model_json_schema())}},
    ],
)
def test_streamed_pieces_make_the_same_object(client_of, fields):
    with client_of() as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        ended = 0
        for seed in range(5):
            chunks = list(client.chat.completions.create(stream=True, **asked(seed=seed, **fields)))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            if chunks[-1].choices[0].finish_reason == "stop":
                ended += 1
                assert Answer.model_validate_json(text)
        assert ended
        flags = set(server.server.guard.spec.ids)
        assert not any(flags & set(trace.token_ids) for trace in server.traces)


def test_completions_take_it_too(client_of):
    with client_of() as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model=MODEL, prompt="so:", max_tokens=60, extra_body={"guided_json": {"enum": ["yes", "no"]}}
        )
        assert json.loads(answer.choices[0].text) in ("yes", "no")


FORMAT = {"type": "json_schema", "name": "a", "schema": Answer.model_json_schema()}


def test_the_other_doors_give_the_object_of_the_schema(client_of):
    with (
        client_of() as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as other,
    ):
        common = {"model": MODEL}
        ended = []
        for seed in range(5):
            fields = {**common, "extra_body": {"seed": seed}}
            answer = one.responses.create(input=ASK, max_output_tokens=100, text={"format": FORMAT}, **fields)
            said = other.messages.create(messages=ASK, max_tokens=100, output_config={"format": FORMAT}, **fields)
            assert said.content[0].text == answer.output_text, "the same seed"
            assert (said.stop_reason == "end_turn") == (answer.status == "completed")
            if answer.status == "completed":
                assert Answer.model_validate_json(answer.output_text)
                ended.append(fields)
        parsed = one.responses.parse(input=ASK, max_output_tokens=100, text_format=Answer, **ended[0])
        assert parsed.output_parsed.kind in ("cat", "dog")
        parsed = other.messages.parse(messages=ASK, max_tokens=100, output_format=Answer, **ended[0])
        assert parsed.parsed_output.kind in ("cat", "dog")
        refused = {"type": "json_schema", "name": "a", "schema": {"not": {}}}
        with pytest.raises(openai.BadRequestError, match="Unimplemented") as wrong:
            one.responses.create(input=ASK, text={"format": refused}, **common)
        assert wrong.value.param == "text.format"
        with pytest.raises(anthropic.BadRequestError, match="Unimplemented"):
            other.messages.create(messages=ASK, max_tokens=9, output_config={"format": refused}, **common)


def test_a_halt_leaves_half_of_the_json_and_says_so(client_of):
    """A threshold that the first step reaches at the latest: a random model thinks of everything a little."""
    with (
        client_of(thresholds=1e-9) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(response_format={"type": "json_object"}, **asked())
        choice = answer.choices[0]
        assert choice.finish_reason == "content_filter" and choice.message.refusal
        with pytest.raises(openai.ContentFilterFinishReasonError):
            client.chat.completions.parse(response_format=Answer, **asked())


@pytest.mark.parametrize(
    ("schema", "named"),
    [({"not": {}}, "Unimplemented"), ({"type": "objec"}, "Invalid type"), ({"description": "x" * 70_000}, "65536")],
)
def test_a_schema_that_cannot_be_enforced_is_refused_in_words(client_of, schema, named):
    with client_of() as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match=named) as refused:
            client.chat.completions.create(response_format=wanted, **asked())
        assert refused.value.param == "response_format" and not server.traces


@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "json_object", "schema": {"enum": [1]}}}, {"enum": [1]}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True}}},
            {"type": "object"},
        ),
        ({"structured_outputs": {"json": {"enum": [1]}, "regex": None}}, {"enum": [1]}),
        ({"structured_outputs": {"json_object": True}}, {"type": "object"}),
        ({"guided_json": '{"enum": [1]}'}, {"enum": [1]}),
    ],
)
def test_how_a_schema_is_asked_for(fields, schema):
    body = parse(ChatRequest, json.dumps(asked(**fields)).encode())
    found = body.asked_schema()
    assert (found and found[1]) == schema and not body.ignored
    assert found is None or found[0] in fields


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "name": "a", "schema": {"enum": [1]}, "strict": True}, {"enum": [1]}),
    ],
)
def test_how_a_schema_is_asked_for_at_the_other_doors(form, schema):
    for route, name, fields in (
        ("/v1/responses", "text.format", {"input": "a", "text": {"format": form}}),
        ("/v1/messages", "output_config.format", {"output_config": {"format": form}, "messages": ASK, "max_tokens": 9}),
    ):
        body = parse(DOORS[route].request, json.dumps({"model": MODEL, **fields}).encode())
        assert body.asked_schema() == (None if schema is None else (name, schema)) and not body.ignored
