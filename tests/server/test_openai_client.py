"""What the openai package makes of a halt and of a fault, in four styles of call: the table in docs/clients.md."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from running import MODEL, engine, running

from redflag.api.wire import REFUSAL
from redflag.guard.guard import Guard

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
ASK = [{"role": "user", "content": "hello"}]
ENDS = {  # what the engine does, and what is shown of ten letters
    "whole": ({}, None, "abcdefghij"),
    "halted": ({6: (0.9, 0.0)}, None, "abcdef"),
    "empty": ({0: (0.9, 0.0)}, None, ""),
    "fault": ({}, 4, "abcd"),
}


def create(client):
    answer = client.chat.completions.create(model=MODEL, messages=ASK)
    return answer.choices[0].finish_reason, answer.choices[0].message


def create_streamed(client):
    text, refusal = "", ""
    for chunk in client.chat.completions.create(model=MODEL, messages=ASK, stream=True):
        text += chunk.choices[0].delta.content or ""
        refusal += chunk.choices[0].delta.refusal or ""
    assert (text, refusal) in (("abcdefghij", ""), ("abcdef", ""), ("", REFUSAL))
    return chunk.choices[0].finish_reason, None


def stream(client):
    with client.chat.completions.stream(model=MODEL, messages=ASK) as events:
        seen = [event for event in events if event.type == "chunk"]
        assert seen[-1].chunk.choices[0].finish_reason in ("stop", "content_filter"), "it is read to the end"
        answer = events.get_final_completion()
    return answer.choices[0].finish_reason, answer.choices[0].message


def parse(client):
    answer = client.chat.completions.parse(model=MODEL, messages=ASK)
    return answer.choices[0].finish_reason, answer.choices[0].message


CALLS = {"create(...)": create, "create(..., stream=True)": create_streamed, "stream(...)": stream, "parse(...)": parse}
FILTERED = "ContentFilterFinishReasonError"
OUTCOMES = {
    "create(...)": ("stop", "content_filter", "content_filter", "InternalServerError"),
    "create(..., stream=True)": ("stop", "content_filter", "content_filter", "APIError"),
    "stream(...)": ("stop", FILTERED, FILTERED, "APIError"),
    "parse(...)": ("stop", FILTERED, FILTERED, "InternalServerError"),
}


@pytest.fixture
def client_of(tokenizer, spec, thresholds, script):
    def start(end):
        high, fail_at, _ = ENDS[end]
        _, turns = engine(script("abcdefghij", high), tokenizer.eos_token_id, fail_at=fail_at)
        return running(Guard(turns, tokenizer, spec, thresholds))

    return start


def outcome(call, client):
    try:
        return call(client)
    except (openai.OpenAIError, openai.ContentFilterFinishReasonError) as error:
        return type(error).__name__, error


@pytest.mark.parametrize("name", CALLS)
def test_what_each_style_of_call_makes_of_each_end(name, client_of):
    outcomes = []
    for end, (_, _, shown) in ENDS.items():
        with (
            client_of(end) as server,
            openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
        ):
            made, detail = outcome(CALLS[name], client)
            outcomes.append(made)
            if made == FILTERED:
                detail = detail.completion.choices[0].message  # the error carries what was shown
            elif made in ("stop", "content_filter") and detail is None:
                continue
            if made in ("APIError", "InternalServerError"):
                assert detail.code == "engine_unavailable" and detail.type == "server_error"
            else:
                assert (detail.content or "") == shown and detail.refusal == (None if shown else REFUSAL)
    assert tuple(outcomes) == OUTCOMES[name]


def test_the_documents_say_the_same():
    rows = [line.split("|")[1:-1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `openai`")]
    table = {row[0].split("`")[3]: row[1:] for row in rows}
    assert set(table) == set(OUTCOMES)
    for name, cells in table.items():
        for said, made in zip(cells, OUTCOMES[name][1:], strict=True):
            assert f"`{made}`" in said, (name, said, made)


def test_a_parsed_message_may_be_sent_back(client_of):
    with client_of("whole") as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        message = client.chat.completions.parse(model=MODEL, messages=ASK).choices[0].message
        for back in (message, message.model_dump()):
            assert client.chat.completions.create(model=MODEL, messages=[*ASK, back, *ASK]).choices
