"""Fixtures of tests that score: see `tests/support/stub_scorer.py`."""

from stub_scorer import conversation, model_folder, spec, stub_scorer, tokenizer

__all__ = ["conversation", "model_folder", "spec", "stub_scorer", "tokenizer"]
