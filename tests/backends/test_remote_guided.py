"""A grammar kept from outside: what is chosen, what is measured, and what a server is asked for."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections import Counter
from contextlib import aclosing

import numpy as np
import pytest
from upstream import EOS, FLAG, VOCABULARY, Upstream, log_softmax, logits_of

from redflag.backends import Sampling, remote_guided
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_guided import guided
from redflag.trace import Step

PROMPT = [20, 30, 40]


class Rule:
    """A grammar of ids: `allows(tokens so far)` is the set of those that may follow. Is its own matcher."""

    def __init__(self, allows, written=()):
        self.allows, self.written = allows, list(written)

    def begin(self):
        return Rule(self.allows, self.written)

    def after(self, token_ids):
        return Rule(self.allows, [*self.written, *token_ids])

    def mask(self):
        bits = np.zeros(VOCABULARY, dtype=np.uint8)
        bits[sorted(self.allows(self.written))] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    def accept(self, token_id):
        allowed = token_id in self.allows(self.written)
        if allowed:
            self.written.append(token_id)
        return allowed


class Engine:
    """What `guided` needs of a backend, without a network. Counts what it is asked."""

    eos_ids, context_length = frozenset([EOS]), 64

    def __init__(self, *, heeds=True, nan_at=None):
        self.heeds, self.nan_at, self.asked = heeds, nan_at, []

    async def answer(self, prompt, sampling, *, measured, banned, allowed=(), link=None):
        assert sampling.grammar is None and len(prompt) < self.context_length
        self.asked.append((sampling.max_new_tokens, tuple(allowed), frozenset(banned)))
        draw, context = random.Random(sampling.seed), list(prompt)
        for _ in range(min(sampling.max_new_tokens, self.context_length - len(prompt))):
            raw = logits_of(context)
            probs = tuple(math.exp(log_softmax(raw)[i]) for i in measured)
            if len(context) == self.nan_at:
                probs = (math.nan,) * len(probs)
            ids = [i for i in range(VOCABULARY) if i not in banned and (not allowed or not self.heeds or i in allowed)]
            token = max(ids, key=raw.__getitem__)
            if not sampling.greedy:
                token = draw.choices(ids, [math.exp(raw[i] / sampling.temperature) for i in ids])[0]
            yield Step(token, probs)
            if token == EOS or math.isnan(probs[0]):
                return
            context.append(token)


def steps_of(engine, sampling, prompt=PROMPT):
    async def collect():
        steps = guided(engine, prompt, sampling, measured=[FLAG], banned=[FLAG])
        async with aclosing(steps):
            return [step async for step in steps]

    return asyncio.run(collect())


def tokens(steps):
    return [step.token_id for step in steps]


def few(written):
    """Six of the sixty, others at each position; the end after eight tokens at the earliest, after twelve for sure."""
    if len(written) >= 12:
        return {EOS}
    return {10 + (7 * len(written) + 5 * k) % 50 for k in range(6)} | ({EOS} if len(written) >= 8 else set())


def odd(written):
    """Half of all ids: more than may be sent, where the tests say so."""
    return {i for i in range(VOCABULARY) if i % 2} - {FLAG} if len(written) < 12 else {EOS}


@pytest.mark.parametrize("allows", [few, odd])
@pytest.mark.parametrize("most", [1024, 3])
def test_greedy_is_the_likeliest_allowed_token_and_flags_are_measured_over_all(monkeypatch, allows, most):
    monkeypatch.setattr(remote_guided, "MOST_ALLOWED", most)
    monkeypatch.setattr(remote_guided, "_BANS", VOCABULARY)
    engine = Engine()
    steps = steps_of(engine, Sampling(max_new_tokens=30, temperature=0.0, grammar=Rule(allows)))
    context = list(PROMPT)
    for step in steps:
        raw = logits_of(context)
        expected = max(allows(context[len(PROMPT) :]), key=raw.__getitem__)
        assert step.token_id == expected
        assert step.flag_probs == pytest.approx([math.exp(log_softmax(raw)[FLAG])], abs=1e-12)
        context.append(step.token_id)
    assert steps[-1].token_id == EOS and len(steps) > 8
    assert all(len(allowed) <= most and FLAG in banned for _, allowed, banned in engine.asked)


@pytest.mark.parametrize("most", [1024, 3])
def test_a_drawn_token_has_the_models_distribution_over_the_allowed_ones(monkeypatch, most):
    monkeypatch.setattr(remote_guided, "MOST_ALLOWED", most)
    monkeypatch.setattr(remote_guided, "_BANS", VOCABULARY)
    allowed = sorted(few([]))
    weights = np.exp([logits_of(PROMPT)[i] for i in allowed])
    count, engine = 1000, Engine()
    drawn = Counter(
        tokens(steps_of(engine, Sampling(max_new_tokens=1, seed=1000 * seed, grammar=Rule(few))))[0]
        for seed in range(count)
    )
    assert set(drawn) <= set(allowed) and len(engine.asked) > 1.5 * count, "most draws are refused at first"
    for token_id, expected in zip(allowed, weights / weights.sum(), strict=True):
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs(drawn[token_id] / count - expected) < 5 * deviation + 1e-9, token_id


def test_the_last_try_is_cut_down_to_what_can_be_sent(monkeypatch):
    monkeypatch.setattr(remote_guided, "MOST_ALLOWED", 2)
    monkeypatch.setattr(remote_guided, "_BANS", 2)
    engine = Engine()
    steps = steps_of(engine, Sampling(max_new_tokens=30, temperature=0.0, grammar=Rule(few)))
    assert tokens(steps)[-1] == EOS and not Rule(few).begin().accept(0)
    matcher = Rule(few).begin()
    assert all(matcher.accept(token_id) for token_id in tokens(steps))
    assert max(len(allowed) for _, allowed, _ in engine.asked) == 2
    assert max(len(banned) for _, _, banned in engine.asked) == 1 + 2


@pytest.mark.parametrize("seed", range(8))
def test_limits_hold_over_all_requests_together(seed):
    for limit, prompt in itertools.product((1, 2, 5, 11), (PROMPT, [20] * 58, [20] * 63)):
        engine = Engine()
        steps = steps_of(engine, Sampling(max_new_tokens=limit, seed=seed, grammar=Rule(few)), prompt)
        assert len(steps) == min(limit, 64 - len(prompt)) or steps[-1].token_id == EOS
        assert tokens(steps) == tokens(
            steps_of(Engine(), Sampling(max_new_tokens=limit, seed=seed, grammar=Rule(few)), prompt)
        )


def test_where_one_token_is_left_the_server_is_not_asked_again():
    engine = Engine()
    grammar = Rule(lambda written: {[33, 44, 22, EOS][len(written)]})
    steps = steps_of(engine, Sampling(max_new_tokens=4, temperature=0.0, grammar=grammar))
    assert tokens(steps) == [33, 44, 22, EOS]
    assert all(not allowed for _, allowed, _ in engine.asked)


def test_an_unjudged_position_ends_the_response_unjudged():
    for nan_at in range(3, 9):
        steps = steps_of(Engine(nan_at=nan_at), Sampling(max_new_tokens=30, temperature=0.0, grammar=Rule(few)))
        assert len(steps) == nan_at - 3 + 1
        assert math.isnan(steps[-1].flag_probs[0]) and not any(math.isnan(s.flag_probs[0]) for s in steps[:-1])


def test_a_server_that_does_not_know_the_field_is_a_fault():
    with pytest.raises(ConnectionError, match="allowed_token_ids"):
        steps_of(Engine(heeds=False), Sampling(max_new_tokens=30, temperature=0.0, grammar=Rule(few)))


def test_a_grammar_without_a_next_token_is_a_fault():
    for allows in (lambda written: set(), lambda written: {FLAG}):
        with pytest.raises(RuntimeError, match="leaves no token"):
            steps_of(Engine(), Sampling(max_new_tokens=5, grammar=Rule(allows)))


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_over_http_with_and_without_a_loop(per_chunk):
    with Upstream(per_chunk=per_chunk).serve() as upstream:
        backend = RemoteBackend(upstream.url, [FLAG], [EOS], step_timeout=10.0)
        for temperature in (0.0, 1.0):
            sampling = Sampling(max_new_tokens=30, seed=5, temperature=temperature, grammar=Rule(few))

            async def collect(sampling=sampling):
                try:
                    return [step async for step in backend.astream(PROMPT, sampling)]
                finally:
                    await backend.aclose()

            alone = list(backend.stream(PROMPT, sampling))
            assert asyncio.run(collect()) == alone and alone[-1].token_id == EOS
            matcher, context = Rule(few).begin(), list(PROMPT)
            for step in alone:
                assert matcher.accept(step.token_id)
                assert step.flag_probs == pytest.approx([math.exp(log_softmax(logits_of(context))[FLAG])], abs=1e-12)
                context.append(step.token_id)
        assert not any("structured_outputs" in body or "response_format" in body for body in upstream.bodies)


def test_left_at_any_point_nothing_stays_open():
    with Upstream().serve() as upstream:
        for taken in range(6):
            backend = RemoteBackend(upstream.url, [FLAG], [EOS], step_timeout=10.0)
            stream = backend.stream(PROMPT, Sampling(max_new_tokens=30, seed=1, grammar=Rule(few)))
            assert len(list(itertools.islice(stream, taken))) == taken
            stream.close()
            assert list(stream) == []
        until = 200
        while upstream.open and (until := until - 1):
            asyncio.run(asyncio.sleep(0.02))
        assert upstream.open == 0
