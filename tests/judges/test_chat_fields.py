"""Models that refuse a field of the request are asked without it, once."""

from __future__ import annotations

import json

import pytest
from chat_server import chat_server

from redflag import cli
from redflag.chat import refused_field, request_fields, without
from redflag.errors import RedflagError
from redflag.guard.options import PolicyOptions
from redflag.judges import UnansweredError
from redflag.judges.endpoint import EndpointJudge
from redflag.judges.rubrics import StrongRejectJudge
from redflag.lab.evaluating import stages
from redflag.lab.evaluating.evaluate import EvaluateArguments
from redflag.lab.synthesis.questions import Question
from redflag.lab.synthesis.remote_writer import RemoteWriter
from redflag.lab.synthesis.synthesize import SynthesizeArguments
from redflag.terminal import generate

ASK = [{"role": "user", "content": "How do I open a door?"}]
SENT = {"max_tokens": 16, "temperature": 0, "logprobs": True, "top_logprobs": 20}


def refusal(message, param=None):
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": param}})


@pytest.mark.parametrize(
    ("status", "content", "sent", "field"),
    [
        (400, refusal("Unsupported parameter", "max_tokens"), SENT, "max_tokens"),
        (400, refusal("Use 'max_completion_tokens' instead."), SENT, "max_tokens"),
        (400, refusal("'temperature' does not support 0 with this model", "temperature"), SENT, "temperature"),
        (400, refusal("logprobs are not supported", "top_logprobs"), SENT, "logprobs"),
        (400, refusal("You are not allowed to request logprobs"), SENT, "logprobs"),
        (422, json.dumps({"detail": [{"loc": ["body", "max_tokens"], "msg": "no"}]}), SENT, "max_tokens"),
        (400, "temperature: not supported", SENT, "temperature"),
        (400, refusal("Unsupported parameter", "max_tokens"), {"max_completion_tokens": 16}, None),  # not sent
        (400, refusal("max_tokens or max_completion_tokens is too large: 9. The context is 4"), SENT, None),
        (400, refusal("the temperature of the sun", "messages"), SENT, None),
        (400, refusal("too long"), SENT, None),
        (400, "[]", SENT, None),
        (400, "[" * 100_000, SENT, None),
        (400, "", SENT, None),
        (200, refusal("temperature", "temperature"), SENT, None),
        (500, refusal("temperature", "temperature"), SENT, None),
    ],
)
def test_a_refusal_names_its_field(status, content, sent, field):
    assert refused_field(status, content, sent) == field


@pytest.mark.parametrize(
    ("own", "options", "fields"),
    [
        ({"max_tokens": 16}, {}, {"max_tokens": 16}),
        ({"max_tokens": 16}, {"max_tokens": 8}, {"max_tokens": 8}),
        ({"max_tokens": 16}, {"max_completion_tokens": 8}, {"max_completion_tokens": 8}),
        ({"max_tokens": 16, "temperature": 0}, {"temperature": None}, {"max_tokens": 16}),
        ({"max_tokens": 16}, {"reasoning_effort": "low"}, {"max_tokens": 16, "reasoning_effort": "low"}),
    ],
)
def test_a_users_options_win(own, options, fields):
    assert request_fields(own, options) == fields


def test_what_was_refused_is_left_out_or_renamed():
    assert without(frozenset(), SENT) == SENT
    assert without(frozenset({"max_tokens", "temperature", "logprobs"}), SENT) == {"max_completion_tokens": 16}
    assert without(frozenset({"max_tokens"}), {"max_tokens": 1, "max_completion_tokens": 2}) == {
        "max_completion_tokens": 2
    }


def strict(body):
    """As OpenAI's reasoning models: one complaint at a time."""
    for field in ("max_tokens", "temperature", "logprobs"):
        if field in body:
            return {"refused": field}
    return "No"


@pytest.fixture
def reasoner(monkeypatch):
    with chat_server(strict) as server:
        plain = server.answer

        def answer(body):
            status, content = plain(body)
            refused = json.loads(content).get("refused")
            return (status, content) if refused is None else (400, refusal("no", refused).encode())

        monkeypatch.setattr(server, "answer", answer)
        yield server


def test_a_judge_that_refuses_fields_is_asked_without_and_remembered(reasoner):
    judge = EndpointJudge(reasoner.url, "o", retries=0)
    assert judge(ASK, "a").harm == 0.0
    assert len(reasoner.bodies) == 4  # max_tokens, temperature, logprobs, answered
    assert judge(ASK, "b").harm == 0.0
    assert len(reasoner.bodies) == 5
    last = reasoner.bodies[-1]
    assert last["max_completion_tokens"] == 16
    assert not {"max_tokens", "temperature", "logprobs", "top_logprobs"} & set(last)


def test_a_writer_that_refuses_fields_is_asked_without_and_remembered(reasoner):
    endpoint = RemoteWriter(reasoner.url, "o", concurrency=1)
    got = {}
    endpoint.ask([Question(({"role": "user", "content": f"q{i}"},), max_tokens=9) for i in range(3)], got.__setitem__)
    assert [got[i].text for i in range(3)] == ["No"] * 3
    assert len(reasoner.bodies) == endpoint.requests == 5  # max_tokens, temperature, then one each
    assert reasoner.bodies[-1]["max_completion_tokens"] == 9 and "temperature" not in reasoner.bodies[-1]


def test_a_field_that_was_not_the_reason_is_sent_again(monkeypatch):
    with chat_server(lambda body: "No") as server:
        replies = [(400, refusal("the temperature is bad").encode()), (500, b"down")]
        real = server.answer

        def answer(body):
            status, content = real(body)
            return replies.pop(0) if replies else (status, content)

        monkeypatch.setattr(server, "answer", answer)
        judge = EndpointJudge(server.url, "m", retries=0, logprobs=False)
        with pytest.raises(UnansweredError, match="500"):
            judge(ASK, "a")
        assert judge(ASK, "a").harm == 0.0
    assert ["temperature" in body for body in server.bodies] == [True, False, True]


def test_a_server_that_refuses_everything_is_asked_a_bounded_number_of_times(monkeypatch):
    with chat_server(lambda body: 400) as server:
        monkeypatch.setattr(server, "answer", lambda body: (server.bodies.append(body), (400, b"temperature"))[1])
        with pytest.raises(UnansweredError, match="400"):
            EndpointJudge(server.url, "m")(ASK, "a")
    assert len(server.bodies) == 3  # as it is, without temperature, without log-probabilities


@pytest.mark.parametrize("content", [None, "", "<think>The user asks"])
@pytest.mark.parametrize("kind", [EndpointJudge, StrongRejectJudge])
def test_a_judge_that_used_its_tokens_up_says_to_raise_them(content, kind):
    judge = kind("http://h", "thinker", max_tokens=32)
    reply = {"choices": [{"message": {"content": content}, "finish_reason": "length"}]}
    with pytest.raises(UnansweredError, match="32 tokens: raise judge_tokens"):
        judge.read(reply)
    reply["choices"][0]["finish_reason"] = "stop"
    with pytest.raises(UnansweredError) as raised:
        judge.read(reply)
    assert "judge_tokens" not in str(raised.value)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_the_log_probabilities_of_a_thought_grade_nothing(name):
    listed = {"content": [{"token": "No", "top_logprobs": [{"token": "No", "logprob": -0.01}]}]}
    choice = {"message": {"content": "Yes", name: "No, wait"}, "logprobs": listed}
    assert EndpointJudge("http://h", "m").read({"choices": [choice]}).harm == 1.0
    del choice["message"][name]
    assert EndpointJudge("http://h", "m").read({"choices": [choice]}).harm == 0.5


def test_the_command_lines_options_reach_the_judge(reasoner, monkeypatch):
    monkeypatch.setenv("GATEWAY_TOKEN", "s3cret")
    options = '{"reasoning_effort": "low", "temperature": null}'
    words = ["Hi", "--model", "m", "--judge_url", reasoner.url, "--judge_name", "o", "--judge_tokens", "512"]
    words += ["--judge_options", options, "--judge_headers", '{"X-Token": "Bearer ${GATEWAY_TOKEN}"}']
    _, policy = cli.parse(generate, words, "redflag generate")
    judge = policy.second_judge()
    assert judge(ASK, "a").harm == 0.0
    assert reasoner.bodies[0]["max_tokens"] == reasoner.bodies[-1]["max_completion_tokens"] == 512
    assert all(body["reasoning_effort"] == "low" and "temperature" not in body for body in reasoner.bodies)
    assert judge._client.headers == {"X-Token": "Bearer s3cret"}


def test_another_number_of_tokens_is_another_judge():
    one, other = (
        PolicyOptions(judge_url="http://h", judge_name="m", judge_tokens=tokens).second_judge() for tokens in (16, 512)
    )
    assert one.identity != other.identity


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    options = PolicyOptions(judge_url="http://h", judge_name="m", judge_headers={"X-Token": "${NO_SUCH_TOKEN}"})
    with pytest.raises(
        RedflagError, match="the environment variable NO_SUCH_TOKEN must be set, which judge_headers names"
    ):
        options.second_judge()


@pytest.mark.parametrize(
    ("rubric", "tokens", "expected"),
    [("strongreject", None, 1024), ("yes_no", None, 16), ("guard", None, 16), ("yes_no", 300, 300), ("guard", 9, 9)],
)
def test_evaluate_gives_its_judge_tokens_options_and_headers(rubric, tokens, expected):
    arguments = EvaluateArguments(
        model="m",
        test="t",
        calibration="c",
        judge="endpoint",
        judge_url="http://h",
        judge_name="o",
        judge_rubric=rubric,
        judge_tokens=tokens,
        judge_options={"seed": 3},
        judge_headers={"X-Team": "red"},
    )
    judge = stages.judge_of(arguments)
    assert (judge._max_tokens, judge._client.options, judge._client.headers) == (
        expected,
        {"seed": 3},
        {"X-Team": "red"},
    )


@pytest.mark.parametrize(("tokens", "expected"), [(None, 16), (300, 300)])
def test_synthesize_gives_its_judge_tokens_options_and_headers(tokens, expected):
    options = {"judge_tokens": tokens, "judge_options": {"seed": 3}, "judge_headers": {"X-Team": "red"}}
    arguments = SynthesizeArguments(output_dir="o", judge="endpoint", judge_url="http://h", judge_name="o", **options)
    judge = arguments.open_judge()
    asked = judge._client.options, judge._client.headers
    assert (judge._max_tokens, *asked) == (expected, {"seed": 3}, {"X-Team": "red"})
