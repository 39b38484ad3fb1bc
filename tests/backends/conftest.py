"""Tiny random models, built in the process from their configurations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from redflag.backends.hf import HFBackend
from redflag.flags import Flag, FlagSpec

FLAGS = ("<|harm|>", "<|theft|>")
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|end|>", *FLAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog ate the hat, then the cat ran"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")


@pytest.fixture(scope="session")
def spec(tokenizer: PreTrainedTokenizerFast) -> FlagSpec:
    ids = [tokenizer.convert_tokens_to_ids(token) for token in FLAGS]
    return FlagSpec(flags=(Flag("harm", FLAGS[0], id=ids[0]), Flag("theft", FLAGS[1], id=ids[1])))


def build_model(name: str, vocabulary: int):
    torch.manual_seed(7)
    common = dict(
        **SIZES, vocab_size=vocabulary, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None
    )
    if name in ("llama", "llama-tied"):
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=name != "llama"))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, num_key_value_heads=2))
    else:
        # One sliding and one full layer; the window is shorter than most test sequences.
        config = Gemma3TextConfig(
            **common, num_key_value_heads=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        )
        config.final_logit_softcapping = 5.0 if name == "gemma3-capped" else None
        model = Gemma3ForCausalLM(config)
    # Random weights give almost equal logits; spread them so that greedy choices do not hang on rounding.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30.0 if "gemma" not in name and "tied" not in name else 10.0)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model.eval()


MODELS = ("llama", "llama-tied", "qwen3", "gemma3", "gemma3-capped")


@pytest.fixture(scope="session")
def built(tokenizer) -> dict[str, Any]:
    """All `MODELS`, by name; not to be changed."""
    return {name: build_model(name, len(tokenizer)) for name in MODELS}


@pytest.fixture(params=MODELS)
def model(request, built):
    return built[request.param]


@pytest.fixture(scope="session")
def spelling(tmp_path_factory) -> tuple[Path, PreTrainedTokenizerFast]:
    """A model whose tokens are single characters, so that ids and texts are one to one; its chat is the text alone."""
    names = ["<|pad|>", "<|end|>", *FLAGS, "Ġ", "Ċ", "ĉ", *map(chr, range(33, 127))]
    characters = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters.decoder = decoders.ByteLevel()
    characters.add_special_tokens(names[:4])
    words = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<|end|>", pad_token="<|pad|>")
    words.chat_template = "{{ messages[0]['content'] }}"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 numbers, the least that vLLM takes
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30.0)
    folder = tmp_path_factory.mktemp("spelling")
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder, words


@pytest.fixture
def build(tokenizer) -> Callable[[str], Any]:
    """Builds one of `MODELS` anew, for tests that change it."""
    return lambda name: build_model(name, len(tokenizer))


@pytest.fixture
def backend(model, tokenizer, spec) -> HFBackend:
    return HFBackend(model, tokenizer, spec)
