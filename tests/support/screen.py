"""A terminal to write to."""

from __future__ import annotations

import io
import sys

from rich.console import Console

from redflag import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """From here stderr is a terminal, 120 columns wide, and stdout is what it was.

    To be called in the test, not in a fixture: pytest sets both anew between the two.
    """
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "_CONSOLE", Console(stderr=True))
    return screen
