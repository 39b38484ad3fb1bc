"""From recordings to thresholds with a guarantee."""
