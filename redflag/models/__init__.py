"""Models that redflag is tried with: where they come from."""
