"""The one exception that means "mend your input"."""

from __future__ import annotations


class RedflagError(ValueError):
    """A mistake in input or set-up that the user can mend.

    The text is one sentence: what is wrong (with the value), why it matters, what to do. The command line prints it
    without a traceback and exits with status 2; everything else that is raised is a defect of redflag.
    """
