"""Scores of given conversations, thresholds with a guarantee, and what both are worth."""
