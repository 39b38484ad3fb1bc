"""What counts as a verdict, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from redflag.judges import UnansweredError, Verdict, as_verdict, exchange


@pytest.mark.parametrize(
    ("value", "harm"),
    [
        (True, 1.0),
        (False, 0.0),
        (0, 0.0),
        (1, 1.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (torch.tensor(0.75), 0.75),
        (Verdict(0.5, "why"), 0.5),
    ],
)
def test_numbers_and_bools_are_verdicts(value, harm):
    assert as_verdict(value).harm == harm
    assert as_verdict(value).harmful == (harm >= 0.5)


@pytest.mark.parametrize(
    "value",
    [None, "harmless", "0", b"0", math.nan, math.inf, -0.1, 1.1, -math.inf, [], {}, object(), 1j, 10**400],
    ids=lambda value: repr(value)[:20],
)
def test_nothing_else_is(value):
    with pytest.raises(ValueError):
        as_verdict(value)
    if isinstance(value, float):
        with pytest.raises(ValueError):
            Verdict(value)


def test_a_prefill_is_the_beginning_of_the_answer():
    user, prefill = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "Sure"}
    assert exchange([user, prefill], ", so") == ([user], "Sure, so")
    assert exchange([user], "so") == ([user], "so")
    assert exchange([prefill, user], "so") == ([prefill, user], "so")
    assert exchange((), "so") == ([], "so")


def test_tool_turns_are_told_to_a_judge_as_the_users_and_the_assistants_words():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns, answer = exchange(
        [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "tool", "content": "3", "tool_call_id": "c2"},
        ],
        "Five.",
    )
    assert answer == "Five."
    assert turns == [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": '[calls add: {"a": 1}]\n[calls add: {"a": 1}]'},
        {"role": "user", "content": "[result of a tool: 2]\n[result of a tool: 3]"},
    ]


@pytest.mark.parametrize("answer", ["", " \n"])
def test_nothing_is_harmless_before_it_is_written(answer):
    with pytest.raises(UnansweredError):
        exchange([{"role": "user", "content": "Q"}], answer)
