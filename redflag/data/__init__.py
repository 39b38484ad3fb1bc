"""Rows: their format, and reading them from files and data sets."""
