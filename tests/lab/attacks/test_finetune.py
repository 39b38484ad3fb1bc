"""Fine-tuning as an attack: copies are trained, the flag is put back, the given model stays."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from tiny import build
from tiny_smollm2 import train_flag
from tiny_target import harmful_row, same_weights, tiny_target, tiny_tokenizer, weights

from redflag.backends.load import load_flagged, read_model
from redflag.errors import RedflagError
from redflag.flags import attach
from redflag.lab.attacks import Target
from redflag.lab.attacks.finetune import FineTune, add_difference, answer_loss, recorded_base
from redflag.training.adapter import lora_config

SMALL = dict(epochs=4, learning_rate=3e-3, batch=4, max_new_tokens=6)
ROWS = [harmful_row(i) for i in range(6)]


def with_adapter(model, spec):
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(model, spec, r=4))
    with torch.no_grad():  # A fresh adapter does nothing.
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


@pytest.fixture
def merged(tmp_path):
    """A flagged model whose folder names its base, as `redflag train --merge` leaves it."""
    target = tiny_target(0.5)
    base = tmp_path / "base"
    target.model.save_pretrained(base)
    target.tokenizer.save_pretrained(base)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.add_(0.01)
    (tmp_path / "train.json").write_text(json.dumps({"arguments": {"model": str(base)}}))
    target.model.name_or_path = str(tmp_path)
    return target, base


def test_the_loss_is_that_of_the_answers_tokens_alone():
    target = tiny_target()
    pairs = [([5, 6, 7], [8, 9]), ([5], [10, 11, 12])]
    with torch.no_grad():
        loss = answer_loss(target.model, pairs)
        by_hand = []
        for prompt, answer in pairs:
            logits = target.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            by_hand += [-logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-4)


def test_both_settings_are_attacked_and_the_given_model_is_unchanged_bit_by_bit(merged):
    target, _ = merged
    before = weights(target.model)
    backend = target.backend
    attempts = list(FineTune(**SMALL).run(target, ROWS[:2], 0))
    assert [(a.setting, a.request) for a in attempts] == [
        (setting, f"h{i}") for setting in ("fine-tuned", "flag re-attached") for i in (0, 1)
    ]
    for attempt in attempts:
        assert attempt.detail["loss"][1] < attempt.detail["loss"][0]
        assert attempt.messages == [ROWS[int(attempt.request[1])].messages[0]]
        assert len(attempt.flag_probs) == len(attempt.token_ids) > 0
        assert attempt.detail["trained_on"] == "the attacked rows"
    assert same_weights(target.model, before) and target.backend is backend
    assert all(parameter.grad is None for parameter in target.model.parameters())


def test_the_flags_difference_is_added_to_the_fine_tuned_base(merged):
    target, base = merged
    attack = FineTune(**SMALL)
    rendered = [(target.prompt_ids(row.messages[:1]), [8, 9, 10]) for row in ROWS[:2]]
    made, _ = attack._reattached(target.model, rendered, 0)
    tuned, _ = read_model(base)
    started = weights(tuned)
    attack.train(tuned, tuned, rendered, 0)
    flagged, moved = target.model.state_dict(), 0.0
    for key, value in made.state_dict().items():
        expected = flagged[key] + (tuned.state_dict()[key] - started[key])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        moved += (value - flagged[key]).abs().sum().item()
    assert moved > 0


def test_an_adapter_is_put_back_on_the_fine_tuned_base_as_it_was():
    target = tiny_target(0.5, wrap=with_adapter)
    before = weights(target.model)
    attack = FineTune(**SMALL)
    pairs = [(target.prompt_ids(row.messages[:1]), [8, 9, 10]) for row in ROWS[:2]]
    made, losses = attack._reattached(target.model, pairs, 0)
    after = made.state_dict()
    adapter = [key for key in before if "lora_" in key or "trainable_tokens" in key]
    assert adapter and all(torch.equal(after[key], before[key]) for key in adapter)
    assert not any(torch.equal(after[key], before[key]) for key in before if key not in adapter)  # all of the base
    assert losses[-1] < losses[0]
    assert same_weights(target.model, before)
    # The adapter is in force again, and was not while the base learnt.
    ids = torch.tensor([pairs[0][0]])
    with torch.no_grad():
        on = made(input_ids=ids).logits
        with made.disable_adapter():
            off = made(input_ids=ids).logits
            assert answer_loss(made, pairs).item() < losses[0]
    assert not torch.equal(on, off)


def test_an_adapters_model_is_attacked_in_both_settings_and_stays():
    target = tiny_target(0.5, wrap=with_adapter)
    before = weights(target.model)
    needed = [p.requires_grad for p in target.model.parameters()]
    attempts = list(FineTune(**SMALL, rows=ROWS[2:]).run(target, ROWS[:1], 0))
    assert [a.setting for a in attempts] == ["fine-tuned", "flag re-attached"]
    assert attempts[0].detail["trained_on"] == "other rows" and attempts[0].detail["rows"] == 4
    assert same_weights(target.model, before)
    assert [p.requires_grad for p in target.model.parameters()] == needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["merged in memory", "apart"])
def test_a_folders_adapter_is_put_back_on_the_fine_tuned_base(tmp_path, dtype):
    target, words = tiny_target(), copy.deepcopy(tiny_tokenizer())
    build("llama", len(words)).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    backend, words, spec = load_flagged(train_flag(tmp_path / "flag", tmp_path / "base"), None, dtype)
    target = Target(backend, words, spec, None, model=backend.model)
    before = weights(target.model)
    assert [a.setting for a in FineTune(**SMALL).run(target, ROWS[:1], 0)] == ["fine-tuned", "flag re-attached"]
    assert same_weights(target.model, before)

    attack = FineTune(**SMALL)
    pairs = [(target.prompt_ids(row.messages[:1]), [8, 9, 10]) for row in ROWS[:2]]
    made, losses = attack._reattached(target.model, pairs, 0)
    base, _ = read_model(tmp_path / "base", dtype)
    attach(base, copy.deepcopy(words), spec)
    assert losses == pytest.approx(attack.train(base, base, pairs, 0), rel=0.02)
    assert losses[-1] < losses[0]
    was, layers = dict(target.model.named_modules()), 0
    learnt = dict(base.named_modules())
    for name, layer in made.named_modules():
        if isinstance(layer, LoraLayer):
            layers += 1
            assert layer.merged == was[name].merged == (dtype == torch.float32)
            added = layer.get_delta_weight("default") if layer.merged else 0.0
            torch.testing.assert_close(layer.base_layer.weight - added, learnt[name].weight, rtol=0.02, atol=2e-3)
    assert layers


def test_without_a_known_base_nothing_is_re_attached():
    target = tiny_target()
    assert recorded_base(target.model) is None
    assert [a.setting for a in FineTune(**SMALL).run(target, ROWS[:1], 0)] == ["fine-tuned"]


def test_rows_that_only_the_flagged_model_has_stay_as_they_are():
    model = torch.nn.Embedding(4, 2)
    before, after = {"weight": torch.zeros(3, 2)}, {"weight": torch.ones(3, 2)}
    made = add_difference(model, before, after)
    torch.testing.assert_close(made.weight[:3], model.weight[:3] + 1)
    assert torch.equal(made.weight[3], model.weight[3])
    with pytest.raises(RedflagError, match="base must be the model that the flags were trained on"):
        add_difference(model, {"weight": torch.zeros(3, 5)}, {"weight": torch.zeros(3, 5)})


def test_the_same_seed_gives_the_same_model(merged):
    target, _ = merged
    first, second = (list(FineTune(**SMALL).run(target, ROWS[:2], 3)) for _ in "ab")
    assert first == second


def test_what_cannot_be_done_is_refused():
    with pytest.raises(RedflagError, match="rows must hold harmful rows to fine-tune on"):
        next(FineTune(rows=[]).run(tiny_target(), ROWS, 0))
    target = Target(object(), tiny_tokenizer(), tiny_target().spec)
    with pytest.raises(RedflagError, match="needs the target's weights"):
        next(FineTune().run(target, ROWS, 0))
