"""What a request may say: bodies of `/v1/chat/completions` and `/v1/completions`.

Nothing is ignored in silence. Which fields are refused and which are ignored and named stands in
`redflag.api.fields`; messages that an SDK made of an answer may be sent back as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from redflag.api.api_errors import ApiError
from redflag.api.explained import explained
from redflag.api.fields import ignored_fields
from redflag.api.structured import json_schema
from redflag.api.thinking import AskedThinking
from redflag.api.tool_fields import ChatTools
from redflag.backends import MOST_LOGPROBS, Sampling

MOST_STOPS = 16
LONGEST_STOP = 128
_MOST_CHOICES = 128  # as at OpenAI; the server's own limit is `Limits.max_choices`
NO_LIMIT = -1  # what clients send for "as many tokens as there may be"

Body = TypeVar("Body", bound="_Request")


def _a_limit(value: int) -> int:
    if value < 1 and value != NO_LIMIT:
        raise PydanticCustomError("greater_than_equal", "input should be 1 or more, or -1 for no limit")
    return value


def _as_text(value: Any) -> Any:
    """User names that are numbers: databases have those."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_stops(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


def _seed(value: int) -> int:
    """Seeds of 64 bits, as clients draw them, in the 62 that engines take."""
    return value if abs(value) < 2**62 else value % 2**62


_OPEN = ConfigDict(extra="allow", strict=True)
_Real = Annotated[float, Field(allow_inf_nan=False)]
_Limit = Annotated[int, AfterValidator(_a_limit)]
_Name = Annotated[str, Field(max_length=512), BeforeValidator(_as_text)]
_Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(_as_stops),
]
_Named = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
# Of a message: what answers of this and other servers hold beside the text. The prompt does not show it.
_LEFT_OUT = frozenset(("annotations", "audio", "parsed", "reasoning", "reasoning_content", "refusal"))
_MISSING: Any = object()


class _TextPart(BaseModel):
    model_config = _OPEN
    type: Literal["text", "input_text"]
    text: str


class _Message(BaseModel):
    """One turn. What answers hold may be sent back as it is: all but text and tool calls is left out of the prompt.

    An assistant's turn without text (it was halted before its first token, or only thought) is an empty turn: left out
    altogether, two user turns would follow each other, which some templates refuse.
    """

    model_config = _OPEN
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_TextPart] = Field(default=_MISSING, validate_default=True)
    name: Any = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    function_call: Any = None

    @field_validator("role", mode="before")
    @classmethod
    def _no_function_turn(cls, role: Any) -> Any:
        if role == "function":
            raise PydanticCustomError(
                "unsupported_turn", "turns of the role function are not supported; send the result in a tool turn"
            )
        return role

    @field_validator("content", mode="before")
    @classmethod
    def _empty_turn(cls, content: Any, info: ValidationInfo) -> Any:
        if content is _MISSING or content is None:
            if info.data.get("role") == "assistant":
                return ""
            if content is _MISSING:
                raise PydanticCustomError("missing", "it is missing")
        return content

    @field_validator("function_call")
    @classmethod
    def _no_call(cls, call: Any) -> Any:
        if call is not None:
            raise PydanticCustomError("unsupported_turn", "it is not supported; send the call in tool_calls")
        return call

    def turn(self) -> dict[str, Any]:
        """The turn as the chat template knows it; text parts are lines, `developer` is the system.

        Calls of tools and their results go to the template, which may refuse them; a name only with a result.
        """
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.role == "assistant" and self.tool_calls:
            turn["tool_calls"] = self.tool_calls
        if self.role == "tool":
            turn |= {key: value for key in ("tool_call_id", "name") if (value := getattr(self, key)) is not None}
        return turn

    def extra(self) -> Iterator[str]:
        """Keys that mean nothing here."""
        yield from (f"messages.{name}" for name in self.model_extra or {} if name not in _LEFT_OUT)
        if not isinstance(self.content, str):
            for part in self.content:
                yield from (f"messages.content.{name}" for name in part.model_extra or {})


class _StreamOptions(BaseModel):
    model_config = _OPEN
    include_usage: bool | None = None


class _Request(BaseModel):
    model_config = _OPEN
    model: str
    max_tokens: _Limit | None = None
    max_completion_tokens: _Limit | None = None
    temperature: Annotated[_Real, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[_Real, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[_Real, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    stop: _Stops | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: _Name | None = None
    safety_identifier: _Name | None = None
    metadata: dict[str, Any] | None = None

    param: ClassVar[str]  # the field that holds the prompt
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _one_limit(self) -> _Request:
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise PydanticCustomError(
                "max_completion_tokens",
                "max_tokens and max_completion_tokens differ, so it is open which one counts; give one of them",
            )
        return self

    @property
    def user_id(self) -> str | None:
        """Who asks, as far as the client says."""
        return self.safety_identifier or self.user

    @property
    def wants_usage(self) -> bool:
        """Whether the stream shall end with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def asked_tokens(self) -> int | None:
        """The most response tokens the client wants; `NO_LIMIT` for as many as there may be."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit(self) -> str:
        """The field that says so."""
        return "max_tokens" if self.max_tokens else "max_completion_tokens"

    @property
    def ignored(self) -> list[str]:
        """Fields that were left out of account."""
        return self._ignored

    def extra(self) -> Iterator[str]:
        """Fields below the top level that mean nothing here."""
        if self.stream_options is not None:
            for name, value in (self.stream_options.model_extra or {}).items():
                if value not in (None, False):
                    yield f"stream_options.{name}"

    def asked_schema(self) -> tuple[str, Mapping[str, Any]] | None:
        """The field that asks for JSON, and the schema; None without one. Errors as `redflag.api.structured`."""
        return json_schema(self.response_format, self.structured_outputs, self.guided_json)

    def asked_thinking(self) -> AskedThinking | None:
        """What the request says of thoughts; None where there is no place for one."""
        return None

    @property
    def named_tokens(self) -> int | None:
        """How many likely tokens the client wants named beside each of the answer's; None: no log-probabilities."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int, choice: int = 0) -> Sampling:
        """How tokens shall be chosen; what the client leaves open is OpenAI's default.

        Args:
            max_new_tokens: Most response tokens.
            choice: Which of several answers: with a seed, each draws from a seed of its own.
        """
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),  # -1 switches it off, as for vLLM
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else _seed(self.seed + choice),
            "logprobs": self.named_tokens,
        }
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return Sampling(max_new_tokens, stop=tuple(self.stop or ()), **chosen)


class OneAnswer(_Request):
    """A request of an API that has one answer, without log-probabilities."""

    n: Literal[1] | None = None

    @property
    def named_tokens(self) -> int | None:
        """None: no log-probabilities."""
        return None

    def inputs(self) -> list[list[dict[str, Any]]]:
        """The one conversation."""
        return [self.input()]

    def input(self) -> list[dict[str, Any]]:
        """The conversation."""
        raise NotImplementedError


class _TemplateOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    enable_thinking: bool | None = None
    thinking: bool | None = None


class ChatRequest(_Request, ChatTools):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: _Named | None = None
    chat_template_kwargs: _TemplateOptions | None = None
    reasoning_effort: str | None = None

    param: ClassVar[str] = "messages"

    @model_validator(mode="after")
    def _asked_for(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs must come with logprobs: true; give both or none")
        return self

    def asked_thinking(self) -> AskedThinking:
        """As for every request."""
        options = self.chat_template_kwargs or _TemplateOptions()
        told = options.enable_thinking if options.enable_thinking is not None else options.thinking
        return AskedThinking(told, self.reasoning_effort, "chat_template_kwargs", "reasoning_effort")

    def inputs(self) -> list[list[dict[str, Any]]]:
        """The one conversation."""
        return [self.input()]

    def input(self) -> list[dict[str, Any]]:
        """The conversation."""
        return [message.turn() for message in self.messages]

    @property
    def named_tokens(self) -> int | None:
        """As for every request."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prefill(self) -> str | None:
        """Where the client wrote the beginning of the response, as a path; None where it did not."""
        return f"messages.{len(self.messages) - 1}" if self.messages[-1].role == "assistant" else None

    def extra(self) -> Iterator[str]:
        """As for every request; of the messages too."""
        yield from super().extra()
        yield from self.unused()
        for message in self.messages:
            yield from message.extra()


class CompletionRequest(_Request):
    """Body of `/v1/completions`. Prompts are texts: ids could hold a flag."""

    prompt: str | list[Any]
    logprobs: _Named | None = None

    param: ClassVar[str] = "prompt"

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value is False else value  # as in a chat

    @model_validator(mode="after")
    def _texts(self) -> CompletionRequest:
        given = self.prompt
        if isinstance(given, list) and not (given and all(isinstance(one, str) for one in given)):
            raise PydanticCustomError(
                "prompt",
                "prompt must be a text or a list of texts. Token ids are not accepted, since some of them are flags: "
                "send the text (lm-eval: tokenized_requests=False)",
            )
        return self

    def inputs(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def input(self) -> str:
        """The first prompt."""
        return self.inputs()[0]

    @property
    def named_tokens(self) -> int | None:
        """As for every request; 0 names the answer's own tokens alone."""
        return self.logprobs

    @property
    def prefill(self) -> str | None:
        """A prompt has no turns, so nothing of it is the response."""
        return None


def parse(kind: type[Body], body: bytes, *, refuse_unknown: bool = False) -> Body:
    """A request body, checked.

    Args:
        kind: Which request it is.
        body: JSON.
        refuse_unknown: Refuse fields that could be ignored.

    Raises:
        ApiError: 400, in words that name the field.

    Example:
        >>> parse(CompletionRequest, b'{"model": "m", "prompt": "Once", "best_of": 2}')
        Traceback (most recent call last):
        redflag.api.api_errors.ApiError: best_of is 2, which is not supported; leave it out
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise explained(error) from None
    names = dict.fromkeys([*ignored_fields(request.model_extra or {}), *request.extra()])
    if names and refuse_unknown:
        name = next(iter(names))
        raise ApiError(400, f"{name} is unknown or not supported; leave it out", "unknown_parameter", param=name)
    request._ignored.extend(names)
    return request
