"""From rows to recordings of flag probabilities."""
