"""How a model calls tools, detected from its chat template; prompts with tools, also for templates without support.

A template that shows tools, calls and results, and writes calls in a known format, renders them. Otherwise they are
described in words (`json`): definitions in the system turn, calls as JSON, results in user turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from redflag.control_tokens import control_ids, tokenise
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.messages import Message, checked
from redflag.prompt import render_prompt
from redflag.stand_ins import Conversation
from redflag.tool_definitions import Tool, checked_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Stands before the text of a mark that the model wrote as one token. No decoder gives half of a surrogate pair, so no
# text can forge it.
MARK = "\udfff"


class ToolFormat(NamedTuple):
    """How calls are written.

    Attributes:
        name: `hermes`, `llama`, `mistral`, `harmony` or `json`.
        marks: Texts by which the model marks calls; each is one token if the tokenizer has it.
        before: Beginning of a call, up to the function's name.
        after: Text between the name and the arguments.
    """

    name: str
    marks: tuple[str, ...]
    before: str
    after: str


_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>")
_MISTRAL = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
FORMATS = {
    "hermes": ToolFormat("hermes", ("<tool_call>", "</tool_call>"), '<tool_call>\n{"name": "', '", "arguments":'),
    "llama": ToolFormat("llama", ("<|python_tag|>",), '{"name": "', '", "parameters":'),
    "mistral": ToolFormat("mistral", _MISTRAL, '[TOOL_CALLS][{"name": "', '", "arguments":'),
    "harmony": ToolFormat("harmony", _HARMONY, " to=functions.", "<|channel|>commentary json<|message|>"),
    "json": ToolFormat("json", (), '{"name": "', '", "arguments":'),
}
MISTRAL_11 = FORMATS["mistral"]._replace(before="[TOOL_CALLS]", after="[ARGS]")
# Patterns of a call of the function {name} in a rendered prompt.
_WRITTEN = (
    (FORMATS["harmony"], r"to=functions\.{name}<\|channel\|>commentary"),
    (MISTRAL_11, r"\[TOOL_CALLS\]\s*{name}(\[CALL_ID\]\w*)?\[ARGS\]"),
    (FORMATS["mistral"], r'\[TOOL_CALLS\]\s*\[\s*\{{\s*"name":\s*"{name}"'),
    (FORMATS["hermes"], r'<tool_call>\s*\{{"name":\s*"{name}",\s*"arguments":'),
    (FORMATS["llama"], r'\{{"name":\s*"{name}",\s*"parameters":'),
)
_PROBE_TOOLS = checked_tools(
    [{"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {"key": {}}}}}]
)
_PROBE = checked(
    [
        {"role": "user", "content": "question"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "abcdefghi", "function": {"name": "probe", "arguments": {"key": "value"}}}],
        },
        {"role": "tool", "content": "result", "tool_call_id": "abcdefghi", "name": "probe"},
    ]
)


@dataclass(frozen=True)
class ToolUse:
    """The tools that a response may call.

    Attributes:
        format: How calls are written.
        definitions: The tools; none if tools occur in earlier turns only.
        forced: The function that must be called, "" for any of them; None leaves it to the model.
    """

    format: ToolFormat
    definitions: tuple[Tool, ...] = ()
    forced: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions."""
        return frozenset(tool["function"]["name"] for tool in self.definitions)

    @property
    def in_channels(self) -> bool:
        """Whether the model first chooses a channel: a thought, an answer or a call."""
        return self.format.name == "harmony" and bool(self.definitions)

    @property
    def opening(self) -> str:
        """Beginning of a forced call, added to the prompt; "" if no call is forced.

        Example:
            >>> ToolUse(FORMATS["llama"], forced="add").opening
            '{"name": "add", "parameters":'
            >>> ToolUse(FORMATS["llama"], forced="").opening
            '{"name":'
        """
        if self.forced is None:
            return ""
        if not self.forced:
            return self.format.before.rstrip(' "')
        return self.format.before + self.forced + self.format.after


def find_format(tokenizer: PreTrainedTokenizerFast, spec: FlagSpec, configured: str = "auto") -> ToolFormat:
    """How the model calls tools, as its template shows an earlier call.

    Args:
        configured: One of `FORMATS`, which overrides detection; "auto" detects the format, and is `json` if the
            template shows no tools or writes calls in an unknown format.

    Raises:
        RedflagError: The template does not show tools, which the configured format needs.
    """
    conversation = Conversation(_PROBE, control_ids(tokenizer, spec), _PROBE_TOOLS)
    try:
        _, text = conversation.skeleton(tokenizer)
    except RedflagError as error:
        if configured not in ("auto", "json"):
            raise RedflagError(
                f"tool_format must be auto or json for this model (got {configured}). {error}"
            ) from error
        return FORMATS["json"]
    name = conversation.aliases["probe"]
    detected = next((form for form, pattern in _WRITTEN if re.search(pattern.format(name=name), text)), FORMATS["json"])
    return detected if configured in ("auto", detected.name) else FORMATS[configured]


def mark_ids(tokenizer: PreTrainedTokenizerFast, form: ToolFormat) -> dict[int, str]:
    """Id -> the text that stands for it in a response, for the format's marks that are tokens."""
    return {
        i: MARK + token.content for i, token in tokenizer.added_tokens_decoder.items() if token.content in form.marks
    }


class ToolPrompt(NamedTuple):
    """A rendered conversation, possibly with tools.

    Attributes:
        ids: Up to where the assistant continues, with the opening of a forced call.
        turns: The turns given to the template.
        tools: The definitions given to the template; none if the turns describe them in words.
    """

    ids: list[int]
    turns: Sequence[Message]
    tools: Sequence[Tool] = ()


def render_tool_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    spec: FlagSpec,
    use: ToolUse,
    preface: str = "",
    thinking: bool = False,
) -> ToolPrompt:
    """Renders a conversation with tools in the first way in which the template shows all of it.

    Other arguments and errors are those of `redflag.prompt.render_prompt`.
    """
    turns, tools = checked(messages), checked_tools(use.definitions)
    attempts: list[tuple[Callable[[], list[dict[str, Any]]], Sequence[Tool]]] = []
    if use.format.name != "json" or not tools:
        attempts.append((lambda: turns, tools))
        # Some templates show one call in a turn, some no text before it.
        attempts.append((lambda: one_call_a_turn(turns), tools))
        attempts.append((lambda: one_call_a_turn(turns, with_text=False), tools))
    if use.format.name == "json" or not tools:
        attempts.append((lambda: in_words(turns, tools), ()))
        # Some templates accept no system turn.
        attempts.append((lambda: in_words(turns, tools, "user"), ()))
    refusal: RedflagError | None = None
    for rewrite, shown in attempts:
        rewritten = rewrite()
        try:
            ids = render_prompt(tokenizer, rewritten, spec, preface, thinking, shown)
        except RedflagError as error:
            refusal = refusal or error
            continue
        return ToolPrompt(ids + tokenise(tokenizer, use.opening) if use.opening else ids, rewritten, shown)
    assert refusal is not None
    raise refusal


def one_call_a_turn(messages: Sequence[Message], with_text: bool = True) -> list[dict[str, Any]]:
    """The same conversation with a turn for each call, followed by its result; without `with_text`, calls alone."""
    turns: list[dict[str, Any]] = []
    results: dict[str, list[Message]] = {}
    for message in messages:
        if message["role"] == "tool":
            results.setdefault(message.get("tool_call_id", ""), []).append(message)
    for message in messages:
        calls = message.get("tool_calls", ())
        if message["role"] == "tool" and message.get("tool_call_id", "") not in results:
            continue  # It was put behind its call.
        if not calls:
            turns.append(dict(message))
        for number, call in enumerate(calls):
            content = message["content"] if number == 0 and with_text else ""
            turns.append({**message, "content": content, "tool_calls": [call]})
            turns += map(dict, results.pop(call.get("id", ""), []))
    return turns


_INSTRUCTIONS = """You can call these functions:
{tools}
To call them, answer with nothing but a JSON object for each call: {{"name": "the function", "arguments": {{...}}}}
Their results come in the next message. Answer in words where no call is needed."""


def in_words(messages: Sequence[Message], tools: Sequence[Tool], role: str = "system") -> list[dict[str, Any]]:
    """The same conversation for a template without tools: calls and results as text.

    The tools are described at the head of the first turn of `role`, `system` or `user`, which is added if missing.
    """
    names = {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls", ())
        if "id" in call
    }
    turns: list[dict[str, Any]] = []
    before = ""
    for message in messages:
        turn = {"role": message["role"], "content": message["content"]}
        if "reasoning_content" in message:
            turn["reasoning_content"] = message["reasoning_content"]
        if "tool_calls" in message:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
            turn["content"] = "\n".join(filter(None, [turn["content"], *calls]))
        if message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""), "")
            turn = {"role": "user", "content": f"Result of {name or 'the call'}:\n{turn['content']}"}
        joined = turn["role"] == "user" and "tool" in (message["role"], before)
        before = message["role"]
        if joined and turns and turns[-1]["role"] == "user":  # Many templates require alternating turns.
            turns[-1]["content"] += f"\n\n{turn['content']}"
        else:
            turns.append(turn)
    if not tools:
        return turns
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    described = _INSTRUCTIONS.format(tools=lines)
    first = next((turn for turn in turns if turn["role"] == role), None)
    if first is not None:
        first["content"] = f"{described}\n\n{first['content']}"
        return turns
    return [{"role": role, "content": described}, *turns]
