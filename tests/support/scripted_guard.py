"""A byte-level tokenizer with a chat template, and guards over scripted steps."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from redflag.backends.scripted import ScriptedBackend
from redflag.flags import Flag, FlagSpec
from redflag.guard.guard import Guard
from redflag.prompt import template_hash
from redflag.trace import Step
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

FLAGS = ("<|harm|>", "<|theft|>")
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|end|>", "<|turn|>", *FLAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog ate the hat, then the cat ran"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece: a space becomes part of the word, unknown characters become bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁the", "▁cat", "▁日", "t", "h", "e", "c", "a", "s", "é", "日", "👩"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *byte_tokens, *words])}
    merges = [("▁", "日")]
    vocabulary.setdefault("▁日", len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def spec(tokenizer: PreTrainedTokenizerFast) -> FlagSpec:
    ids = [tokenizer.convert_tokens_to_ids(token) for token in FLAGS]
    flags = (Flag("harm", FLAGS[0], id=ids[0]), Flag("theft", FLAGS[1], id=ids[1]))
    return FlagSpec(flags=flags, run_id="run-1", template_hash=template_hash(tokenizer))


@pytest.fixture
def thresholds(spec: FlagSpec) -> Thresholds:
    return Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)


@pytest.fixture
def script(tokenizer) -> Callable[..., list[Step]]:
    """Steps that spell a text, harmless but for what `high` says: index of a step -> its probabilities."""

    def steps(text: str, high: dict[int, tuple[float, float]] | None = None, *, end: bool = True) -> list[Step]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id] if end else ids
        return [Step(token_id, (high or {}).get(i, (0.01, 0.02))) for i, token_id in enumerate(ids)]

    return steps


@pytest.fixture
def guard_of(tokenizer, spec, thresholds) -> Callable[..., Guard]:
    """A guard over scripted steps or a given backend."""

    def build(steps, policy: Policy | None = None, **options) -> Guard:
        backend = steps if hasattr(steps, "stream") else ScriptedBackend(steps, {tokenizer.eos_token_id}, **options)
        return Guard(backend, tokenizer, spec, thresholds, policy)

    return build


@pytest.fixture
def model_dir(tmp_path, tokenizer, spec, thresholds) -> Path:
    """A trained and calibrated folder, but for the training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    directory = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    spec.save(directory)
    thresholds.save(directory)
    return directory
