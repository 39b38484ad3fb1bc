"""Apple's GPU has no double precision: the paths that run on it never make such a tensor."""

from __future__ import annotations

import pytest
import torch
from tiny import WORDS, build, make_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redflag.backends import Sampling
from redflag.backends.choose import Chooser
from redflag.backends.hf import HFBackend
from redflag.flags import FlagSpec, attach
from redflag.models.pretrain import train_tokenizer
from redflag.training.adapter import lora_config
from redflag.training.encode import encode
from redflag.training.trainer import RedFlagConfig, RedFlagTrainer
from redflag.weights import precision


class NoFloat64(TorchDispatchMode):
    """Raises what Apple's GPU raises, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({func})")
        return result


@pytest.fixture
def like_apple(monkeypatch):
    monkeypatch.setattr(precision, "NARROW_DEVICES", {"cpu", "mps"})


@pytest.fixture(scope="module")
def flagged():
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, 320)
    model = build("llama", len(tokenizer))
    return model, tokenizer, attach(model, tokenizer, FlagSpec.of("harm"))


def test_the_mode_refuses_a_double():
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()


@pytest.mark.parametrize("full", [False, True])
def test_a_training_step_makes_no_double(flagged, tmp_path, like_apple, full):
    model, tokenizer, spec = flagged
    config = RedFlagConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        peak_coef=0.5,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    examples = [encode(row, tokenizer, spec, 64, i) for i, row in enumerate(make_rows(8))]
    adapter = None if full else lora_config(model, spec, 4, None, 0.0, "all-linear")
    trainer = RedFlagTrainer(model, config, spec, examples, examples[:4], tokenizer, adapter)
    with NoFloat64():
        trainer.train()
        metrics = trainer.evaluate()
    assert metrics["eval_keep_kl"] >= 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_decoding_step_makes_no_double(flagged, like_apple, temperature):
    model, tokenizer, spec = flagged
    backend = HFBackend(model, tokenizer, spec)
    with NoFloat64():
        steps = list(backend.stream([5, 6, 7], Sampling(max_new_tokens=4, temperature=temperature, top_p=0.9, seed=1)))
        scored = list(backend.score([([5, 6, 7], [8, 9])]))
    assert steps and len(scored) == 1
    assert all(step.token_id not in spec.ids for step in steps)


def test_in_single_precision_an_impossible_token_is_never_drawn(monkeypatch, like_apple):
    """A point at the very end of the running sum, where the flag, hidden, stands last."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.ones(shape))
    flag = torch.tensor([3])
    chooser = Chooser(Sampling(seed=0), [[0]], flag, torch.device("cpu"))
    step = chooser.step(torch.tensor([[0.0, 2.0, 1.0, 9.0]]), [0])[0]
    assert step.token_id == 1


def test_every_token_id_and_probability_survives_the_transfer():
    ids = torch.tensor([0, 151_935, 262_143, 2**24 - 1])
    assert ids.float().long().equal(ids)
