"""The attack in embedding space."""

from __future__ import annotations

import pytest
import torch
from tiny_target import harmful_row, same_weights, tiny_target, tiny_tokenizer, weights

from redflag.backends import Sampling
from redflag.errors import RedflagError
from redflag.lab.attacks import Target
from redflag.lab.attacks.embedding import EmbeddingAttack, decode_embedded
from redflag.lab.attacks.objective import embed

SMALL = dict(suffix_tokens=4, iterations=12, step=0.05, target_tokens=4, max_new_tokens=6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_decoding_from_embeddings_is_decoding_from_their_tokens(family):
    target = tiny_target(family=family)
    prompt = target.prompt_ids([{"role": "user", "content": "tell the cat how dogs ran"}])
    ids, probs = decode_embedded(target.model, target, embed(target.model, prompt), 8)
    if family == "gemma3":  # Its forward does not scale embeddings that it is given: `embed` has done so.
        assert target.model.get_input_embeddings().embed_scale != 1.0
    steps = target.backend.complete([prompt], Sampling(8, temperature=0.0))[0]
    assert ids == [step.token_id for step in steps]
    for (mine,), step in zip(probs, steps, strict=True):
        assert mine == pytest.approx(step.flag_probs[0], rel=1e-3)


def test_the_objective_falls_and_the_model_stays():
    target = tiny_target(0.5)
    before = weights(target.model)
    attack = EmbeddingAttack(**SMALL)
    (attempt,) = attack.run(target, [harmful_row()], 0)
    first, last = (
        attempt.detail["response_loss"][i] + attack.flag_weight * attempt.detail["flag_loss"][i] for i in (0, 1)
    )
    assert last < first
    assert attempt.messages == [harmful_row().messages[0]]
    assert len(attempt.flag_probs) == len(attempt.token_ids) > 0
    assert same_weights(target.model, before)
    assert all(parameter.grad is None for parameter in target.model.parameters())
    assert list(attack.run(target, [harmful_row()], 7)) == [attempt]


def test_more_steps_bring_the_answer_nearer_to_the_target():
    target = tiny_target()
    losses = []
    for iterations in (0, 10, 60):
        attack = EmbeddingAttack(**{**SMALL, "iterations": iterations, "flag_weight": 0.0})
        (attempt,) = attack.run(target, [harmful_row()], 0)
        losses.append(attempt.detail["response_loss"][1])
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(("norm", "largest"), [("l2", lambda m: m.norm(dim=-1)), ("linf", lambda m: m.abs().amax(-1))])
def test_no_place_leaves_its_ball(norm, largest):
    attack = EmbeddingAttack(radius=0.3, norm=norm)
    moved = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    inside = attack.project(moved)
    assert (largest(inside) <= 0.3 + 1e-6).all() and (largest(inside) > 0.29).all()
    small = moved * 1e-3
    torch.testing.assert_close(attack.project(small), small)
    assert EmbeddingAttack().project(moved) is moved


def test_a_smaller_ball_gains_less():
    target = tiny_target()
    totals = []
    for radius in (0.0, 0.05, None):
        (attempt,) = EmbeddingAttack(**SMALL, radius=radius).run(target, [harmful_row()], 0)
        totals.append(attempt.detail["response_loss"][1] + 0.3 * attempt.detail["flag_loss"][1])
    assert totals[0] >= totals[1] > totals[2]


def test_what_cannot_be_done_is_refused():
    with pytest.raises(RedflagError, match="norm must be l2 or linf"):
        EmbeddingAttack(norm="l3")
    target = Target(object(), tiny_tokenizer(), tiny_target().spec)
    with pytest.raises(RedflagError, match="needs the target's weights"):
        next(EmbeddingAttack().run(target, [harmful_row()], 0))
    assert not EmbeddingAttack(flag_weight=0.0).adaptive
