"""Tiny models of many families, and rows for them, built in the process."""

from __future__ import annotations

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from redflag.data.rows import Row

TEXT = "the cat sat on a mat and ate fish while rain fell over old town so dogs ran home to burn down the barn"
WORDS = TEXT.split()
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def build(family, vocabulary, tied=True):
    torch.manual_seed(3)
    common = dict(
        **SIZES,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8))
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return Gemma3ForCausalLM(Gemma3TextConfig(**common, head_dim=8, sliding_window=8, layer_types=layers))
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**common, head_dim=8, sliding_window=None))
    if family == "phi3":
        return Phi3ForCausalLM(Phi3Config(**common))
    assert family == "moe"
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts))


def make_rows(n=24):
    rows = []
    for i in range(n):
        text = " ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(6 + i % 7))
        harmful = i % 3 == 0
        rows.append(
            Row(
                [{"role": "user", "content": f"tell {WORDS[i % 9]}"}, {"role": "assistant", "content": text}],
                category="harm" if harmful else None,
                onset=len(text) // 2 if harmful else None,
                id=str(i),
                group=str(i // 2),
            )
        )
    return rows
