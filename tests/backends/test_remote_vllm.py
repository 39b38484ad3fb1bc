"""The remote backend in front of a stock vLLM with the nano model; the contract is in `test_contract.py`."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import signal
import time
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
from stock_vllm import CONTEXT, serve_vllm

from redflag.backends import ChatInput, Sampling
from redflag.backends.load import load_flagged
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_handshake import handshake
from redflag.backends.remote_score import score_response
from redflag.data.rows import load_rows
from redflag.errors import RedflagError
from redflag.guard.grammar import Grammars
from redflag.prompt import render_prompt

pytestmark = pytest.mark.slow

LONG = Sampling(max_new_tokens=8000, temperature=1.0)
TOGETHER = 32


@pytest.fixture(scope="module")
def local(nano):
    """The same weights in the process: what vLLM is compared with."""
    return load_flagged(nano / "model", device=None)


@pytest.fixture(scope="module")
def prompts(nano, local):
    """200 prompts of the nano world's test rows, harmful and harmless."""
    _, tokenizer, spec = local
    rows = load_rows(nano / "rows" / "test.jsonl").rows[:200]
    return [render_prompt(tokenizer, row.messages[:-1], spec) for row in rows]


def connect(server, local, **options):
    backend, _, spec = local
    return RemoteBackend(server.url, spec.ids, backend.eos_ids, **options)


def endless(server, local):
    """Responses that last as long as they are let: the end-of-sequence tokens are banned like flags."""
    backend, _, spec = local
    return RemoteBackend(server.url, (*spec.ids, *backend.eos_ids), ())


def how_it_ended(stream):
    """`whole`: all tokens that fit into the context came; `failed`: the stream says that the server failed."""
    try:
        taken = 5 + len(list(stream))
    except ConnectionError as error:
        return "failed" if "failed" in str(error) else str(error)
    return "whole" if taken > CONTEXT // 2 else f"{taken} tokens and no error"


def gather(backend, prompts, sampling):
    """Responses to all prompts, `TOGETHER` at a time, on one event loop."""
    gate = asyncio.Semaphore(TOGETHER)

    async def one(prompt):
        async with gate:
            return [step async for step in backend.astream(prompt, sampling)]

    async def all_of_them():
        try:
            return await asyncio.gather(*map(one, prompts))
        finally:
            await backend.aclose()

    return asyncio.run(all_of_them())


def wait_until(fact, seconds=20.0):
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_hands_are_shaken(vllm_nano, local):
    for options in ({}, {"upper_bound": True}, {"model": "nano", "vocab_size": 4096}):
        backend = connect(vllm_nano, local, **options)
        handshake(backend)
        assert (backend.model, backend.context_length) == ("nano", CONTEXT)


@pytest.mark.parametrize(
    ("flag_ids", "options", "named"),
    [([5000], {}, "out-of-vocab.*serve the model"), ([5], {"model": "other"}, r"\['nano'\] and not 'other'")],
)
def test_another_model_is_found_out(vllm_nano, flag_ids, options, named):
    with pytest.raises(RedflagError, match=named):
        handshake(RemoteBackend(vllm_nano.url, flag_ids, [1], **options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_flag_probabilities_are_those_of_transformers(vllm_nano, local, prompts, temperature):
    responses = gather(
        connect(vllm_nano, local), prompts, Sampling(max_new_tokens=60, temperature=temperature, seed=11)
    )
    pairs = [(prompt, [s.token_id for s in steps]) for prompt, steps in zip(prompts, responses, strict=True)]
    expected = local[0].score(pairs)
    found = [np.array([step.flag_probs for step in steps]) for steps in responses]
    worst = max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True))
    high = sum(float(one.max()) > 0.5 for one in found)
    print(f"{len(prompts)} prompts, {sum(map(len, found))} steps, {high} with p > 0.5: largest difference {worst:.2e}")
    assert worst < 1e-3


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_under_a_grammar_flags_are_measured_as_without_one(vllm_nano, local, prompts, temperature):
    """Against the same tokens, scored without a grammar: by this server, and by transformers."""
    hf, tokenizer, spec = local
    backend = connect(vllm_nano, local)
    grammar = Grammars(tokenizer, spec, hf.eos_ids).json(PERSON)
    asked = prompts[:16]
    responses = gather(backend, asked, Sampling(120, temperature=temperature, seed=3, grammar=grammar))
    pairs = [(prompt, [s.token_id for s in steps]) for prompt, steps in zip(asked, responses, strict=True)]

    async def score():
        try:
            return await asyncio.gather(*(score_response(backend, "steps", *pair) for pair in pairs))
        finally:
            await backend.aclose()

    found = [np.array([step.flag_probs for step in steps]) for steps in responses]
    ways = {"vLLM, by steps": asyncio.run(score()), "transformers": hf.score(pairs)}
    for way, expected in ways.items():
        worst = max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True))
        high = sum(float(one.max()) > 0.5 for one in found)
        print(f"guided, {way}: {sum(map(len, found))} steps, {high} responses with p > 0.5: difference {worst:.2e}")
        assert worst < 1e-3
    ended = [ids[:-1] for _, ids in pairs if ids[-1] in hf.eos_ids]
    for ids in ended:
        value = json.loads(tokenizer.decode(ids))
        assert set(value) == {"name", "age"} and len(value["name"]) <= 24 and 10 <= value["age"] <= 99
    print(f"{len(ended)} of {len(asked)} ended by themselves")
    assert len(ended) > len(asked) / 2
    if temperature == 0.0:
        same = [
            [s.token_id for s in hf.stream(prompt, Sampling(120, temperature=0.0, grammar=grammar))]
            for prompt in asked[:6]
        ]
        equal = sum(ids == other for (_, ids), other in zip(pairs, same, strict=False))
        print(f"{equal} of {len(same)} as transformers writes them")
        assert equal >= len(same) - 1  # rounding may turn a choice between two tokens


def test_the_servers_own_structured_output_would_blind_the_watch(vllm_nano, local, prompts):
    """Why a grammar is never sent: it masks the logits before log-probabilities are taken."""
    spec = local[2]
    remote = connect(vllm_nano, local)
    body = {
        "prompt": prompts[0],
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 1,
        "logprob_token_ids": [spec.ids[0]],
    }
    body["return_tokens_as_token_ids"] = True

    async def flag_logprobs():
        try:
            return [
                (await remote.ask("/v1/completions", body | more))["choices"][0]["logprobs"]["top_logprobs"][0]
                for more in ({}, {"structured_outputs": {"json": PERSON}})
            ]
        finally:
            await remote.aclose()

    free, masked = (top[f"token_id:{spec.ids[0]}"] for top in asyncio.run(flag_logprobs()))
    assert free > -100 and masked == -9999.0


def test_the_chat_route_gives_the_same_steps_also_under_a_grammar_and_refuses_a_forged_prompt(nano, vllm_nano, local):
    backend, tokenizer, spec = local
    rows = load_rows(nano / "rows" / "test.jsonl").rows[:12]
    chat = RemoteBackend(vllm_nano.url, spec.ids, backend.eos_ids, route="chat")
    turns = ({"role": "user", "content": "Hello."},)
    handshake(chat, chat=(ChatInput(turns), render_prompt(tokenizer, turns, spec)))
    worst, grammar = 0.0, Grammars(tokenizer, spec, backend.eos_ids).json(PERSON)
    for number, row in enumerate(rows):
        turns = tuple(row.messages[:-1])
        prompt, sampling = render_prompt(tokenizer, turns, spec), Sampling(max_new_tokens=40, temperature=0.0)
        sampling = replace(sampling, grammar=grammar if number % 2 else None)
        by_ids = list(connect(vllm_nano, local).stream(prompt, sampling))
        by_chat = list(chat.stream(prompt, replace(sampling, chat=ChatInput(turns))))
        assert [step.token_id for step in by_chat] == [step.token_id for step in by_ids]
        worst = max(worst, *(abs(a.flag_probs[0] - b.flag_probs[0]) for a, b in zip(by_chat, by_ids, strict=True)))
    print(f"chat route, {len(rows)} prompts: largest difference {worst:.2e}")
    assert worst < 1e-3
    control = [spec.flags[0].token, tokenizer.eos_token, *tokenizer.get_added_vocab()]
    for forged in dict.fromkeys(control):
        turns = ({"role": "user", "content": f"well {forged} then"},)
        prompt = render_prompt(tokenizer, turns, spec)
        with pytest.raises(RedflagError, match="same prompt here and in the upstream"):
            list(chat.stream(prompt, Sampling(max_new_tokens=5, chat=ChatInput(turns))))
        assert list(chat.stream(prompt, Sampling(max_new_tokens=5)))  # by ids it is ordinary text


def test_bounds_are_never_below_and_exact_where_the_flag_is_likely(vllm_nano, local, prompts):
    sampling = Sampling(max_new_tokens=40, temperature=0.0)
    exact = gather(connect(vllm_nano, local), prompts[:40], sampling)
    bounds = gather(connect(vllm_nano, local, upper_bound=True), prompts[:40], sampling)
    for steps, others in zip(exact, bounds, strict=True):
        for step, other in zip(steps, others, strict=True):
            assert step.token_id == other.token_id
            assert other.flag_probs[0] >= step.flag_probs[0] - 1e-5
            if step.flag_probs[0] > 1 / 20:  # among the 20 most likely, of necessity
                assert other.flag_probs[0] == pytest.approx(step.flag_probs[0], abs=1e-4)


def test_a_bound_is_refused_where_a_neighbour_in_the_batch_takes_it_away(vllm_nano, local, prompts):
    """vLLM sends what `logprob_token_ids` asks for to the whole batch; then nothing may pass for a bound."""
    bounded, exact = connect(vllm_nano, local, upper_bound=True), connect(vllm_nano, local)

    async def one(backend, prompt):
        try:
            return [step async for step in backend.astream(prompt, Sampling(max_new_tokens=30, temperature=0.0))]
        except ConnectionError as error:
            assert "not the 20 largest" in str(error)
            return None

    async def both():
        found = await asyncio.gather(*(one(b, p) for p in prompts[:16] for b in (bounded, exact)))
        await bounded.aclose()
        await exact.aclose()
        return found

    found = asyncio.run(both())
    for steps, others in zip(found[::2], found[1::2], strict=True):
        for step, other in zip(steps or (), others, strict=False):
            assert step.flag_probs[0] >= other.flag_probs[0] - 1e-5


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_closing_a_stream_aborts_the_request(vllm_nano, local, prompts, taken):
    backend = endless(vllm_nano, local)
    wait_until(lambda: vllm_nano.running == 0)
    before = vllm_nano.finished

    async def leave():
        try:
            async with aclosing(backend.astream(prompts[0], LONG)) as stream:
                for _ in range(taken):
                    await anext(stream)
            # One more, to its end, so that the metrics are of a later time. They cannot be waited for in between: while
            # a stream that nobody reads runs on, a busy server may not answer.
            async with aclosing(backend.astream(prompts[0], Sampling(max_new_tokens=2))) as stream:
                assert len([step async for step in stream]) == 2
        finally:
            await backend.aclose()

    asyncio.run(leave())
    wait_until(lambda: vllm_nano.running == 0)
    assert vllm_nano.finished == before + 1  # the first was broken off


def test_a_cancelled_crowd_leaves_nothing_running(vllm_nano, local, prompts):
    backend = endless(vllm_nano, local)

    async def read(prompt):
        async for _ in backend.astream(prompt, LONG):
            pass

    async def leave():
        tasks = [asyncio.create_task(read(prompt)) for prompt in prompts[:TOGETHER]]
        ended = functools.partial(map, asyncio.Task.done, tasks)
        await asyncio.to_thread(wait_until, lambda: vllm_nano.running > TOGETHER // 2 or any(ended()))
        for task in tasks:
            assert task.cancel(), task.result()  # one that ended by itself says why
        await asyncio.gather(*tasks, return_exceptions=True)
        await backend.aclose()

    asyncio.run(leave())
    wait_until(lambda: vllm_nano.running == 0)


def test_the_servers_own_words_come_with_a_refusal(vllm_nano, local):
    backend = connect(vllm_nano, local)
    with pytest.raises(RedflagError, match=r"temperature must be in \[0, 2\]"):
        list(backend.stream([20, 30], Sampling(temperature=3.0)))
    with pytest.raises(RedflagError, match="5000 is out of vocabulary"):
        list(backend.stream([5000], Sampling()))
    long = connect(vllm_nano, local, model="nano", context_length=2 * CONTEXT)
    with pytest.raises(RedflagError, match=f"maximum context length is {CONTEXT}"):
        list(long.stream([20] * (CONTEXT + 88), Sampling(max_new_tokens=5)))


def test_a_server_that_measures_after_the_ban_is_refused_and_one_that_dies_is_an_error(nano, local, prompts, tmp_path):
    """One server for all of it: each takes long to start."""
    options = ("--logprobs-mode", "processed_logprobs", "--stream-interval", "7")
    with serve_vllm(nano / "model", tmp_path, *options) as server:
        for more in ({}, {"upper_bound": True}):
            with pytest.raises(RedflagError, match="--logprobs-mode raw_logprobs"):
                handshake(connect(server, local, **more))

        # Tokens come seven at a time, each with its own probabilities (here those after the ban: 0).
        steps = list(connect(server, local).stream(prompts[0], Sampling(max_new_tokens=30, temperature=0.0)))
        expected = list(local[0].stream(prompts[0], Sampling(max_new_tokens=30, temperature=0.0)))
        assert [step.token_id for step in steps] == [step.token_id for step in expected]
        assert all(step.flag_probs[0] < 1e-20 for step in steps)

        # One answer of this small model may be over before the reader gets to kill the server; sixteen are not.
        backend = endless(server, local)
        streams = [backend.stream(prompt, LONG) for prompt in prompts[:16]]
        assert all(len(list(itertools.islice(stream, 5))) == 5 for stream in streams)
        server.stop(signal.SIGKILL)
        ended = {how_it_ended(stream) for stream in streams}
        assert "failed" in ended and ended <= {"failed", "whole"}
        assert all(list(stream) == [] for stream in streams)
        with pytest.raises(ConnectionError, match="failed"):
            list(connect(server, local, model="nano", context_length=CONTEXT).stream(prompts[0], LONG))
        with pytest.raises(RedflagError, match="does not answer"):
            handshake(connect(server, local))
