"""Separates released text into content and calls of tools.

What may belong to a call is held until the response has ended: only `finish` makes calls. After a halt or a fault it
isn't called, so none of the calls is sent, complete or not. Text that isn't a valid call of an offered function is
content. Marks (`redflag.tool_prompt.MARK` and a text) never are.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Iterable
from typing import Any

from redflag.api.tool_formats import Call, State, json_values, parser_of
from redflag.guard.detokenize import TextFilter
from redflag.tool_prompt import MARK, ToolUse

_ALPHABET = string.ascii_letters + string.digits


class CallReader:
    """Separates content and calls, in any format.

    Attributes:
        calls: Empty until `finish`.

    Example:
        >>> from redflag.tool_prompt import FORMATS
        >>> add = {"type": "function", "function": {"name": "add"}}
        >>> reader = CallReader(ToolUse(FORMATS["json"], (add,)))
        >>> reader.push('{"name": "add", '), reader.push('"arguments": {"a": 1}}'), reader.finish()
        ('', '', '')
        >>> [(call.name, call.arguments) for call in reader.calls]
        [('add', '{"a": 1}')]
    """

    def __init__(
        self, use: ToolUse, marks: Collection[str] = (), *, flags: Iterable[str] = (), parallel: bool = True
    ) -> None:
        """Starts before the first text.

        Args:
            use: The offered functions and the format.
            marks: The format's marks that are tokens; spelled out, they are ordinary text.
            flags: Texts of flags, which neither content nor a call may have.
            parallel: Several calls are allowed; otherwise the first one counts.
        """
        self.calls: tuple[Call, ...] = ()
        self._names = use.names
        self._flags = tuple(flags)
        self._parallel = parallel
        # Mistral's templates require ids of this length.
        self._id_prefix, self._id_length = ("", 9) if use.format.name == "mistral" else ("call_", 24)
        self._marks = re.compile(f"{MARK}(?:{'|'.join(map(re.escape, use.format.marks)) or '(?!)'})")
        self._unmarked = ""  # what may begin a mark
        self._filter = TextFilter(remove=self._flags)
        self._parser = parser_of(use, frozenset(marks), self._call)

    @property
    def state(self) -> State:
        """Whether the latest text is shown, held until the end, or never shown."""
        return self._parser.state

    def push(self, text: str) -> str:
        """The text that may be shown now."""
        return self._shown(self._parser.push(text))

    def finish(self) -> str:
        """Ends the response, sets `calls`, and returns the text that is left to be shown."""
        items = self._parser.finish()
        calls = [item for item in items if isinstance(item, Call)]
        left = "".join(item for item in items if isinstance(item, str))
        self.calls = tuple(calls if self._parallel else calls[:1])
        # A mark that a stop text has cut is not content.
        return self._shown(left if left.strip() or not calls else "") + self._filter.flush()

    def _shown(self, text: str) -> str:
        text = self._unmarked + text
        cut = text.rfind(MARK)
        if cut < 0 or self._marks.match(text, cut):
            cut = len(text)
        self._unmarked = text[cut:]
        return self._filter.push(self._marks.sub("", text[:cut]))

    def _call(self, name: Any, arguments: Any) -> Call | None:
        """The call, if it is a valid one of an offered function."""
        if isinstance(arguments, str):
            arguments = next(iter(json_values(arguments) or ()), None)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (ValueError, RecursionError):
            return None
        if any(json.dumps(flag, ensure_ascii=False)[1:-1] in text for flag in self._flags):
            return None
        identity = "".join(secrets.choice(_ALPHABET) for _ in range(self._id_length))
        return Call(self._id_prefix + identity, name, text)
