"""What every backend keeps to, whatever engine is behind it."""

from __future__ import annotations

import math

import pytest

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.backends.scripted import ScriptedBackend
from redflag.errors import RedflagError
from redflag.trace import Step

PROMPT = [20, 30, 40, 50, 60]


@pytest.fixture(params=["scripted", "llama", "llama-tied", "qwen3", "gemma3", "gemma3-capped"])
def any_backend(request, built, tokenizer, spec):
    if request.param == "scripted":
        steps = [Step(10 + i, (0.01 * i, 0.5)) for i in range(40)]
        return ScriptedBackend(steps, eos_ids={1}, context_length=64)
    return HFBackend(built[request.param], tokenizer, spec)


def test_steps_hold_plain_numbers_one_probability_per_flag(any_backend):
    steps = list(any_backend.stream(PROMPT, Sampling(max_new_tokens=6, seed=0)))
    assert 1 <= len(steps) <= 6
    for step in steps:
        assert type(step) is Step and type(step.token_id) is int
        assert len(step.flag_probs) == 2
        assert all(type(p) is float and 0.0 <= p <= 1.0 for p in step.flag_probs)


def test_no_more_tokens_than_asked_for(any_backend):
    for limit in (1, 2, 7):
        assert len(list(any_backend.stream(PROMPT, Sampling(max_new_tokens=limit, seed=3)))) <= limit


def test_same_seed_same_response(any_backend):
    sampling = Sampling(max_new_tokens=12, seed=5)
    first, second = (list(any_backend.stream(PROMPT, sampling)) for _ in range(2))
    assert [step.token_id for step in first] == [step.token_id for step in second]


def test_only_the_last_step_may_be_the_end_of_sequence(any_backend):
    for seed in range(10):
        tokens = [step.token_id for step in any_backend.stream(PROMPT, Sampling(max_new_tokens=20, seed=seed))]
        assert not any(token in any_backend.eos_ids for token in tokens[:-1])


def test_closing_early_then_streaming_again_gives_the_whole_response(any_backend):
    sampling = Sampling(max_new_tokens=10, seed=1)
    whole = [step.token_id for step in any_backend.stream(PROMPT, sampling)]
    for taken in range(4):
        stream = any_backend.stream(PROMPT, sampling)
        begun = [next(stream).token_id for _ in range(min(taken, len(whole)))]
        stream.close()
        assert list(stream) == []
        assert begun == whole[:taken]
    assert [step.token_id for step in any_backend.stream(PROMPT, sampling)] == whole


def test_interleaved_streams_do_not_disturb_each_other(any_backend):
    prompts = [PROMPT, [*PROMPT[:3], 70, 80]]
    sampling = Sampling(max_new_tokens=8, seed=2)
    alone = [list(any_backend.stream(prompt, sampling)) for prompt in prompts]
    streams = [any_backend.stream(prompt, sampling) for prompt in prompts]
    together: list[list[Step]] = [[], []]
    for _ in range(8):
        for stream, steps in zip(streams, together, strict=True):
            steps.extend(step for step in [next(stream, None)] if step is not None)
    for one, other in zip(alone, together, strict=True):
        assert [step.token_id for step in one] == [step.token_id for step in other]
        for left, right in zip(one, other, strict=True):
            assert left.flag_probs == pytest.approx(right.flag_probs, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [([], "no tokens"), ([20] * 64, "64 tokens"), ([20] * 100, "100 tokens")],
)
def test_a_prompt_that_cannot_be_continued_is_refused_at_once(any_backend, prompt, named):
    with pytest.raises(RedflagError, match=named):
        any_backend.stream(prompt, Sampling())


def test_a_response_stops_at_the_end_of_the_context(any_backend):
    for seed in range(5):
        steps = list(any_backend.stream([20] * 60, Sampling(max_new_tokens=50, seed=seed)))
        assert len(steps) == 4 or steps[-1].token_id in any_backend.eos_ids


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"stop": "text"},
        {"stop": ("",)},
    ],
)
def test_sampling_options_outside_their_range_are_refused_by_name(wrong):
    with pytest.raises(RedflagError, match=next(iter(wrong))):
        Sampling(**wrong)
