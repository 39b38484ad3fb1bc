"""redflag: catch harm while a language model's answer is being written."""

__version__ = "0.1.0"
