"""RAP on real weights: what is offered, what is measured, what gets out."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_target import harmful_row, same_weights, tiny_target, tiny_tokenizer, weights

from redflag.backends import Sampling
from redflag.backends.load import load_flagged
from redflag.data.rows import load_rows
from redflag.errors import RedflagError
from redflag.lab.attacks import Target
from redflag.lab.attacks.rap import RAP, follow_oracle, start_of
from redflag.lab.attacks.search import GuardInLoop
from redflag.lab.attacks.stepping import Looker, Stepper, look_at
from redflag.lab.nano.spans import harmful_spans
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds


def most_likely(target, plan, prefill):
    return lambda prompt, response, candidates: 0 if candidates else None


def test_candidates_are_the_k_most_likely_tokens_without_flags_and_flags_are_measured_all_the_same():
    logits = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    look = look_at(logits, torch.tensor([2, 3]), 2)
    assert look.candidates == (4, 0)
    assert look.flag_probs == pytest.approx(torch.softmax(logits, -1)[[2, 3]].tolist())
    assert look_at(logits, torch.tensor([2, 3]), 20).candidates == (4, 0, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_text_that_grows_and_shrinks_has_the_logits_of_a_fresh_run(family):
    target = tiny_target(family=family)
    stepper = Stepper(target.model)
    for ids in ([5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 9], [5, 6], [5, 6, *range(10, 22)], [5, 6, 10], [3]):
        with torch.inference_mode():
            fresh = target.model(input_ids=torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(stepper.logits(ids), fresh.float(), atol=2e-4, rtol=2e-4)


def test_each_position_costs_one_forward_pass():
    target = tiny_target()
    look = Looker(target, "RAP", 20)
    attempt = next(RAP(chooser=most_likely, max_new_tokens=6).run(target, [harmful_row()], 0))
    assert len(attempt.token_ids) <= 6
    prompt = target.prompt_ids(attempt.messages)
    for end in range(len(attempt.token_ids)):
        look(prompt + attempt.token_ids[:end])
    assert look._stepper.passes == len(attempt.token_ids)


def test_always_taking_the_first_candidate_is_greedy_decoding_with_the_guards_measurements():
    target = tiny_target()
    row = harmful_row()
    (attempt,) = RAP(chooser=most_likely, max_new_tokens=8).run(target, [row], 0)
    steps = target.backend.complete([target.prompt_ids(attempt.messages)], Sampling(8, temperature=0.0))[0]
    assert attempt.token_ids == [step.token_id for step in steps]
    for (mine,), step in zip(attempt.flag_probs, steps, strict=True):
        assert mine == pytest.approx(step.flag_probs[0], rel=1e-3)
    assert (attempt.setting, attempt.released, attempt.queries) == ("k=20, unguarded", None, len(steps))


def test_the_guard_is_in_the_loop_where_there_are_thresholds():
    row = harmful_row()
    free, held = RAP(chooser=most_likely, max_new_tokens=6).run(tiny_target(1e-9), [row], 0)
    assert free.text and free.released is None and not free.detail["guarded"]
    assert (held.text, held.released, held.queries) == ("", "", 0)
    assert held.detail["end"] == "stopped" and held.detail["alarms"] == 1
    json.dumps(held.detail)
    _, passed = RAP(chooser=most_likely, max_new_tokens=6).run(tiny_target(1.0), [row], 0)
    assert passed.released == passed.text == free.text and passed.detail["alarms"] == 0


def test_released_text_is_every_branch_that_was_shown():
    target = tiny_target(1.0)
    ends = next(iter(target.backend.eos_ids))

    def restless(target, plan, prefill):  # Two tokens, back to the beginning, two others.
        def choose(prompt, response, candidates):
            first = len(response) == 0 or (len(response) == 1 and candidates[0] not in seen)
            seen.update(candidates[:1])
            return 0 if first and candidates[0] != ends else None

        seen = set()
        return choose

    _, held = RAP(chooser=restless, max_new_tokens=4, budget=6).run(target, [harmful_row()], 0)
    branches = held.detail["branches"]
    assert len(branches) > 1
    assert set(held.released.split("\n")) == {target.decode(branch) for branch in branches}


def test_a_plan_is_followed_as_far_as_its_tokens_are_on_offer():
    target = tiny_target()
    row = harmful_row(response="fish")
    (attempt,) = RAP(k=10_000, budget=50).run(target, [row], 0)
    assert attempt.text == "fish" and attempt.detail["end"] == "finished"
    (attempt,) = RAP(k=1, budget=50).run(target, [row], 0)
    assert attempt.text == "" and attempt.detail["end"] == "exhausted"


def test_a_prefill_is_the_beginning_of_the_harm_and_the_plan_goes_on_from_there():
    target = tiny_target()
    row = harmful_row()
    start = start_of(target, row, 3)
    assert start.messages[-1] == {"role": "assistant", "content": start.prefill}
    assert row.response.startswith(start.prefill) and start.prefill
    assert start.prefill + target.decode(start.plan) == row.response
    assert start_of(target, row, 0).messages[-1]["role"] == "user"


def test_the_same_search_twice_and_an_unchanged_model():
    target = tiny_target(0.9)
    before = weights(target.model)
    attack = RAP(chooser=most_likely, max_new_tokens=5, prefills=(0, 2))
    first, second = (list(attack.run(target, [harmful_row(), harmful_row(1)], seed)) for seed in (0, 1))
    assert first == second and len(first) == 8
    assert same_weights(target.model, before)


def test_without_weights_it_is_refused_before_any_work():
    target = Target(object(), tiny_tokenizer(), tiny_target().spec)
    with pytest.raises(RedflagError, match="RAP needs the target's weights"):
        next(RAP().run(target, [harmful_row()], 0))


def test_in_the_nano_world_the_search_finds_harm_and_the_guard_sees_its_alarms_obeyed(nano):
    backend, tokenizer, spec = load_flagged(nano / "model", device=None)
    thresholds = Thresholds.load(nano / "model")
    target = Target(backend, tokenizer, spec, thresholds, Policy(hold_back=4), backend._model)
    rows = [row for row in load_rows(nano / "rows" / "test.jsonl") if row.source == "nano:direct"][:4]
    attempts = list(RAP(chooser=follow_oracle, budget=64, prefills=(0, 3), max_new_tokens=40).run(target, rows, 0))
    free, held = attempts[::2], attempts[1::2]
    assert len(free) == len(held) == 8
    found = [harmful_spans(a.messages[-1]["content"] + a.text if len(a.messages) > 1 else a.text) for a in free]
    assert sum(map(bool, found)) >= 6
    assert all(attempt.queries <= 64 for attempt in attempts)
    guard = GuardInLoop(target.thresholds, target.policy, target.spec.categories)
    for attempt in held:
        for probs, tokens in zip(attempt.detail["alarm_probs"], attempt.detail["branches"], strict=True):
            if probs is not None:
                assert guard.refuses([probs])
                assert target.decode(tokens) not in attempt.released.split("\n") or not tokens
