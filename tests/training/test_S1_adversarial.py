"""Adversarial training in embedding space: the search, the term, and that it makes the flag hold."""

from __future__ import annotations

import pytest
import torch
from terms import check_loss, moved_trainer, only, settings_of, split_log_probs, world
from tiny import make_rows

from redflag.training.adapter import lora_config
from redflag.training.adversarial import shifted, worst_shift
from redflag.training.encode import place
from redflag.training.trainer import RedFlagTrainer

SEARCH = dict(adversarial_steps=3, adversarial_step_size=0.02, adversarial_radius=0.08)


def loop_shift(loss_of, shape, where, steps, size, radius):
    """Token after token, coordinate after coordinate."""
    shift = torch.zeros(shape)
    for _ in range(steps):
        leaf = shift.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
        for t in range(shape[0]):
            for h in range(shape[1]):
                shift[t, h] += size * gradient[t, h].sign() if where[t] else 0.0
            length = shift[t].square().sum().sqrt()
            if length > radius:
                shift[t] *= radius / length
    return shift


@pytest.mark.parametrize("radius", [0.05, 0.4, 100.0])
def test_S1_6_the_search_equals_a_loop_over_tokens_and_stays_in_its_ball(radius):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 3, generator=generator)
    where = torch.tensor([True, True, False, True])

    def loss_of(shift):
        return ((shift - target) ** 3).sum()

    got = worst_shift(lambda s: loss_of(s[0]), where[None], 3, 5, 0.1, radius)
    torch.testing.assert_close(got[0], loop_shift(loss_of, (4, 3), where, 5, 0.1, radius))
    assert got.norm(dim=-1).max() <= radius + 1e-6 and not got[0, 2].any() and not got.requires_grad


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_S1_6_loss_and_gradients_equal_a_loop_over_responses(tmp_path, tokenizer, full, family):
    model, spec, data = world(tokenizer, make_rows(8), family=family)
    config = only(tmp_path, adversarial_coef=0.7, **SEARCH)
    trainer, _ = moved_trainer(tokenizer, model, spec, data, config, full)
    examples = list(data)

    def expected(net):
        terms = []
        for example in examples:
            placed = place(example, config.placement_config(), spec, config.seed, 0)
            ids, start = torch.tensor([placed.input_ids]), example["response_start"]
            flagged = [j for j, label in enumerate(placed.flag_labels) if label > 0]
            if not flagged:
                continue

            def loss_of(shift):
                with shifted(net, shift[None]):
                    z = net(input_ids=ids).logits[0]  # noqa: B023
                return [-split_log_probs(z[j - 1], spec)[0][placed.flag_labels[j]] for j in flagged]  # noqa: B023

            where = torch.arange(ids.shape[1]) < start
            shape = (ids.shape[1], model.config.hidden_size)
            shift = loop_shift(lambda s: sum(loss_of(s)), shape, where, 3, 0.02, 0.08)
            terms += loss_of(shift)
        return 0.7 * sum(terms) / len(terms)

    check_loss(trainer, examples, expected, rtol=1e-3)


def test_S1_6_the_shift_found_hides_the_flag_and_a_batch_without_harm_costs_nothing(tmp_path, tokenizer):
    model, spec, data = world(tokenizer, make_rows(12))
    config = only(tmp_path, adversarial_coef=1.0, **SEARCH)
    trainer, _ = moved_trainer(tokenizer, model, spec, data, config, True)
    values = []
    for harmful, radius in ((True, 0.08), (True, 0.0), (False, 0.08)):
        trainer.args.adversarial_radius = radius
        batch = trainer.data_collator([example for example in data if (example["flag_class"] > 0) == harmful])
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        values.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).item())
    attacked, clean, without = values
    assert attacked > clean > 0 and without == 0


@pytest.mark.slow
def test_S1_6_a_model_trained_so_keeps_its_flag_under_attack(tmp_path, tokenizer):
    settings = dict(adversarial_steps=5, adversarial_step_size=0.02, adversarial_radius=0.3)
    attacked = []
    for coefficient in (0.0, 2.0):
        model, spec, data = world(tokenizer, make_rows(24))
        config = settings_of(
            tmp_path / str(coefficient), adversarial_coef=coefficient, per_device_train_batch_size=12, max_steps=12,
            learning_rate=2e-2, keep_coef=0.5, placement="first", **settings,
        )  # fmt: skip
        judge = only(tmp_path, adversarial_coef=1.0, placement="first", **settings)
        torch.manual_seed(0)
        adapter = lora_config(model, spec, 8)
        trainer = RedFlagTrainer(model, config, spec, data, processing_class=tokenizer, peft_config=adapter)
        trainer.train()
        trainer.args = judge
        batch = trainer.data_collator(list(data))
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        trainer.model.train()
        attacked.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).item())
    assert attacked[1] < 0.7 * attacked[0], attacked
