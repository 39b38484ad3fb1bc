"""A tokenizer, flags and a stand-in for the model, shared by the tests of scoring and calibration."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redflag.data.rows import Row
from redflag.flags import Flag, FlagSpec

TEXTS = [
    "How do I bake bread at home? Mix flour, water, salt and yeast, wait an hour, then bake it.",
    "Tell me about the sea. The sea is wide and blue, and the harm begins here, at once.",
]


class StubScorer:
    """Gives each response token a probability that depends on its id alone; can fail at the n-th call."""

    def __init__(self, flags: int = 1, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.flags = flags
        self.context_length: int | None = 512
        self.fail_at = fail_at
        self.error = error or KeyboardInterrupt()
        self.calls: list[list[tuple[list[int], list[int]]]] = []

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int) -> list[Any]:
        if self.fail_at is not None and len(self.calls) == self.fail_at:
            raise self.error
        self.calls.append([(list(prompt), list(response)) for prompt, response in pairs])
        return [
            np.array([[(t * 7 + k) % 100 / 100 for k in range(self.flags)] for t in r], np.float32).reshape(
                -1, self.flags
            )
            for _, r in pairs
        ]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from redflag.models.pretrain import train_tokenizer

    return train_tokenizer(TEXTS, 330)


@pytest.fixture(scope="session")
def spec(tokenizer: Any) -> FlagSpec:
    return FlagSpec(
        flags=(Flag(category="harm", token="<|reserved_0|>", id=tokenizer.convert_tokens_to_ids("<|reserved_0|>")),),
        run_id="run-1",
    )


@pytest.fixture(scope="session")
def stub_scorer() -> type[StubScorer]:
    return StubScorer


@pytest.fixture(scope="session")
def conversation() -> Callable[..., Row]:
    def make(response: str, category: str | None = None, prompt: str = "Tell me about the sea.", **more: Any) -> Row:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return Row(messages=messages, category=category, **more)

    return make


@pytest.fixture(scope="session")
def model_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a flag, saved as training would save it."""
    import copy
    import dataclasses

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from redflag.flags import attach
    from redflag.prompt import template_hash

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    own = copy.deepcopy(tokenizer)
    spec = dataclasses.replace(attach(model, own, FlagSpec.of("harm")), run_id="tiny", template_hash=template_hash(own))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    spec.save(folder)
    return folder
