"""The exception for mistakes that the user can fix."""

from __future__ import annotations


class RedflagError(ValueError):
    """Raised for mistakes in input or set-up that the user can fix.

    The message follows `NAME must be RULE (got VALUE). [Why.] [Fix.]`. The command line prints it without a traceback
    and exits with status 2; any other exception is a bug in redflag.
    """
