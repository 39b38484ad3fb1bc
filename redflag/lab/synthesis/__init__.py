"""Rows from a constitution: harmful and harmless classes in words -> requests, answers, onsets, soft targets.

After "Constitutional Classifiers" (Sharma and others, arXiv 2501.18837): the constitution describes what to detect, a
model writes requests and answers for it, a judge checks them and finds where harm begins. To detect something else,
change the text and train again.
"""
