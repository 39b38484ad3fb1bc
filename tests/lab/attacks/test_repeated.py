"""Asking again and again: so many draws, all different, the same ones for the same seed."""

from __future__ import annotations

import pytest
from attacking import make_row, make_target

from redflag.errors import RedflagError
from redflag.lab.attacks.buildup import BuildUp
from redflag.lab.attacks.sampling import Plain, RepeatedSampling

ROWS = [make_row("r0"), make_row("r1")]


def speak(text: str, seed: int) -> str:
    return f"answer {seed}"


def test_every_request_is_asked_n_times_at_each_temperature_with_seeds_of_its_own():
    target = make_target(speak)
    attempts = list(RepeatedSampling(n=3, temperatures=(0.5, 2.0)).run(target, ROWS, 10))
    assert [(a.request, a.detail["draw"]) for a in attempts] == [
        (r, d) for _ in "ab" for r in ("r0", "r1") for d in range(3)
    ]
    assert [a.setting for a in attempts[::6]] == ["best of 3, temperature 0.5", "best of 3, temperature 2"]
    assert len({a.text for a in attempts}) == 12
    assert [s.temperature for s in target.backend.samplings] == [0.5, 2.0]
    again = list(RepeatedSampling(n=3, temperatures=(0.5, 2.0)).run(make_target(speak), ROWS, 10))
    assert again == attempts


@pytest.mark.parametrize("options", [{"n": 0}, {"temperatures": ()}, {"temperatures": (0.0, 1.0)}])
def test_drawing_nothing_is_refused(options):
    with pytest.raises(RedflagError, match="n must be at least 1 and temperatures above 0"):
        RepeatedSampling(**options)


def test_no_attack_sends_the_requests_as_they_are():
    target = make_target()
    attempts = list(Plain().run(target, ROWS, 0))
    assert [(a.request, a.setting) for a in attempts] == [
        ("r0", "greedy"),
        ("r1", "greedy"),
        ("r0", "temperature 1"),
        ("r1", "temperature 1"),
    ]
    assert all(a.messages == row.messages[:-1] for a, row in zip(attempts, ROWS * 2, strict=True))
    assert target.backend.samplings[0].greedy


def test_a_backend_that_only_streams_is_asked_one_by_one_with_the_same_seeds():
    batched, streamed = make_target(speak), make_target(speak)
    backend = streamed.backend

    class Streaming:
        eos_ids = backend.eos_ids
        context_length = None

        def stream(self, prompt, sampling):
            return iter(backend._steps(prompt, sampling, 0))

    streamed.backend = Streaming()
    attack = RepeatedSampling(n=2, temperatures=(1.0,))
    assert list(attack.run(streamed, ROWS, 5)) == list(attack.run(batched, ROWS, 5))


def test_build_up_carries_the_targets_own_answers_along():
    target = make_target(lambda text, seed: f"reply {text.count('<|user|>')}")
    steps = ("About {request}", "Go on.", "{request}")
    attempts = list(BuildUp(steps=steps).run(target, ROWS, 0))
    assert [(a.setting, a.request) for a in attempts] == [(f"turn {n}", r) for n in (1, 2, 3) for r in ("r0", "r1")]
    last = attempts[-1]
    asked = ROWS[1].messages[0]["content"]
    assert [turn["content"] for turn in last.messages] == [f"About {asked}", "reply 1", "Go on.", "reply 2", asked]
    assert [turn["role"] for turn in last.messages] == ["user", "assistant"] * 2 + ["user"]
    assert (last.text, last.queries) == ("reply 3", 1)
    assert target.backend.batches == [2, 2, 2]


def test_build_up_ends_where_the_context_does():
    target = make_target("word " * 30)
    target.backend.context_length = 130
    attempts = list(BuildUp(steps=("{request}",) * 9).run(target, ROWS[:1], 0))
    assert 1 <= len(attempts) < 9
    assert all(len(target.prompt_ids(a.messages)) + 16 <= 130 for a in attempts)
