"""Classes of faults, for labels and logs: the detail of a fault is free text and may quote a response."""

from __future__ import annotations

import re

# Class and pattern of its details; the first match counts.
_CLASSES = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("busy", r"^BusyError\b"),
        ("timeout", r"^\w*Timeout\w*:"),
        ("flag_chosen", r"^the engine chose flag id\b|\bwhich logit_bias bans"),
        ("verdict", r"\bverdict\b"),
        ("unjudged", r"^step \d+:|log-probabilit"),
        ("decode", r"\bcannot be decoded\b"),
        ("engine_refused", r"^RedflagError\b|^the engine refused\b"),
        ("memory", r"^(MemoryError|\w*OutOfMemory\w*)\b"),
        ("engine_lost", r"^(\w*(Connect|Connection|Disconnected|Payload|Socket|Pipe)\w*|OSError|EOFError):"),
    )
)


def fault_class(detail: str) -> str:
    """The class of a `Halt.detail`; `other` if none matches.

    Example:
        >>> fault_class("ConnectionError: the server went away"), fault_class("step 3: a flag probability is nan")
        ('engine_lost', 'unjudged')
    """
    return next((name for name, pattern in _CLASSES if pattern.search(detail)), "other")
