"""Flag rows in LoRA: the cheap forward equals PEFT's own, and the head is read as the model applies it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import build

from redflag.errors import RedflagError
from redflag.flags import FlagSpec, attach
from redflag.training.adapter import cheap_flag_rows, lora_config, output_head


@pytest.mark.parametrize("family, tied", [("llama", True), ("llama", False), ("gemma3", True), ("phi3", False)])
def test_the_cheap_forward_equals_pefts_own(tokenizer, family, tied):
    model = build(family, len(tokenizer), tied)
    spec = attach(model, tokenizer, FlagSpec.of("harm", "theft"))
    peft_model = get_peft_model(model, lora_config(model, spec, 4))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    cheap = copy.deepcopy(peft_model)
    cheap_flag_rows(cheap)
    ids = torch.tensor([[3, spec.ids[0], 40, spec.ids[1], spec.ids[1], 7]])
    outputs, gradients = [], []
    for net in (peft_model, cheap):
        logits = net(input_ids=ids).logits
        logits.square().mean().backward()
        outputs.append(logits)
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert any("trainable_tokens_delta" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    with cheap.disable_adapter(), peft_model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(cheap(input_ids=ids).logits, peft_model(input_ids=ids).logits)


def test_a_head_with_an_adapter_of_its_own_is_refused(tokenizer):
    model = build("llama", len(tokenizer), tied=False)
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    config = lora_config(model, spec, 4, target_modules=["q_proj", "lm_head"])
    config.trainable_token_indices = {"embed_tokens": list(spec.ids)}
    with pytest.raises(RedflagError, match="Leave the head out"):
        output_head(get_peft_model(model, config), spec)


def test_an_unknown_target_module_is_named(tokenizer):
    model = build("llama", len(tokenizer))
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    with pytest.raises(RedflagError, match=r"got 'query'.*q_proj"):
        lora_config(model, spec, target_modules=["query"])
