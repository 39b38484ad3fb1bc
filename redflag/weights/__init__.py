"""Weights: GGUF files, types and devices, memory between steps, the cache of the last prompt."""
