"""Fixtures of tests with scripted guards: see `tests/support/scripted_guard.py`."""

from scripted_guard import guard_of, metaspace_tokenizer, model_dir, script, spec, thresholds, tokenizer

__all__ = ["guard_of", "metaspace_tokenizer", "model_dir", "script", "spec", "thresholds", "tokenizer"]
