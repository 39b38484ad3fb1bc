"""The reference's hidden states, kept on disk over passes and runs."""

from __future__ import annotations

import pytest
import torch
from tiny import build, make_rows

from redflag.flags import FlagSpec, attach
from redflag.kept_states import KeptStates, row_keys
from redflag.training import reference
from redflag.training.adapter import lora_config
from redflag.training.encode import encode
from redflag.training.trainer import RedFlagConfig, RedFlagTrainer


@pytest.fixture
def passes(monkeypatch):
    """Counts the reference's forward passes."""
    calls = []
    real = reference.last_hidden
    monkeypatch.setattr(reference, "last_hidden", lambda *given: calls.append(1) or real(*given))
    return calls


def train(tmp_path, tokenizer, name, cache, full=False, **changes):
    torch.manual_seed(0)
    model = build("llama", len(tokenizer))
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    examples = [encode(row, tokenizer, spec, 64, i) for i, row in enumerate(make_rows())]
    fixed = dict(
        output_dir=str(tmp_path / name),
        per_device_train_batch_size=6,
        num_train_epochs=3,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        max_length=64,
        logging_steps=1,
        seed=5,
        reference_cache=cache and str(tmp_path / cache),
    )
    config = RedFlagConfig(**{**fixed, **changes})
    peft = None if full else lora_config(model, spec, 4)
    trainer = RedFlagTrainer(model, config, spec, examples, processing_class=tokenizer, peft_config=peft)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_reference_is_run_once_per_row_and_training_stays_the_same(tmp_path, tokenizer, passes, full):
    expected, weights = train(tmp_path, tokenizer, "plain", None, full)
    assert len(passes) == 12  # 24 rows in batches of 6, three times
    passes.clear()
    losses, found = train(tmp_path, tokenizer, "kept", "cache", full)
    assert len(passes) == 4
    passes.clear()
    again, _ = train(tmp_path, tokenizer, "again", "cache", full, seed=6)  # another order of rows
    assert not passes and len(again) == 12
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=2e-3, msg=name)


def test_what_another_model_gave_is_not_taken(tmp_path, tokenizer, passes):
    train(tmp_path, tokenizer, "one", "cache")
    passes.clear()
    model = build("llama", len(tokenizer))
    attach(model, tokenizer, FlagSpec.of("harm"))
    same = KeptStates(tmp_path / "cache", model, "float32")
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 0.01
    other = KeptStates(tmp_path / "cache", model, "float32")
    assert same._folder != other._folder
    assert KeptStates(tmp_path / "cache", model, "bfloat16")._folder != other._folder


def test_with_inserted_flags_nothing_is_kept(tmp_path, tokenizer, passes):
    train(tmp_path, tokenizer, "insert", "cache", placement="insert")
    assert len(passes) == 12 and not list((tmp_path / "cache").rglob("*.npy"))


def test_a_file_that_is_damaged_is_made_anew(tmp_path, tokenizer, passes):
    train(tmp_path, tokenizer, "one", "cache")
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(files) == 24
    whole = files[0].read_bytes()
    for damaged in (b"", whole[:40], whole[:-7]):
        files[0].write_bytes(damaged)
        passes.clear()
        train(tmp_path, tokenizer, "again", "cache")
        assert len(passes) == 1 and files[0].read_bytes() == whole


def test_states_beyond_float16_are_not_kept(tmp_path):
    model = torch.nn.Linear(2, 2)
    kept = KeptStates(tmp_path, model, "float32")
    states = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 70_000.0]])
    kept.write(["aa", "bb"], states)
    assert kept.read(["aa"], like=states[0]).equal(states[0])
    assert kept.read(["aa", "bb"], like=states[0]) is None


def test_a_rows_key_does_not_depend_on_its_padding():
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [5, 6, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    row, column = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 2, 3, 4, 1, 2])
    left, right, other = row_keys(ids, mask, row, column)
    assert left == right != other
    assert row_keys(ids[:1], mask[:1], row[:1], column[:1])[0] != left  # other columns
