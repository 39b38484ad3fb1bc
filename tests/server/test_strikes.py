"""After some halts a conversation is not served any more."""

from __future__ import annotations

import httpx
import pytest
from running import MODEL, engine, running

from redflag.api.api_errors import ApiError
from redflag.guard.guard import Guard
from redflag.server import strikes
from redflag.server.access import Limits
from redflag.server.strikes import Strikes, conversation_name

CHAT = "/v1/chat/completions"


@pytest.fixture
def serving(tokenizer, spec, thresholds, script):
    """A server whose answers are halted where the prompt names a bomb."""

    def play(prompt, sampling):
        return script("the cat sat", {2: (0.9, 0.0)} if "bomb" in tokenizer.decode(prompt) else {})

    def serve(keys=(), **limits):
        _, turns = engine(play, tokenizer.eos_token_id)
        limits = {"operator_key": "operator-operator", "test_halt": True, **limits}
        return running(Guard(turns, tokenizer, spec, thresholds), Limits(MODEL, api_keys=keys, **limits))

    return serve


def ask(server, *texts, key="", route=CHAT, headers=None, **fields):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    prompt = {"prompt": texts[0]} if route == "/v1/completions" else {"messages": turns}
    prompt = {"input": turns} if route == "/v1/responses" else prompt
    headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
    limit = {"max_output_tokens" if route == "/v1/responses" else "max_tokens": 20}
    return httpx.post(server.url + route, json={"model": MODEL, **prompt, **limit, **fields}, headers=headers)


def stopped(answer):
    return answer.status_code == 403 and "this conversation was stopped" in answer.json()["error"]["message"]


@pytest.mark.parametrize("route", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_the_second_halt_ends_a_conversation_at_every_door_and_no_other_one(serving, route):
    with serving(halts_allowed=2) as server:
        for _ in range(2):
            assert ask(server, "a bomb", route=route).status_code == 200
        answer = ask(server, "a bomb", route=route)
        assert stopped(answer)
        assert ask(server, "another bomb", route=route).status_code == 200
        assert ask(server, "hello", route=route).status_code == 200
        if route == CHAT:
            assert answer.json()["error"]["code"] == "conversation_stopped"
            assert stopped(ask(server, "a bomb", "no", "then something else"))
            assert stopped(ask(server, "a bomb", stream=True))


def test_a_user_is_known_in_every_conversation_of_the_same_key(serving):
    with serving(("first-first-first", "other-other-other"), halts_allowed=1) as server:
        asked = {"key": "first-first-first", "safety_identifier": "u-17"}
        assert ask(server, "a bomb", **asked).status_code == 200
        assert stopped(ask(server, "hello", **asked))
        assert stopped(ask(server, "hello", route="/v1/messages", metadata={"user_id": "u-17"}, key=asked["key"]))
        assert ask(server, "hello", **{**asked, "safety_identifier": "u-18"}).status_code == 200
        assert ask(server, "hello", **{**asked, "key": "other-other-other"}).status_code == 200
        assert ask(server, "a bomb", key=asked["key"]).status_code == 200


def test_every_halted_choice_counts_and_a_client_that_left_too(serving):
    with serving(halts_allowed=2) as server:
        assert ask(server, "a bomb", n=2).status_code == 200
        assert stopped(ask(server, "a bomb"))
        for _ in range(2):
            with httpx.stream("POST", server.url + CHAT, json=streamed("bomb two")) as answer:
                assert answer.status_code == 200
        server.told(4)
        assert stopped(ask(server, "bomb two"))


def streamed(text):
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 20}


def test_a_rehearsed_halt_does_not_count_and_without_the_option_nothing_does(serving):
    operator = {"X-Redflag-Operator": "operator-operator"}
    with serving(halts_allowed=1) as server:
        test = {**operator, "X-Redflag-Test": "halt"}
        assert ask(server, "hello", headers=test).json()["choices"][0]["finish_reason"] == "content_filter"
        assert ask(server, "hello").status_code == 200
    with serving() as server:
        assert {ask(server, "a bomb").status_code for _ in range(4)} == {200}


def test_halts_are_forgotten_after_a_while_and_the_oldest_where_there_are_too_many(monkeypatch):
    now = [0.0]
    known = Strikes(2, 10.0, lambda: now[0])
    known.count("a")
    now[0] = 9.0
    known.count("a")
    with pytest.raises(ApiError, match="2 of its answers were halted"):
        known.check("a")
    now[0] = 19.0
    known.check("a")
    known.count("a")
    known.check("a")
    monkeypatch.setattr(strikes, "_MOST", 2)
    known.count("a")
    known.count("b")
    known.count("c")
    known.check("a")


def test_what_a_conversation_is_known_by():
    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    more = [*first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]
    assert conversation_name("", None, first) == conversation_name("", None, more)
    others = [("k", None, first), ("", "me", first), ("", None, first[1:]), ("", None, "u")]
    assert len({conversation_name(*other) for other in [("", None, first), *others]}) == 5
