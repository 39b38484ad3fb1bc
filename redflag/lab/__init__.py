"""The laboratory, which nothing outside imports: attacks, baselines, evaluation, refusals, synthesis, nano world."""
