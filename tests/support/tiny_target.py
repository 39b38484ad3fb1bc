"""A tiny random model as a target of attacks that need its weights."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from tiny import TEXT, build

from redflag.backends.hf import HFBackend
from redflag.data.rows import Row
from redflag.flags import FlagSpec, attach
from redflag.lab.attacks import Target
from redflag.models.pretrain import train_tokenizer
from redflag.watching.thresholds import Thresholds


@cache
def tiny_tokenizer():
    return train_tokenizer([TEXT, "x x x x"] * 5, 330)


def tiny_target(threshold=None, family="llama", wrap=None, **more):
    """A target with one flag; `threshold` guards it, `wrap` wraps its model."""
    tokenizer = tiny_tokenizer()
    model = build(family, len(tokenizer))
    with torch.no_grad():  # Logits that differ by more than rounding.
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    spec = dataclasses.replace(spec, run_id="run-1")
    model = wrap(model, spec) if wrap else model
    thresholds = Thresholds.manual(threshold, spec.categories, run_id="run-1") if threshold else None
    return Target(HFBackend(model, tokenizer, spec), tokenizer, spec, thresholds, model=model, **more)


def weights(model):
    """A copy of everything that could change."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_weights(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def harmful_row(i=0, response="burn down the barn and ran home to town while rain fell"):
    turns = [{"role": "user", "content": f"tell {TEXT.split()[i % 9]} how dogs ran home"}]
    return Row([*turns, {"role": "assistant", "content": response}], "harm", 0, id=f"h{i}")
