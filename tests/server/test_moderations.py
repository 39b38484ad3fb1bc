"""Given texts, judged: as `redflag score` and a guard judge them, and for whom."""

from __future__ import annotations

import json
import math

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import MODEL, engine, running

from redflag.api.api_errors import ApiError
from redflag.backends import Sampling
from redflag.backends.load import load_flagged
from redflag.backends.turns import Turns
from redflag.calibrating import replay
from redflag.data.rows import load_rows
from redflag.guard.guard import Guard
from redflag.scoring.score import score
from redflag.server.access import Limits
from redflag.server.moderations import judged_by
from redflag.trace import Alarm, Halt, Text
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

OPERATOR = "operator-key-0123456789"
KEY = "client-key-0123456789"
AS_OPERATOR = {"X-Redflag-Operator": OPERATOR}
GUARDRAIL = "/beta/litellm_basic_guardrail_api"


@pytest.fixture(scope="module")
def local(nano):
    """A server before the nano model in this process, its guard, and what measures the same by itself."""
    backend, tokenizer, spec = load_flagged(nano / "model", "cpu")
    guard = Guard(Turns(backend), tokenizer, spec, Thresholds.load(nano / "model"))
    with running(guard, Limits(MODEL, api_keys=(KEY,), operator_key=OPERATOR)) as server:
        yield server, guard, lambda rows: list(score(backend, tokenizer, spec, rows))


def results_of(server, **body):
    answer = httpx.post(server.url + "/v1/moderations", json=body, headers=AS_OPERATOR, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def test_a_conversation_is_judged_as_it_is_scored(local, nano):
    server, guard, scored = local
    rows = load_rows(nano / "rows" / "test.jsonl").rows[:40]
    flagged = []
    for row, item in zip(rows, scored(rows), strict=True):
        [result] = results_of(server, messages=row.messages)
        steps = replay.Steps.of([item.judged], len(guard.spec.categories))
        peaks = replay.peaks(guard.thresholds.monitor, steps)[0]
        wanted = {
            name: bool(peak >= guard.thresholds.values[name])
            for name, peak in zip(guard.spec.categories, peaks.tolist(), strict=True)
        }
        assert result["categories"] == wanted and result["flagged"] == any(wanted.values())
        assert list(result["category_scores"].values()) == pytest.approx(peaks.tolist(), abs=1e-5)
        assert results_of(server, input=row.messages) == [result]
        flagged.append(result["flagged"])
    assert {True, False} == set(flagged), "rows of both kinds"


def test_an_answer_is_judged_as_when_it_was_written(local, nano, tmp_path):
    server, guard, _ = local
    watching = Guard.from_pretrained(nano / "model", Policy(observe=True))
    compared = 0
    for row in load_rows(nano / "rows" / "test.jsonl").rows[:30]:
        prompt = row.messages[:-1]
        made = watching.generate(prompt, Sampling(max_new_tokens=60, temperature=0.0))
        ids = guard.tokenizer(made.text, add_special_tokens=False)["input_ids"]
        if made.trace.end.reason != "stop" or ids != made.trace.token_ids[:-1]:
            continue  # cut, or spelled in other tokens than the tokenizer's own
        [result] = results_of(server, messages=[*prompt, {"role": "assistant", "content": made.text}])
        alarms = {event.category for event in made.trace.events if isinstance(event, Alarm)}
        assert {name for name, hit in result["categories"].items() if hit} == alarms
        compared += 1
    assert compared >= 10


PROBS = st.floats(0.0, 1.0) | st.sampled_from([0.5, math.nextafter(0.5, 0.0), math.nextafter(0.5, 1.0)])


@settings(max_examples=200)
@given(st.lists(st.tuples(PROBS, PROBS), min_size=1, max_size=12),
       st.sampled_from(["max", "first", "ema", "run", "cusum"]))  # fmt: skip
def test_what_is_flagged_is_what_the_guards_monitor_alarms_at(probs, aggregation):
    config = MonitorConfig(aggregation)
    thresholds = Thresholds.manual(0.5, ("harm", "theft"), config)
    found = judged_by(thresholds, Policy(), ("harm", "theft"), range(len(probs)), probs)
    peaks = replay.peaks(config, replay.Steps.of([probs], 2))[0]
    assert [found.scores[name] for name in ("harm", "theft")] == peaks.tolist()
    assert found.flagged == {name for name, peak in zip(("harm", "theft"), peaks, strict=True) if peak >= 0.5}


def test_what_cannot_be_judged_is_an_error_and_not_harmless(spec, thresholds):
    for bad in ((math.nan, 0.0), (2.0, 0.0), (0.1,)):
        with pytest.raises(ApiError) as error:
            judged_by(thresholds, Policy(), spec.categories, [7, 8], [(0.1, 0.1), bad])
        assert error.value.status == 503


# Routes, over a scripted engine: a text with "harm" in it is harmful at every step


class Scoring:
    """An engine whose `score` says what is in a text."""

    logprob_mode, upper_bound, context_length = "raw", False, 400

    def __init__(self, tokenizer, fault=None):
        self.eos_ids, self.tokenizer, self.fault, self.asked = frozenset({tokenizer.eos_token_id}), tokenizer, fault, []

    def stream(self, token_ids, sampling, watch=()):
        raise AssertionError("nothing is generated")

    def score(self, pairs, *, batch_size):
        if self.fault:
            raise self.fault
        [(prompt, response)] = pairs
        self.asked.append((self.tokenizer.decode(prompt), self.tokenizer.decode(response)))
        text = self.tokenizer.decode(response)
        probs = (0.9 if "harm" in text else 0.01, 0.8 if "theft" in text else 0.02)
        return [np.array([probs] * len(response), dtype=np.float32)]


@pytest.fixture
def serve(tokenizer, spec, thresholds):
    def start(fault=None, **limits):
        backend = Scoring(tokenizer, fault)
        guard = Guard(Turns(backend), tokenizer, spec, thresholds)
        limits = {"api_keys": (KEY,), "operator_key": OPERATOR, **limits}
        made = running(guard, Limits(MODEL, **limits))
        return made, backend

    return start


def test_the_openai_client_moderates(serve):
    made, backend = serve(moderations="all")
    with made as server, openai.OpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
        one = client.moderations.create(input="some harm", model="omni-moderation-latest")
        several = client.moderations.create(input=["fine", "", "theft, harm"])
        parts = client.moderations.create(input=[{"type": "text", "text": "no"}, {"type": "text", "text": "harm"}])
    assert one.id.startswith("modr-") and one.model == MODEL
    [result] = one.results
    assert result.flagged and result.categories.model_extra == {"harm": True, "theft": False}
    # Others than the operator read no number.
    assert result.category_scores.model_extra == {"harm": 1.0, "theft": 0.0}
    assert result.category_applied_input_types.model_extra == {"harm": ["text"], "theft": ["text"]}
    assert [item.flagged for item in several.results] == [False, False, True]
    assert [item.flagged for item in parts.results] == [True]
    assert len(backend.asked) == 4, "nothing is measured of an empty text"


def test_numbers_are_the_operators(serve):
    made, _ = serve(moderations="all")
    with made as server:
        body = {"input": "harm"}
        seen = httpx.post(server.url + "/v1/moderations", json=body, headers=AS_OPERATOR).json()["results"][0]
        assert seen["category_scores"] == {"harm": pytest.approx(0.9), "theft": pytest.approx(0.02)}
        other = httpx.post(server.url + "/v1/moderations", json=body, headers={"x-api-key": KEY})
        assert (
            other.json()["results"][0]["category_scores"] == {"harm": 1.0, "theft": 0.0} and b"0.9" not in other.content
        )


@pytest.mark.parametrize("path", ["/v1/moderations", GUARDRAIL])
def test_clients_may_ask_where_the_operator_lets_them(path, serve):
    body = {"input": "a"} if "v1" in path else {"texts": ["a"], "input_type": "response"}
    keys = {"none": {}, "client": {"x-api-key": KEY}, "operator": {"x-api-key": OPERATOR}, "header": AS_OPERATOR,
            "bearer": {"Authorization": f"Bearer {OPERATOR}"}, "wrong": {"X-Redflag-Operator": "x"}}  # fmt: skip
    for moderations, wanted in (
        ("operator", {"none": 401, "client": 403, "operator": 200, "header": 200, "bearer": 200, "wrong": 403}),
        ("all", {"none": 401, "client": 200, "operator": 200, "header": 200, "bearer": 200, "wrong": 403}),
    ):
        made, _ = serve(moderations=moderations)
        with made as server:
            got = {
                name: httpx.post(server.url + path, json=body, headers=head).status_code for name, head in keys.items()
            }
            assert got == wanted
    made, _ = serve(api_keys=(), operator_key=None)
    with made as server:
        assert httpx.post(server.url + path, json=body).status_code == 403, "without an operator nobody may ask"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "input or messages"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "input or messages"),
        ({"input": []}, 400, "input"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, 400, "input"),
        ({"messages": [{"role": "user", "content": "a"}]}, 400, "answers are judged"),
        ({"input": "harm " * 400}, 400, "maximum context length"),
        ({"input": "a", "model": "gpt-4"}, 404, "there is no model"),
        ({"input": ["a"] * 257}, 400, "input"),
    ],
)
def test_what_cannot_be_judged_is_refused(body, status, words, serve):
    made, backend = serve()
    with made as server:
        answer = httpx.post(server.url + "/v1/moderations", json=body, headers=AS_OPERATOR)
        assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text
        assert not backend.asked


@pytest.mark.parametrize("fault", [ConnectionError("lost"), MemoryError("full")])
@pytest.mark.parametrize("path", ["/v1/moderations", GUARDRAIL])
def test_a_fault_is_an_error(path, fault, serve):
    body = {"input": "a"} if "v1" in path else {"texts": ["a"], "input_type": "response"}
    made, _ = serve(fault)
    with made as server:
        answer = httpx.post(server.url + path, json=body, headers=AS_OPERATOR)
        assert answer.status_code == 503 and set(answer.json()) == {"error"}


def test_an_engine_that_cannot_score_says_so(tokenizer, spec, thresholds, script):
    _, turns = engine(script("abc"), tokenizer.eos_token_id)
    limits = Limits(MODEL, operator_key=OPERATOR)
    with running(Guard(turns, tokenizer, spec, thresholds), limits) as server:
        answer = httpx.post(server.url + "/v1/moderations", json={"input": "a"}, headers=AS_OPERATOR)
        assert answer.status_code == 400
        assert "scoring given responses is not supported" in answer.json()["error"]["message"]


# LiteLLM's Generic Guardrail API


CASES = [
    ({"texts": ["fine", "also fine"]}, {"action": "NONE"}),
    ({"texts": ["fine", "harm"]}, {"action": "BLOCKED", "blocked_reason": "flagged: harm"}),
    ({"texts": ["theft", "harm"]}, {"action": "BLOCKED", "blocked_reason": "flagged: harm, theft"}),
    ({"texts": [""]}, {"action": "NONE"}),
    ({"texts": []}, {"action": "NONE"}),
    ({"texts": ["fine"], "images": ["abc"]}, {"action": "BLOCKED", "blocked_reason": "images cannot be judged"}),
    ({"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":"harm"}'}}]},
     {"action": "BLOCKED", "blocked_reason": "flagged: harm"}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "wanted"), CASES)
def test_litellm_is_told(body, wanted, serve):
    made, _ = serve()
    asked = {"input_type": "response", "request_data": {"user_api_key_hash": "x"}, "litellm_call_id": "1",
             "litellm_trace_id": "2", "additional_provider_specific_params": {}, "model": "gpt-4", **body}  # fmt: skip
    with made as server:
        answer = httpx.post(server.url + GUARDRAIL, json=asked, headers={"x-api-key": OPERATOR})
        assert answer.status_code == 200 and answer.json() == wanted


def test_texts_of_litellm_are_answers_to_its_messages(serve):
    made, backend = serve()
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    asked = {"input_type": "response", "texts": ["fine"], "structured_messages": messages}
    with made as server:
        httpx.post(server.url + GUARDRAIL, json=asked, headers={"x-api-key": OPERATOR})
        moderated = {"messages": [*messages, {"role": "assistant", "content": "fine"}]}
        httpx.post(server.url + "/v1/moderations", json=moderated, headers=AS_OPERATOR)
    assert backend.asked[0] == backend.asked[1] and "Q" in backend.asked[0][0]


def test_requests_of_litellm_are_refused_where_prompts_are_not_judged(serve):
    made, backend = serve()
    with made as server:
        answer = httpx.post(
            server.url + GUARDRAIL, json={"input_type": "request", "texts": ["fine"]}, headers={"x-api-key": OPERATOR}
        )
        assert answer.status_code == 400 and not backend.asked
        assert "post_call" in answer.json()["error"]["message"]


def test_tokens_of_a_prompt_are_counted(local):
    server, _, _ = local
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "system": "Be kind."}
    headers = {"x-api-key": KEY}
    counted = httpx.post(server.url + "/v1/messages/count_tokens", json=body, headers=headers)
    made = httpx.post(server.url + "/v1/messages", json={**body, "max_tokens": 1}, headers=headers, timeout=60)
    assert counted.json() == {"input_tokens": made.json()["usage"]["input_tokens"]}
    refused = httpx.post(server.url + "/v1/messages/count_tokens", json={**body, "model": "x"}, headers=headers)
    assert refused.status_code == 404 and refused.json()["type"] == "error"


def test_streams_go_on_while_texts_are_judged(local, nano):
    """One engine serves both: a text waits for its turn and disturbs nobody."""
    server, _, _ = local
    row = load_rows(nano / "rows" / "test.jsonl").rows[0]
    body = {"model": MODEL, "messages": row.messages[:-1], "temperature": 0, "max_tokens": 40}
    headers = {"x-api-key": KEY}
    alone = httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers, timeout=60).json()
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={**body, "stream": True}, headers=headers, timeout=60
    ) as stream:
        text = ""
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                results_of(server, messages=row.messages)
    assert text == alone["choices"][0]["message"]["content"]
    assert isinstance(server.traces[-1].events[-1], Halt) or any(isinstance(e, Text) for e in server.traces[-1].events)
