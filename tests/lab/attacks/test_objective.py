"""What adaptive attacks minimise, by hand and by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_target import harmful_row, tiny_target

from redflag.errors import RedflagError
from redflag.lab.attacks.gcg import SuffixScorer
from redflag.lab.attacks.objective import GOAL, Harm, Parts, embed, parts, target_logits


def test_the_objective_by_hand():
    # Four tokens, the last a flag; target token 1; positions before and behind it.
    logits = torch.log(torch.tensor([[[1.0, 2.0, 1.0, 4.0], [1.0, 1.0, 1.0, 27.0]]]))
    found = parts(logits, torch.tensor([1]), torch.tensor([3]), goal=0.0)
    assert found.response.item() == pytest.approx(math.log(2))  # 2 of the 4 that are left without the flag
    assert found.flags.item() == pytest.approx((math.log(4 / 4) + math.log(27 / 3)) / 2)
    assert found.total(0.5).item() == pytest.approx(math.log(2) + 0.5 * math.log(9) / 2)
    assert found.total(0.0).item() == pytest.approx(math.log(2))
    assert parts(logits, torch.tensor([1]), torch.tensor([3]), goal=9.0).flags.item() == 0.0  # low enough


def test_several_flags_count_together():
    logits = torch.log(torch.tensor([[[1.0, 1.0, 3.0, 5.0]] * 2]))
    found = parts(logits, torch.tensor([0]), torch.tensor([2, 3]), goal=0.0)
    assert found.flags.item() == pytest.approx(math.log(8 / 2))
    assert found.response.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_gradient_is_that_of_finite_differences(weight):
    target = tiny_target()
    harm = Harm(target, harmful_row(), " x x x", 4)
    before, behind = embed(target.model, harm.before), embed(target.model, [*harm.after, *harm.target])

    def objective(embeds):
        logits = target_logits(target.model, torch.cat([before, embeds, behind])[None], len(harm.target))
        # Without the kink of the goal, at which differences straddle two slopes.
        return parts(logits, torch.tensor(harm.target), torch.tensor(target.spec.ids), goal=-50.0).total(weight)[0]

    embeds = embed(target.model, harm.suffix).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(embeds), embeds)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        direction = torch.randn(embeds.shape, generator=generator)
        with torch.no_grad():
            slope = (objective(embeds + 5e-3 * direction) - objective(embeds - 5e-3 * direction)) / 1e-2
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=0.02, abs=2e-3)


def test_a_tokens_gradient_is_its_embeddings_part_in_it():
    target = tiny_target()
    harm = Harm(target, harmful_row(), " x x", 3)
    scorer = SuffixScorer(target.model, target, harm)
    ids = torch.tensor(harm.suffix)
    scores = scorer.token_gradient(ids, 0.5)
    embeds = embed(target.model, harm.suffix).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.of(embeds[None]).total(0.5)[0], embeds)
    assert scores.shape == (len(ids), target.model.get_input_embeddings().weight.shape[0])
    torch.testing.assert_close(scores[1, 7], gradient[1] @ embed(target.model, [7])[0])


def test_candidates_side_by_side_score_as_alone():
    target = tiny_target(batch_size=2)
    harm = Harm(target, harmful_row(), " x x", 3)
    scorer = SuffixScorer(target.model, target, harm)
    tried = torch.tensor([harm.suffix, [*harm.suffix[:-1], 9], [*harm.suffix[:-1], 11]])
    together = scorer.parts(tried)
    for i, row in enumerate(tried):
        alone = scorer.parts(row[None])
        torch.testing.assert_close(together.response[i], alone.response[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.flags[i], alone.flags[0], rtol=1e-4, atol=1e-4)
    assert isinstance(together, Parts) and GOAL < 0


def test_a_suffix_survives_only_if_the_guard_renders_it_as_the_same_tokens():
    target = tiny_target()
    harm = Harm(target, harmful_row(), " x x x", 4)
    assert [*harm.before, *harm.suffix, *harm.after] == target.prompt_ids(harm.messages(" x x x"))
    assert harm.survives(harm.suffix)
    assert not harm.survives([*harm.suffix[:-1], target.spec.ids[0]])  # a flag is taken apart
    assert not harm.survives([*harm.suffix[:-1], *next(iter([list(target.backend.eos_ids)]))])
    assert target.decode(harm.target) == harmful_row().response[: len(target.decode(harm.target))]


def test_a_suffix_that_cannot_be_found_in_the_prompt_is_refused():
    with pytest.raises(RedflagError, match="must keep its tokens in the prompt"):
        Harm(tiny_target(), harmful_row(), "", 4)
