from __future__ import annotations

import itertools

import pytest

from redflag.backends import Sampling
from redflag.backends.scripted import ScriptedBackend
from redflag.trace import Step

STEPS = [Step(3, (0.1,)), Step(4, (0.2,)), Step(1, (0.3,)), Step(5, (0.4,))]


def test_it_stops_after_the_end_of_sequence():
    assert list(ScriptedBackend(STEPS, eos_ids={1}).stream([9], Sampling())) == STEPS[:3]


@pytest.mark.parametrize("error", [None, TimeoutError("slow"), KeyboardInterrupt()])
def test_it_fails_after_the_steps_it_was_told(error):
    backend = ScriptedBackend(STEPS, fail_at=2, error=error)
    stream = backend.stream([9], Sampling())
    assert [next(stream), next(stream)] == STEPS[:2]
    with pytest.raises(type(error) if error is not None else ConnectionError):
        next(stream)
    assert backend.open_streams == 0


def test_it_knows_whether_it_was_closed():
    backend = ScriptedBackend(lambda prompt, sampling: (Step(i, (0.0,)) for i in itertools.count()))
    stream = backend.stream([9], Sampling())
    assert (next(stream).token_id, next(stream).token_id) == (0, 1)
    assert (backend.open_streams, backend.closed_early) == (1, 0)
    stream.close()
    assert (backend.open_streams, backend.closed_early) == (0, 1)


def test_it_remembers_the_prompts_in_order():
    backend = ScriptedBackend(STEPS)
    for prompt in ([1, 2], [3]):
        list(backend.stream(prompt, Sampling(max_new_tokens=1)))
    assert backend.prompts == [(1, 2), (3,)]
