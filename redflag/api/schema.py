"""Request bodies of `/v1/chat/completions` and `/v1/completions`.

`redflag.api.fields` lists the fields that are refused, and ignored ones are named to the client. Messages that an SDK
returned may be sent back as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from redflag.api.api_errors import ApiError, explained
from redflag.api.fields import ignored_fields
from redflag.api.structured import json_schema
from redflag.api.thinking import AskedThinking
from redflag.api.tool_fields import ChatTools
from redflag.backends import MOST_LOGPROBS, Sampling

MOST_STOPS = 16
LONGEST_STOP = 128
_MOST_CHOICES = 128  # as at OpenAI; the server's own limit is `Limits.max_choices`
NO_LIMIT = -1  # what clients send for "as many tokens as are allowed"

Kind = TypeVar("Kind", bound="_Request")


def _a_limit(value: int) -> int:
    if value < 1 and value != NO_LIMIT:
        raise PydanticCustomError("greater_than_equal", "input should be 1 or more, or -1 for no limit")
    return value


def _as_text(value: Any) -> Any:
    """User names may be numbers, such as the keys of a database."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_stops(value: Any) -> Any:
    return ([value] if value else []) if isinstance(value, str) else value


def _seed(value: int) -> int:
    """Clients draw seeds of 64 bits, engines take 62."""
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
# Keys of a message that answers of this and other servers have, and that are not part of the prompt.
_LEFT_OUT = frozenset(("annotations", "audio", "parsed", "reasoning", "reasoning_content", "refusal"))
_MISSING: Any = object()


def by_type(types: Sequence[str], message: str, default: str | None = None) -> Discriminator:
    """Tells the members of a union apart by their `type`. A member's tag is its type in brackets.

    `explained` takes the brackets as the sign that a part of an error's path is no field.
    """

    def tag(item: Any) -> str | None:
        name = item.get("type", default) if isinstance(item, dict) else getattr(item, "type", None)
        return f"[{name}]" if name in types else None

    return Discriminator(tag, custom_error_type="unsupported_turn", custom_error_message=message)


def joined(content: str | list[Any]) -> str:
    """Text, or text parts as lines."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class _TextPart(BaseModel):
    model_config = _OPEN
    type: Literal["text", "input_text"]
    text: str


class _Message(BaseModel):
    """One turn; of an answer that is sent back, the prompt has text and tool calls.

    An assistant's turn without text (halted before its first token, or only a thought) stays as an empty turn, since
    some templates refuse two user turns in a row.
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
        """The turn for the chat template: text parts as lines, `developer` as `system`, a name only with a result."""
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": joined(self.content)}
        if self.role == "assistant" and self.tool_calls:
            turn["tool_calls"] = self.tool_calls
        if self.role == "tool":
            turn |= {key: value for key in ("tool_call_id", "name") if (value := getattr(self, key)) is not None}
        return turn

    def extra(self) -> Iterator[str]:
        """Unknown keys."""
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
                "max_tokens and max_completion_tokens must not differ; give one of them",
            )
        return self

    def inputs(self) -> Sequence[Any]:
        """What is to be answered: the one conversation, or the prompts."""
        return [self.input()]

    def input(self) -> list[dict[str, Any]]:
        """The conversation; only of requests that have one."""
        raise NotImplementedError

    @property
    def prefill(self) -> str | None:
        """The path of the turn in which the client began the response, if it did."""
        return None

    @property
    def user_id(self) -> str | None:
        """The end user, if the client names one."""
        return self.safety_identifier or self.user

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def asked_tokens(self) -> int | None:
        """The requested maximum of response tokens, or `NO_LIMIT`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit(self) -> str:
        """The field of `asked_tokens`."""
        return "max_tokens" if self.max_tokens else "max_completion_tokens"

    @property
    def ignored(self) -> list[str]:
        return self._ignored

    def extra(self) -> Iterator[str]:
        """Unknown fields below the top level."""
        if self.stream_options is not None:
            for name, value in (self.stream_options.model_extra or {}).items():
                if value not in (None, False):
                    yield f"stream_options.{name}"

    def asked_schema(self) -> tuple[str, Mapping[str, Any]] | None:
        """The field that asks for JSON, and its schema; errors as `redflag.api.structured.json_schema`."""
        return json_schema(self.response_format, self.structured_outputs, self.guided_json)

    def asked_thinking(self) -> AskedThinking | None:
        """The request's settings for thoughts; None if its route has no thoughts."""
        return None

    @property
    def named_tokens(self) -> int | None:
        """How many likely tokens to list beside each token of the answer; None without log-probabilities."""
        return None

    def sampling(self, max_new_tokens: int, choice: int = 0) -> Sampling:
        """The sampling options, with OpenAI's defaults. With a seed, choice i draws from `seed + i`."""
        values = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),  # -1 switches it off, as for vLLM
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else _seed(self.seed + choice),
            "logprobs": self.named_tokens,
        }
        options: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return Sampling(max_new_tokens, stop=tuple(self.stop or ()), **options)


class OneAnswer(_Request):
    """A request of an API that has one answer, without log-probabilities."""

    n: Literal[1] | None = None


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
        options = self.chat_template_kwargs or _TemplateOptions()
        switch = options.enable_thinking if options.enable_thinking is not None else options.thinking
        return AskedThinking(switch, self.reasoning_effort, "chat_template_kwargs", "reasoning_effort")

    def input(self) -> list[dict[str, Any]]:
        return [message.turn() for message in self.messages]

    @property
    def named_tokens(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prefill(self) -> str | None:
        return f"messages.{len(self.messages) - 1}" if self.messages[-1].role == "assistant" else None

    def extra(self) -> Iterator[str]:
        yield from super().extra()
        yield from self.unused()
        for message in self.messages:
            yield from message.extra()


class CompletionRequest(_Request):
    """Body of `/v1/completions`. Prompts are texts, since ids could be flags."""

    prompt: str | list[Any]
    logprobs: _Named | None = None

    param: ClassVar[str] = "prompt"

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value is False else value  # as in a chat

    @model_validator(mode="after")
    def _texts(self) -> CompletionRequest:
        texts = self.prompt
        if isinstance(texts, list) and not (texts and all(isinstance(text, str) for text in texts)):
            raise PydanticCustomError(
                "prompt",
                "prompt must be a text or a list of texts. Token ids are not accepted, since some of them are flags: "
                "send the text (lm-eval: tokenized_requests=False)",
            )
        return self

    def inputs(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def named_tokens(self) -> int | None:
        return self.logprobs


def parse(kind: type[Kind], body: bytes, *, refuse_unknown: bool = False) -> Kind:
    """Parses and checks a body in JSON; `refuse_unknown` also refuses fields that could be ignored.

    Raises:
        ApiError: 400; names the field.

    Example:
        >>> parse(CompletionRequest, b'{"model": "m", "prompt": "Once", "best_of": 2}')
        Traceback (most recent call last):
        redflag.api.api_errors.ApiError: best_of=2 is not supported; leave it out
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
