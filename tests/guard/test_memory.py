"""A conversation under memory: what was measured of earlier answers raises the scores of the next one."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from redflag.backends import Sampling
from redflag.backends.scripted import ScriptedBackend
from redflag.backends.turns import Turns
from redflag.earlier_answers import answer_spans
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.guard.response import adrive
from redflag.trace import Alarm, Halt, Trace
from redflag.watching.memory import Memory, raised
from redflag.watching.policy import Policy, Reflect
from redflag.watching.replay import replay

ASK = [{"role": "user", "content": "hello"}]
LATER = [*ASK, {"role": "assistant", "content": "the cat"}, {"role": "user", "content": "go on"}]
MEMORY = Memory(weight=1.0, decay=0.5)


@pytest.fixture
def remembering(tokenizer, spec, thresholds, script):
    """A guard whose engine measures the same two probabilities at every step of every earlier answer."""

    def build(earlier, high=0.4, memory=MEMORY, policy=None):
        def measured(prompt, spans):
            assert spans == answer_spans(tokenizer, LATER, spec)[1]
            return [[earlier] * (end - start) for start, end in spans]

        steps = script("abcdefghij", {6: (high, 0.0)})
        backend = ScriptedBackend(steps, {tokenizer.eos_token_id}, earlier=measured)
        return Guard(backend, tokenizer, spec, thresholds, policy, memory=memory)

    return build


def test_a_score_below_the_threshold_halts_behind_a_suspicious_answer(remembering):
    assert remembering((0.3, 0.01)).generate(ASK).verdict == "completed"
    assert remembering((0.01, 0.3)).generate(LATER).verdict == "completed"  # the other flag
    result = remembering((0.3, 0.01)).generate(LATER)
    factor = MEMORY.factors([(0.3, 0.01)], 0.01, 2)[0]
    assert (result.verdict, result.text) == ("halted", "abcdef")
    assert result.events[-2] == Alarm(6, "harm", raised(0.4, factor), 0.5, "halt")
    assert result.trace.flag_probs[6] == (0.4, 0.0) and result.trace.meta["earlier"] == [[0.3, 0.01]]


def test_without_memory_or_without_earlier_answers_nothing_changes(remembering):
    plain = remembering((0.3, 0.01), memory=None)
    for guard, messages in (
        (remembering((0.3, 0.01), memory=Memory(0.0)), LATER),
        (remembering((0.3, 0.01)), ASK),
        (remembering((0.01, 0.01)), LATER),
    ):
        ours, theirs = guard.generate(messages), plain.generate(messages)
        assert ours.events == theirs.events and ours.trace.scores == theirs.trace.scores


@pytest.mark.parametrize("bad", [(math.nan, 0.1), (1.5, 0.1), (0.1,), (0.1, 0.1, 0.1)], ids=repr)
def test_an_earlier_answer_that_cannot_be_judged_is_a_fault(remembering, bad):
    result = remembering(bad).generate(LATER)
    assert (result.verdict, result.text) == ("fault", "") and "earlier" in result.events[-1].detail


def test_an_engine_that_leaves_earlier_answers_out_is_a_fault(remembering):
    guard = remembering((0.1, 0.1))
    guard.backend._earlier = lambda prompt, spans: []
    assert guard.generate(LATER).verdict == "fault"
    guard.backend.measures_earlier, guard.backend._earlier = True, None
    with pytest.raises(RedflagError, match="memory"):  # a script without it refuses
        guard.generate(LATER)


def test_an_engine_that_cannot_measure_them_is_refused_at_the_start(tokenizer, spec, thresholds, script):
    backend = ScriptedBackend(script("abc"), {tokenizer.eos_token_id})
    with pytest.raises(RedflagError, match="memory must be off with ScriptedBackend"):
        Guard(backend, tokenizer, spec, thresholds, memory=MEMORY)


def test_thresholds_that_were_calibrated_without_memory_are_not_used_with_it(remembering, tokenizer, spec, thresholds):
    backend = remembering((0.1, 0.1)).backend
    calibrated = replace(thresholds, guarantee="expected", target_fpr=0.01)
    Guard(backend, tokenizer, spec, calibrated)
    with pytest.raises(RedflagError, match="calibrate"):
        Guard(backend, tokenizer, spec, calibrated, memory=MEMORY)
    with_it = replace(calibrated, memory=MEMORY)
    assert Guard(backend, tokenizer, spec, with_it).thresholds.memory == MEMORY  # nothing said: as calibrated
    for other in (Memory(0.0), Memory(0.5)):
        with pytest.raises(RedflagError, match="memory must be Memory"):
            Guard(backend, tokenizer, spec, with_it, memory=other)


def test_a_server_s_loop_remembers_too_and_a_review_does_not_ask_again(remembering):
    guard = remembering((0.3, 0.01), policy=Policy(default="reflect", reflect=Reflect(verdict="flag")))

    async def run():
        turns = Turns(guard.backend)
        assert turns.measures_earlier
        response = guard.respond(LATER, Sampling(max_new_tokens=20))
        events = [event async for event in adrive(response, turns)]
        await turns.aclose()
        return events

    events = asyncio.run(run())
    assert any(isinstance(event, Alarm) for event in events)
    assert len(guard.backend.prompts) > 1


def test_a_recorded_response_is_replayed_with_its_memory(remembering, thresholds):
    recorded = remembering((0.3, 0.01), policy=Policy(observe=True)).generate(LATER).trace
    assert isinstance(recorded, Trace) and not isinstance(recorded.end, Halt)
    again = replay(recorded, replace(thresholds, memory=MEMORY), Policy())
    assert isinstance(again.end, Halt) and again.end.position == 6
    assert not isinstance(replay(recorded, thresholds, Policy()).end, Halt)
