"""Log-probabilities of what is shown: of the language distribution, and of nothing else."""

from __future__ import annotations

import json
import math

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import MODEL, ROUTES, body_of, chunks_of, engine, running
from upstream import EOS, FLAG, VOCABULARY, Upstream, logits_of

from redflag.backends import Sampling, most_logprobs
from redflag.backends.choose import Chooser
from redflag.backends.remote import RemoteBackend
from redflag.backends.turns import Turns
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.trace import Logprobs, Step
from redflag.watching.policy import Policy

CHAT, TEXT = ROUTES
FLAGS = torch.tensor([3, 7])


# From the engines


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=12, max_size=12), st.integers(0, 20), st.floats(0, 2), st.integers(0, 9))
def test_they_are_those_of_the_distribution_without_flags(logits, named, temperature, seed):
    sampling = Sampling(temperature=temperature, seed=seed, logprobs=named, top_k=5, repetition_penalty=1.3)
    chooser = Chooser(sampling, [[1, 2]], FLAGS, torch.device("cpu"))
    [step] = chooser.step(torch.tensor([logits]), [0])
    others = [i for i in range(12) if i not in (3, 7)]
    total = math.log(sum(math.exp(logits[i]) for i in others))
    assert step.logprobs.chosen == pytest.approx(logits[step.token_id] - total, abs=1e-4)
    top = step.logprobs.top
    assert len(top) == min(named, 10) and not {i for i, _ in top} & {3, 7}
    likeliest = sorted((logits[i] - total for i in others), reverse=True)[:named]
    assert [value for _, value in top] == pytest.approx(likeliest, abs=1e-4)
    for i, value in top:
        assert value == pytest.approx(logits[i] - total, abs=1e-4)


def test_without_asking_there_are_none():
    [step] = Chooser(Sampling(), [[1]], FLAGS, torch.device("cpu")).step(torch.zeros(1, 12), [0])
    assert step.logprobs is None


def test_an_upstream_gives_the_chosen_tokens_own():
    with Upstream().serve() as server:
        backend = RemoteBackend(server.url, (FLAG,), (EOS,), vocab_size=VOCABULARY)
        assert most_logprobs(backend) == 0
        asked = Sampling(max_new_tokens=12, seed=3, logprobs=0)
        steps = list(backend.stream([20, 30], asked))
        plain = list(backend.stream([20, 30], Sampling(max_new_tokens=12, seed=3)))
    context = [20, 30]
    for step in steps:
        logits = logits_of(context)
        total = math.log(sum(math.exp(value) for i, value in enumerate(logits) if i != FLAG))
        assert step.logprobs.chosen == pytest.approx(logits[step.token_id] - total, abs=1e-3)
        assert step.logprobs.top == ()
        context.append(step.token_id)
    assert [step[:2] for step in steps] == [step[:2] for step in plain]
    assert most_logprobs(RemoteBackend("http://x", (5,), (1,), upper_bound=True)) is None
    assert most_logprobs(Turns(backend)) == 0


# To the client


@pytest.fixture
def serving(tokenizer, spec, thresholds):
    """A server whose tokens have log-probabilities that tell them apart: minus their index."""

    def start(steps, policy=None, most=20, **limits):
        steps = [
            step._replace(logprobs=Logprobs(-float(i), ((step.token_id, -0.5), (spec.ids[0], -1.0))))
            for i, step in enumerate(steps)
        ]
        _, turns = engine(steps, tokenizer.eos_token_id)
        turns.most_logprobs = most
        return running(Guard(turns, tokenizer, spec, thresholds, policy), Limits(MODEL, **{"logprobs": True, **limits}))

    return start


def asked(route, **fields):
    return body_of(route, **({"logprobs": True, "top_logprobs": 2} if route == CHAT else {"logprobs": 2}), **fields)


def tokens_of(choices):
    """(text, logprob) of all tokens, whatever the route."""
    found = []
    for choice in choices:
        logprobs = choice["logprobs"]
        if logprobs is None:
            continue
        if "content" in logprobs:
            assert logprobs["refusal"] is None
            for one in logprobs["content"]:
                assert one["bytes"] == list(one["token"].encode())
                [top] = one["top_logprobs"]
                assert top["token"] == (one["token"] or top["token"])
                found.append((one["token"], one["logprob"]))
        else:
            found += zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
            assert all(len(top) == 1 for top in logprobs["top_logprobs"])
            assert len(logprobs["text_offset"]) == len(logprobs["tokens"])
    return found


def asked_both(server, route, **fields):
    """Shown text and named tokens, whole and streamed, which are the same."""
    whole = httpx.post(server.url + route, json=asked(route, **fields))
    assert whole.status_code == 200, whole.content
    choice = whole.json()["choices"][0]
    text = choice["message"]["content"] if route == CHAT else choice["text"]
    if route == TEXT:
        for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
            assert text[offset:].startswith(token)
    chunks = chunks_of(httpx.post(server.url + route, json=asked(route, stream=True, **fields)).content)
    tokens = tokens_of([choice])
    assert tokens_of([chunk["choices"][0] for chunk in chunks]) == tokens
    return text, tokens


@pytest.mark.parametrize("route", ROUTES)
def test_each_shown_token_has_its_own(route, serving, script):
    with serving(script("abcdefghij")) as server:
        text, tokens = asked_both(server, route)
        assert tokens == [(letter, -float(i)) for i, letter in enumerate("abcdefghij")] and text == "abcdefghij"
        assert httpx.post(server.url + route, json=body_of(route)).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("policy", "high", "fields", "shown"),
    [
        (Policy(), {6: (0.9, 0.0)}, {}, "abcdef"),
        (Policy(hold_back=3), {6: (0.9, 0.0)}, {}, "abc"),
        (Policy(release="end"), {6: (0.9, 0.0)}, {}, ""),
        (Policy(), None, {"stop": "de"}, "abc"),
        (Policy(hold_back=4), None, {"stop": "de"}, "abc"),
        (Policy(default="replace", replacement="Sorry."), {6: (0.9, 0.0)}, {}, "abcdef"),
    ],
)
def test_what_is_not_shown_has_none(policy, high, fields, shown, serving, script):
    with serving(script("abcdefghij", high), policy, closing_text=" [stopped]") as server:
        for route in ROUTES:
            _, tokens = asked_both(server, route, **fields)
            assert "".join(text for text, _ in tokens) == shown


PIECES = ["a", "日", "👩", "<|harm|>", "<|ha", "rm|>", "<", "|>", "END", "E", "ND", " the cat", "\n"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=10), hold_back=st.integers(0, 2))
def test_whatever_is_written_the_tokens_named_are_the_text_that_is_shown(pieces, hold_back, serving, script):
    written = "".join(pieces)
    with serving(script(written), Policy(hold_back=hold_back)) as server:
        text, tokens = asked_both(server, TEXT, stop="END")
        named = "".join(token for token, _ in tokens)
        assert "<|harm|>" not in named and "END" not in named and "<|harm|>" not in json.dumps(tokens)
        assert text.startswith(named)
        if "<|harm|>" not in written and "END" not in written:
            assert named == text


def test_an_engine_that_forgets_them_is_a_fault(tokenizer, spec, thresholds, script):
    _, turns = engine([*script("abc", end=False), *script("d")], tokenizer.eos_token_id)
    turns.most_logprobs = 5
    with running(Guard(turns, tokenizer, spec, thresholds), Limits(MODEL, logprobs=True)) as server:
        assert httpx.post(server.url + CHAT, json=asked(CHAT)).status_code == 503


@pytest.mark.parametrize(
    ("most", "limits", "fields", "param", "words"),
    [
        (20, {"logprobs": False}, {"logprobs": True}, "logprobs", "started without them"),
        (None, {}, {"logprobs": True}, "logprobs", "this engine does not give them"),
        (0, {}, {"logprobs": True, "top_logprobs": 1}, "top_logprobs", "must be 0 at most with this engine"),
        (0, {}, {"logprobs": True}, None, ""),
        (20, {}, {"logprobs": True, "top_logprobs": 20}, None, ""),
        (None, {"logprobs": False}, {"logprobs": False, "top_logprobs": 0}, None, ""),
    ],
)
def test_what_cannot_be_given_is_refused_in_words(most, limits, fields, param, words, serving, script):
    with serving(script("abc"), most=most, **limits) as server:
        answer = httpx.post(server.url + CHAT, json=body_of(CHAT, **fields))
        if param is None:
            assert answer.status_code == 200
            return
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", param)
        assert words in error["message"]


def test_the_openai_client_reads_them(serving, script):
    ask = [{"role": "user", "content": "hello"}]
    with serving(script("abc")) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        answer = client.chat.completions.create(model=MODEL, messages=ask, logprobs=True, top_logprobs=1)
        assert [one.token for one in answer.choices[0].logprobs.content] == list("abc")
        with client.chat.completions.stream(model=MODEL, messages=ask, logprobs=True) as events:
            kinds = {event.type for event in events}
            final = events.get_final_completion()
        assert "logprobs.content.delta" in kinds
        assert [one.logprob for one in final.choices[0].logprobs.content] == [0.0, -1.0, -2.0]
        text = client.completions.create(model=MODEL, prompt="a", logprobs=1)
        assert text.choices[0].logprobs.tokens == list("abc")


def test_a_step_needs_none():
    assert Step(5, (0.1,)) == Step(5, (0.1,), None)
