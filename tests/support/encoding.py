"""Flags, a tokenizer, rows and examples for tests of encoding."""

from __future__ import annotations

import functools
from typing import Any

from redflag.data.rows import Row
from redflag.flags import Flag, FlagSpec
from redflag.models.pretrain import train_tokenizer
from redflag.training.encode import (
    IGNORE,
    Example,
)

ONE = FlagSpec((Flag("harm", "<f>", id=90),))


TWO = FlagSpec((Flag("weapons", "<f>", id=90), Flag("fraud", "<g>", id=91)))


@functools.cache
def world() -> tuple[Any, FlagSpec]:
    tokenizer = train_tokenizer(["The quick brown fox bakes bread."] * 3, 320)
    ids = [tokenizer.convert_tokens_to_ids(f"<|reserved_{i}|>") for i in range(2)]
    return tokenizer, FlagSpec(
        (Flag("weapons", "<|reserved_0|>", id=ids[0]), Flag("fraud", "<|reserved_1|>", id=ids[1]))
    )


def row(response: str, category: str | None = None, onset: int | None = None, prompt: str = "Hi") -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return Row(messages=messages, category=category, onset=onset)


def example(onset: int = 0, flag_class: int = 0, row: int = 0) -> Example:
    """Two prompt tokens, then four response tokens."""
    return Example(row=row, input_ids=[1, 2, 11, 12, 13, 14], response_start=2, onset=onset, flag_class=flag_class)


X = IGNORE
