"""AutoRAP: examples as the paper draws them, a helper that learns, a chooser with the paper's rules."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import TEXT
from tiny_target import harmful_row, same_weights, tiny_target, tiny_tokenizer, weights

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.attacks import Target
from redflag.lab.attacks.autorap import HARMFUL, REFUSAL, AutoRAP, Helper, Sample, example, helper_chooser

SMALL = dict(k=10, budget=12, prefill_tokens=2, max_new_tokens=5, train_rows=8, starters=3, refusals=2, epochs=2)
WORDS = TEXT.split()


def rows(count=8):
    return [harmful_row(i, " ".join(WORDS[i : i + 8])) for i in range(count)]


def test_an_example_is_a_cut_answer_or_one_with_the_beginning_of_a_refusal():
    sample = Sample([1, 2], list(range(10, 40)), [[50, 51, 52, 53, 54, 55, 56], [60]])
    rng = random.Random(0)
    drawn = [example(sample, tiny_tokenizer(), rng, 10) for _ in range(400)]
    labels = [label for _, label in drawn]
    assert 150 < sum(label == HARMFUL for label in labels) < 250
    for ids, label in drawn:
        assert ids[:2] == [1, 2]
        answer = [token for token in ids[2:] if token < 50]
        refusal = [token for token in ids[2:] if token >= 50]
        assert answer == list(range(10, 10 + len(answer)))
        assert bool(refusal) == (label == REFUSAL) and len(refusal) <= 5
        assert refusal in ([50, 51, 52, 53, 54, 55, 56][: len(refusal)], [60][: len(refusal)])
        assert len(answer) >= 10 or tiny_tokenizer().decode(answer[-1:]).strip() in tuple(".,;:!?")


def test_a_harmless_answer_is_a_refusal_wherever_it_is_cut():
    sample = Sample([1], [], [[7, 8, 9]])
    drawn = [example(sample, tiny_tokenizer(), random.Random(i), 10) for i in range(40)]
    assert {tuple(ids) for ids, _ in drawn} == {(1, 7), (1, 7, 8), (1, 7, 8, 9)}
    assert {label for _, label in drawn} == {REFUSAL}


def test_refusals_begin_with_tokens_that_stand_behind_several_cuts_and_are_the_targets_own():
    target = tiny_target()
    attack = AutoRAP(**SMALL)
    samples = attack.samples(target, rows(), random.Random(0))
    assert len(samples) == 8
    starters = {refusal[0] for sample in samples for refusal in sample.refusals}
    assert 1 <= len(starters) <= 3 and not starters & set(target.spec.ids)
    assert all(len(sample.refusals) <= 2 for sample in samples)
    for sample in samples:
        assert all(1 <= len(refusal) <= attack.refusal_tokens for refusal in sample.refusals)


def test_the_helper_learns_and_the_target_stays():
    target = tiny_target()
    before = weights(target.model)
    state = torch.random.get_rng_state()
    harmless = [
        Row([harmful_row(i).messages[0], {"role": "assistant", "content": "x x x x x x"}], id=f"b{i}") for i in range(8)
    ]
    attack = AutoRAP(**{**SMALL, "epochs": 12, "learning_rate": 3e-3, "refusals": 1})
    helper, accuracy = attack.train(target, rows() + harmless, 0)
    assert accuracy > 0.6
    prompt = target.prompt_ids(harmful_row(1).messages[:1])
    ids = target.tokenizer(" x x x x", add_special_tokens=False)["input_ids"]
    burn = target.tokenizer(" ".join(WORDS[1:7]), add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        margins = helper.margins([prompt + ids, prompt + burn])
    assert margins[0] < margins[1]
    assert same_weights(target.model, before)
    assert all(parameter.grad is None for parameter in target.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("text", [[5, 6, 7], [5, 6, 7, 8], [5, 6], [5, 9]])
def test_candidates_are_judged_as_whole_texts_are(text):
    target = tiny_target()
    helper = Helper.of(target, None, 0)
    helper.harmful([5, 6, 7, 8, 9], [1, 2])  # leaves a cache behind
    with torch.inference_mode():
        whole = helper.margins([[*text, token] for token in (11, 12, 13)]) > 0
    assert helper.harmful(text, [11, 12, 13]) == whole.tolist()


class Says:
    """A helper that calls some tokens harmful, and counts its calls."""

    def __init__(self, *harmful):
        self.tokens, self.calls = harmful, []

    def harmful(self, token_ids, candidates):
        self.calls.append(list(candidates))
        return [token in self.tokens for token in candidates]


def test_the_chooser_takes_the_most_likely_harmful_candidate_and_looks_no_further_than_it_must():
    target = tiny_target()
    helper = Says(23, 26)
    choose = helper_chooser(helper, target, at_once=2)
    assert choose([1], [], [20, 21, 22, 23, 24, 26]) == 3
    assert helper.calls == [[20, 21], [22, 23]]
    assert choose([1], [], [20, 21]) is None


def test_no_third_token_that_reads_like_the_two_before_it():
    choose = helper_chooser(Says(23, 26), tiny_target())
    assert choose([1], [23], [23, 26]) == 0
    assert choose([1], [23, 23], [23, 26]) == 1
    assert choose([1], [26, 23], [23, 26]) == 0
    assert choose([1], [23, 23], [23]) is None


def test_a_helper_of_another_family_reads_the_text(tmp_path):
    from guards import make_model, make_tokenizer

    target = tiny_target()
    tokenizer = make_tokenizer("wildguard")
    make_model("wildguard", len(tokenizer), tokenizer.eos_token_id).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    helper = Helper.of(target, tmp_path, 0)
    ids = target.tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(helper.encode(ids)) == target.tokenizer.decode(ids)
    assert len(helper.harmful(ids, [20, 21, 22])) == 3
    mine = tmp_path / "mine"
    target.model.save_pretrained(mine)
    target.tokenizer.save_pretrained(mine)
    assert Helper.of(target, mine, 0).encode(ids) == ids


def test_the_whole_attack_is_the_same_for_the_same_seed():
    target = tiny_target(0.9)
    attack = AutoRAP(**SMALL)
    first, second = (list(attack.run(target, rows(6), 0)) for _ in "ab")
    assert first == second
    assert len(first) == 12
    assert all(attempt.queries <= 12 for attempt in first)
    assert first[0].detail["helper_trained_on"] == "the attacked rows"


def test_too_few_rows_and_missing_weights_are_refused():
    with pytest.raises(RedflagError, match="are needed to train a helper"):
        next(AutoRAP(**SMALL).run(tiny_target(), rows(2), 0))
    target = Target(object(), tiny_tokenizer(), tiny_target().spec)
    with pytest.raises(RedflagError, match="AutoRAP needs the target's weights"):
        next(AutoRAP(**SMALL).run(target, rows(), 0))
