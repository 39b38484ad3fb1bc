"""What a model is computed with: files, types and devices, memory, the cache of its last prompt."""
