"""Real models in small: each family's own architecture, special tokens and chat template, with few weights."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import SIZES, TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LAYERS = ["sliding_attention", "full_attention"]
# SmolLM2: ChatML, with a system turn where none is given.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mistral 7B v0.3: no system turn of its own, turns alternate, and a space stands before an answer.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Phi-4-mini: no line breaks.
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Family -> (template, or name of the one that TRL ships; beginning; end of turn; tokens kept for users; other marks).
TOKENS = {
    "smollm2": (CHATML, None, "<|im_end|>", [], ["<|im_start|>"]),
    "qwen3": ("qwen3", None, "<|im_end|>", [], ["<|im_start|>", "<think>", "</think>"]),
    "llama": (
        "llama3_2",
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"],
        ["<|start_header_id|>", "<|end_header_id|>"],
    ),
    "gemma": ("gemma3", "<bos>", "<end_of_turn>", [f"<unused{i}>" for i in range(6)], ["<start_of_turn>"]),
    "mistral": (INST, "<s>", "</s>", ["[control_8]", "[control_9]"], ["[INST]", "[/INST]"]),
    "phi": (PHI, None, "<|end|>", [], ["<|user|>", "<|assistant|>", "<|system|>"]),
    "gpt": (
        "gptoss",
        "<|startoftext|>",
        "<|return|>",
        ["<|reserved_200000|>", "<|reserved_200001|>"],
        ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"],
    ),
}


# Rows of the embedding beyond the vocabulary.
SPARE = {"qwen3": 8, "phi": 8, "gpt": 8}


def family_of(recipe: str) -> str:
    """The key of `TOKENS` that a recipe's name begins with."""
    return next(name for name in TOKENS if recipe.startswith(name))


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's special tokens and chat template."""
    template, bos, eos, reserved, marks = TOKENS[family]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    if re.fullmatch(r"\w+", template):
        template = (files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"eos_token": eos, **({"bos_token": bos} if bos else {})})
    tokenizer.add_special_tokens({"extra_special_tokens": marks + reserved})
    return tokenizer


def model_of(recipe: str, tokenizer):
    """A random model of the recipe's architecture; sizes apart, with what is peculiar to the real one."""
    torch.manual_seed(3)
    common = dict(
        **SIZES,
        vocab_size=len(tokenizer) + SPARE.get(family_of(recipe), 0),
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    gemma = dict(common, head_dim=8, sliding_window=8, layer_types=LAYERS)
    if recipe.startswith("qwen3"):
        return Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8, tie_word_embeddings="8b" not in recipe))
    if recipe.startswith("gemma-3-1b"):
        return Gemma3ForCausalLM(Gemma3TextConfig(**gemma))
    if recipe.startswith("gemma"):
        eye = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=gemma,
                vision_config=dict(eye, image_size=28, patch_size=14),
                mm_tokens_per_image=4,
                image_token_index=5,
                boi_token_index=6,
                eoi_token_index=7,
            )
        )
    if recipe.startswith("mistral"):
        return MistralForCausalLM(MistralConfig(**common, head_dim=8, sliding_window=None, tie_word_embeddings=False))
    if recipe.startswith("phi"):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
        return Phi3ForCausalLM(Phi3Config(**common, rope_parameters=rope, tie_word_embeddings=True))
    if recipe.startswith("gpt"):
        experts = dict(num_local_experts=4, num_experts_per_tok=2)
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        sizes = dict(common, intermediate_size=32, head_dim=8, sliding_window=8, layer_types=LAYERS)
        return GptOssForCausalLM(GptOssConfig(**sizes, **experts, rope_parameters=rope, tie_word_embeddings=False))
    return LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings="3.1-8b" not in recipe))


def save_mxfp4(model, tokenizer, folder: Path) -> None:
    """A gpt-oss checkpoint as it is published: the experts' matrices in blocks of 4-bit numbers with a scale each."""
    config = model.config
    inner, hidden, experts = config.intermediate_size, config.hidden_size, config.num_local_experts
    shapes = {"gate_up_proj": (2 * inner, hidden // 32), "down_proj": (hidden, inner // 32)}
    tensors = {}
    for name, weight in model.to(torch.bfloat16).state_dict().items():
        shape = shapes.get(name.rpartition(".")[2])
        if shape is None:
            tensors[name] = weight.contiguous()
            continue
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, *shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, *shape), 122, dtype=torch.uint8)
    config.architectures, config.dtype = ["GptOssForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    record = json.loads((folder / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    record["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(record))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
