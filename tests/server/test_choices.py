"""Several answers to one request: each is watched by itself, and together they are one answer to the client."""

from __future__ import annotations

import itertools
import time

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import MODEL, ROUTES, body_of, chunks_of, engine, running, shown_by, wait_for

from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.trace import Step
from redflag.watching.policy import Policy, Reflect

CHAT, TEXT = ROUTES
ANSWERS = ("abcdefghij", "klmnopqrst", "uvwxyz", "0123")
HARM, NAN = (0.9, 0.0), (float("nan"), 0.0)


@pytest.fixture
def serving(tokenizer, spec, thresholds, script):
    """A server whose engine answers by seed, with flags where `high` says: answer -> step -> probabilities."""

    def start(high=None, policy=None, limits=None, lost=None, pause=0.0, **options):
        def play(prompt, sampling):
            answer = (sampling.seed or 0) % len(ANSWERS)
            for index, step in enumerate(script(ANSWERS[answer], (high or {}).get(answer))):
                if (answer, index) == lost:
                    raise ConnectionError("lost")
                time.sleep(pause)
                yield step

        backend, turns = engine(play, tokenizer.eos_token_id, **options)
        return backend, running(Guard(turns, tokenizer, spec, thresholds, policy), limits or Limits(MODEL))

    return start


def texts_of(chunks):
    """Index -> text, role, how it ended and what `redflag` says, of the chunks of a stream."""
    texts: dict[int, str] = {}
    ends, details = {}, {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            assert index not in ends, "nothing comes after a choice's end"
            delta = choice.get("delta")
            text = choice["text"] if delta is None else delta.get("content") or ""
            texts[index] = texts.get(index, "") + text
            if choice["finish_reason"]:
                ends[index] = choice["finish_reason"]
                details[index] = chunk.get("redflag")
    return texts, ends, details


def content(choice):
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.mark.parametrize("route", ROUTES)
def test_each_choice_is_an_answer_of_its_own(route, serving):
    _, server = serving()
    with server as server:
        for n in (1, 2, 4):
            answer = httpx.post(server.url + route, json=body_of(route, n=n, seed=0)).json()
            assert [choice["index"] for choice in answer["choices"]] == list(range(n))
            assert tuple(map(content, answer["choices"])) == ANSWERS[:n]
            assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"} and "redflag" not in answer
            generated = sum(len(text) + 1 for text in ANSWERS[:n])
            one = httpx.post(server.url + route, json=body_of(route, seed=0)).json()["usage"]["prompt_tokens"]
            assert answer["usage"] == {
                "prompt_tokens": one,
                "completion_tokens": generated,
                "total_tokens": one + generated,
                "completion_tokens_details": {"released_tokens": generated, "hidden_tokens": 0},
            }
        ids = [trace.id for trace in server.traces[-5:-1]]
        assert ids == [answer["id"], *(f"{answer['id']}-{i}" for i in (1, 2, 3))] or len(set(ids)) == 4


@pytest.mark.parametrize("route", ROUTES)
def test_choices_are_streamed_side_by_side(route, serving):
    _, server = serving(pause=0.01)  # no answer is over before the next begins
    with server as server:
        asked = body_of(route, n=3, seed=0, stream=True, stream_options={"include_usage": True})
        *chunks, counts = chunks_of(httpx.post(server.url + route, json=asked).content)
        texts, ends, _ = texts_of(chunks)
        assert texts == dict(enumerate(ANSWERS[:3])) and ends == dict.fromkeys(range(3), "stop")
        order = [chunk["choices"][0]["index"] for chunk in chunks]
        assert order != sorted(order), "they take turns"
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert counts["choices"] == [] and counts["usage"]["completion_tokens"] == sum(map(len, ANSWERS[:3])) + 3
        if route == CHAT:
            roles = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["delta"].get("role")]
            assert sorted(roles) == [0, 1, 2]


def test_several_prompts_have_n_choices_each_in_order(serving, tokenizer):
    backend, server = serving()
    with server as server:
        asked = {"model": MODEL, "prompt": ["the cat", "the dog"], "n": 2, "seed": 0}
        answer = httpx.post(server.url + TEXT, json=asked).json()
        assert tuple(map(content, answer["choices"])) == ANSWERS
        prompts = [tokenizer.decode(ids) for ids in sorted(backend.prompts)]
        assert prompts.count("the cat") == prompts.count("the dog") == 2
        once = sum(len(tokenizer(text)["input_ids"]) for text in asked["prompt"])
        assert answer["usage"]["prompt_tokens"] == once, "choices of one prompt share its tokens"


@pytest.mark.parametrize("route", ROUTES)
def test_one_choice_is_halted_and_the_others_go_on(route, serving):
    _, server = serving({1: {3: HARM}, 2: {0: HARM}})
    alarm = {"verdict": "halted", "reason": "alarm", "category": "harm"}
    with server as server:
        for stream in (False, True):
            got = httpx.post(server.url + route, json=body_of(route, n=4, seed=0, stream=stream))
            if stream:
                texts, ends, details = texts_of(chunks_of(got.content))
            else:
                choices = got.json()["choices"]
                texts = {c["index"]: content(c) for c in choices}
                ends = {c["index"]: c["finish_reason"] for c in choices}
                details = {c["index"]: c.get("redflag") for c in choices}
                assert got.json()["redflag"] == {**alarm, "index": 1}
                refusals = [bool(c["message"]["refusal"]) for c in choices] if route == CHAT else None
                assert refusals in (None, [False, False, True, False])
            assert texts == {0: ANSWERS[0], 1: "klm", 2: "", 3: ANSWERS[3]}
            assert ends == {0: "stop", 1: "content_filter", 2: "content_filter", 3: "stop"}
            assert details == {0: None, 1: alarm, 2: alarm, 3: None}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("broken", [{"high": {2: {2: NAN}}}, {"lost": (2, 2)}])
def test_a_fault_of_one_is_an_error_of_all(route, broken, serving):
    backend, server = serving(**broken)
    with server as server:
        whole = httpx.post(server.url + route, json=body_of(route, n=3, seed=0))
        assert whole.status_code == 503 and set(whole.json()) == {"error"}
        sent = httpx.post(server.url + route, json=body_of(route, n=3, seed=0, stream=True)).content
        *chunks, last = chunks_of(sent)
        assert last["error"]["code"] == "engine_unavailable" and last["redflag"]["verdict"] == "fault"
        texts, _, _ = texts_of(chunks)
        assert texts[2] == "uv" and all(ANSWERS[i].startswith(text) for i, text in texts.items())
        assert b"content_filter" not in sent
        wait_for(lambda: backend.open_streams == 0 and not server.server.open)
        server.told(6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_of_no_choice_an_unjudged_token_leaves(data, tokenizer, spec, thresholds, script):
    hold_back = data.draw(st.integers(0, 2))
    bad = st.none() | st.tuples(st.integers(0, 9), st.sampled_from([HARM, NAN, None]))
    plan = data.draw(st.lists(bad, min_size=2, max_size=4))
    steps = []
    for one in plan:
        harmless: list[Step | None] = list(script("abcdefghij"))
        if one is not None:
            at, probs = one
            harmless = [*harmless[:at], None] if probs is None else list(script("abcdefghij", {at: probs}))
        steps.append(harmless)

    def play(prompt, sampling):
        for step in steps[sampling.seed]:
            if step is None:
                raise ConnectionError("lost")
            yield step

    _, turns = engine(play, tokenizer.eos_token_id)
    with running(Guard(turns, tokenizer, spec, thresholds, Policy(hold_back=hold_back))) as server:
        for stream in (False, True):
            got = httpx.post(server.url + TEXT, json=body_of(TEXT, n=len(plan), seed=0, stream=stream), timeout=20)
            wait_for(lambda: not server.server.open)
            if got.status_code != 200:
                assert got.status_code == 503 and any(one is not None and one[1] != HARM for one in plan)
                continue
            if stream:
                texts = texts_of([chunk for chunk in chunks_of(got.content) if "choices" in chunk])[0]
            else:
                texts = {choice["index"]: choice["text"] for choice in got.json()["choices"]}
            for index, text in texts.items():
                one = plan[index]
                judged = "abcdefghij" if one is None else "abcdefghij"[: max(0, one[0] - hold_back)]
                assert judged.startswith(text) and (text == judged or b'"error"' in got.content)
        for trace in server.traces:
            assert shown_by(trace) in "abcdefghij"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_all_choices(stream, tokenizer, spec, thresholds, script):
    def endless(prompt, sampling):
        for step in itertools.cycle(script("the cat sat ", end=False)):
            time.sleep(0.002)
            yield step

    backend, turns = engine(endless, tokenizer.eos_token_id)
    with running(Guard(turns, tokenizer, spec, thresholds), Limits(MODEL, max_tokens=10**6)) as server:
        asked = body_of(CHAT, n=3, stream=stream, max_tokens=10**6)
        if stream:
            with httpx.stream("POST", server.url + CHAT, json=asked) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + CHAT, json=asked, timeout=0.5)
        server.told(3)
        wait_for(lambda: backend.open_streams == 0 and not server.server.open)
        assert server.ends() == {"disconnected"}


def test_an_engine_without_room_for_all_choices_is_busy(serving):
    _, server = serving(active=1, waiting=1)
    with server as server:
        for stream in (False, True):
            answer = httpx.post(server.url + CHAT, json=body_of(CHAT, n=3, stream=stream))
            assert answer.status_code == 429 or b"engine_" in answer.content
        wait_for(lambda: not server.server.open)
        assert httpx.post(server.url + CHAT, json=body_of(CHAT, n=2)).status_code == 200


def test_choices_that_reflect_keep_their_places_in_a_full_engine(tokenizer, spec, thresholds, script):
    thought = script("hm|", end=False)
    verdict = [thought[0]._replace(flag_probs=(0.1, 0.9))]
    answer = script("abcdefghij", {4: HARM})

    def play(prompt, sampling):
        if set(spec.ids) & set(prompt):
            return thought
        given = [step.token_id for step in answer[:5]]
        return answer[5:] if list(prompt[-5:]) == given else answer

    reflect = Reflect(cue="Hm.", words=("yes", "no"), verdict_cue="So:", stop=("|",))
    _, turns = engine(play, tokenizer.eos_token_id, watched=lambda *asked: verdict, active=2, waiting=0)
    guard = Guard(turns, tokenizer, spec, thresholds, Policy(default="reflect", reflect=reflect))
    with running(guard) as server:
        choices = httpx.post(server.url + TEXT, json=body_of(TEXT, n=2), timeout=20).json()["choices"]
        assert [choice["text"] for choice in choices] == ["abcdefghij"] * 2


def test_the_openai_client_reads_several_choices(serving):
    _, server = serving({1: {3: HARM}})
    ask = [{"role": "user", "content": "hello"}]
    with server as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model=MODEL, messages=ask, n=2, seed=0)
        assert [c.message.content for c in answer.choices] == [ANSWERS[0], "klm"]
        assert [c.finish_reason for c in answer.choices] == ["stop", "content_filter"]
        with client.chat.completions.stream(model=MODEL, messages=ask, n=2, seed=2) as events:
            for _ in events:
                pass
            final = events.get_final_completion()
        assert [c.message.content for c in final.choices] == list(ANSWERS[2:])
        texts = client.completions.create(model=MODEL, prompt=["a", "b"], seed=2)
        assert [c.text for c in texts.choices] == list(ANSWERS[2:])
