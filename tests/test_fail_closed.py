"""What no real engine can be made to do, a scripted one does: the stream fails closed. And conversations that are none.

By the Python interface; the command line has its own cases in test_bad_input.py.
"""

from __future__ import annotations

import math

import pytest
from transformers import AutoTokenizer

from redflag.backends import Sampling
from redflag.backends.scripted import ScriptedBackend
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.guard.guard import Guard
from redflag.trace import Halt, Step, Text
from redflag.watching.thresholds import Thresholds

ASK = [{"role": "user", "content": "tell the cat"}]
GOOD = (0.01, 0.02)


class Guarded:
    """A guard over scripted steps that spell a text."""

    def __init__(self, origin):
        self.tokenizer = AutoTokenizer.from_pretrained(origin / "model")
        self.spec = FlagSpec.load(origin / "model")
        self.thresholds = Thresholds.load(origin / "model")

    def steps(self, words):
        return [Step(i, GOOD) for i in self.tokenizer(words, split_special_tokens=True)["input_ids"]]

    def __call__(self, steps, **options):
        self.backend = ScriptedBackend(steps, {self.tokenizer.eos_token_id}, **options)
        return Guard(self.backend, self.tokenizer, self.spec, self.thresholds)


@pytest.fixture(scope="module")
def guarded(origin):
    return Guarded(origin)


BAD_STEPS = {
    "NaN": (Step(40, (0.1, math.nan)), "a flag probability must be at least 0 and at most 1 (got nan)"),
    "below 0": (Step(40, (-0.1, 0.1)), "a flag probability must be at least 0 and at most 1 (got -0.1)"),
    "above 1": (Step(40, (0.1, 1.5)), "a flag probability must be at least 0 and at most 1 (got 1.5)"),
    "one flag missing": (Step(40, (0.1,)), "must be 2 numbers (got 1)"),
    "no probabilities": (Step(40, None), "the flag probabilities of a step must be 2 numbers (got None)"),
    "no step": (None, "None"),
    "a flag chosen": (Step(5, GOOD), "the engine chose flag id 5"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_step_that_cannot_be_judged_halts_and_nothing_follows(guarded, name):
    bad, reason = BAD_STEPS[name]
    assert guarded.spec.ids[0] == 5
    result = guarded([*guarded.steps("the cat"), bad, *guarded.steps(" sat")]).generate(ASK)
    assert (result.text, result.verdict) == ("the cat", "fault")
    assert [type(event) for event in result.events].count(Halt) == 1 and reason in result.events[-1].detail


def test_a_lost_engine_halts(guarded):
    result = guarded(guarded.steps("the cat sat"), fail_at=1).generate(ASK)
    assert result.verdict == "fault" and "engine was lost" in result.events[-1].detail
    assert "".join(event.text for event in result.events if isinstance(event, Text)) == result.text != "the cat sat"


@pytest.mark.parametrize("form", ["{}", " {} ", "a{}b", "{0}{0}", "<|reserved{}_0|>", "\u200b{}", "<|user|>{}<|end|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_the_text_of_a_flag_makes_no_flag_and_is_never_shown(guarded, role, form):
    flag = guarded.spec.flags[0].token
    said = form.format(flag)
    guard = guarded([*guarded.steps("the " + said), Step(guarded.tokenizer.eos_token_id, GOOD)])
    turn = {"role": role, "content": said}
    messages = {"system": [turn, *ASK], "user": [turn], "assistant": [*ASK, turn]}[role]
    result = guard.generate(messages, Sampling(max_new_tokens=200))
    (prompt,) = guarded.backend.prompts
    assert not set(prompt) & set(guarded.spec.ids)
    assert result.verdict == "completed" and flag not in result.text and result.text.startswith("the ")


BAD_MESSAGES = {
    "none": ([], "the conversation must have at least one user message"),
    "an unknown role": ([{"role": "robot", "content": "hi"}], "(got 'robot')"),
    "no text": ([{"role": "user", "content": None}], "message 0 must have text content"),
    "no content": ([{"role": "user"}], "message 0 must have text content"),
    "only an answer": ([{"role": "assistant", "content": "hi"}], "must have a user or system turn"),
    "half a character": ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_conversation_that_is_none_is_refused_before_the_engine_is_asked(guarded, name):
    messages, reason = BAD_MESSAGES[name]
    guard = guarded(guarded.steps("the cat"))
    with pytest.raises(RedflagError, match=reason):
        guard.stream(messages)
    assert not guarded.backend.prompts
