"""Rows and a model -> a flagged model."""
