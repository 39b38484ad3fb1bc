"""Requests and answers of the served APIs as objects: what a client sends, what it is sent."""
