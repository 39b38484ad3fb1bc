"""Halting inside vLLM, by a logits processor that is passed by class name."""
