"""A trainer away from its start, and its loss and gradients beside those of a plain loop over tokens."""

from __future__ import annotations

import copy
import dataclasses

import torch
from tiny import build

from redflag.data.rows import Row
from redflag.flags import FlagSpec, attach
from redflag.prompt import template_hash
from redflag.training.adapter import lora_config
from redflag.training.encode import build_dataset
from redflag.training.trainer import RedFlagConfig, RedFlagTrainer


def settings_of(folder, **changes):
    fixed = dict(output_dir=str(folder), save_strategy="no", bf16=False, use_cpu=True, max_length=64, seed=5)
    return RedFlagConfig(**{**fixed, "disable_tqdm": True, **changes})


def only(folder, **changes):
    """Settings under which the loss is the term asked for, and nothing else."""
    return settings_of(folder, **{"flag_coef": 0.0, "keep_coef": 0.0, **changes})


def row(prompt, answer, category=None, **more):
    return Row([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], category, **more)


def world(tokenizer, rows, *categories, family="llama", attention=None):
    """(model, spec, data set) of a tiny model with these flags."""
    model = build(family, len(tokenizer))
    if attention:
        model.set_attn_implementation(attention)
    spec = attach(model, tokenizer, FlagSpec.of(*(categories or ("harm",))))
    spec = dataclasses.replace(spec, template_hash=template_hash(tokenizer))
    return model, spec, build_dataset(rows, tokenizer, spec, 64)


def moved_trainer(tokenizer, model, spec, data, config, full, noise=0.1):
    """A trainer whose weights are away from the start, and the reference as it was."""
    reference = copy.deepcopy(model).eval()
    adapter = None if full else lora_config(model, spec)
    trainer = RedFlagTrainer(model, config, spec, data, processing_class=tokenizer, peft_config=adapter)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    trainer.model.train()
    return trainer, reference


def check_loss(trainer, examples, expected, rtol=1e-4):
    """Loss and gradients of a batch equal those of `expected(net, placed examples)`."""
    net = trainer.model
    batch = trainer.data_collator(examples)
    counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    got = trainer.compute_loss(net, batch, num_items_in_batch=counts)
    got.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    wanted = expected(net)
    assert wanted.item() != 0
    wanted.backward()
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-5)
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-3, atol=2e-5, msg=name)
    return got.item()


def split_log_probs(z, spec):
    """Of one position's logits: log-probabilities of none and the flags, and of the language tokens (flags: -inf)."""
    flags = list(spec.ids)
    whole = z.log_softmax(-1)
    language = torch.ones(len(z), dtype=torch.bool)
    language[flags] = False
    none = whole[language].logsumexp(0)
    return torch.stack([none, *(whole[flag] for flag in flags)]), torch.where(language, whole - none, -torch.inf)
