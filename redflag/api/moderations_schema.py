"""Request bodies of `/v1/moderations` and of LiteLLM's Generic Guardrail API: texts to be judged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from redflag.api.schema import _OPEN, OneAnswer, _Message, _TextPart, joined

MOST_TEXTS = 256
_OPENAIS = ("omni-moderation", "text-moderation")  # OpenAI's models, which clients name by default

_Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
_Conversation = Annotated[list[_Message], Field(min_length=1)]


class ModerationRequest(OneAnswer):
    """Body of `/v1/moderations`: texts, text parts, or a conversation in `input` or `messages`."""

    model: str = ""
    texts: str | _Texts | Annotated[list[_TextPart], Field(min_length=1)] | _Conversation | None = Field(
        default=None, alias="input"
    )
    messages: _Conversation | None = None

    param: ClassVar[str] = "input"

    @model_validator(mode="after")
    def _one_input(self) -> ModerationRequest:
        if (self.texts is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give input or messages, one of them")
        return self

    @property
    def any_model(self) -> bool:
        """Whether the model's name does not matter: there is none, or one of OpenAI's."""
        return not self.model or self.model.startswith(_OPENAIS)

    def conversations(self) -> list[list[dict[str, Any]]]:
        """The conversations to judge, each with the answer as its last turn; a text answers an empty question."""
        texts = self.texts
        if isinstance(texts, str):
            return [_alone(texts)]
        turns = self.messages or [item for item in texts or () if isinstance(item, _Message)]
        if turns:
            return [[message.turn() for message in turns]]
        parts = [item for item in texts or () if isinstance(item, _TextPart)]
        if parts:
            return [_alone(joined(parts))]
        return [_alone(text) for text in texts or () if isinstance(text, str)]

    def extra(self) -> Iterator[str]:
        yield from super().extra()
        for message in self.messages or ():
            yield from message.extra()


class _Function(BaseModel):
    model_config = _OPEN
    arguments: str | None = None


class _Call(BaseModel):
    model_config = _OPEN
    function: _Function | None = None


class GuardrailRequest(OneAnswer):
    """Body of `/beta/litellm_basic_guardrail_api`."""

    model: str | None = None  # type: ignore[assignment]  # the one that LiteLLM asks
    input_type: Literal["request", "response"]
    texts: list[str] | None = None
    images: list[Any] | None = None
    tools: list[Any] | None = None
    tool_calls: list[_Call] | None = None
    structured_messages: list[_Message] | None = None

    param: ClassVar[str] = "texts"

    @property
    def unreadable(self) -> str:
        """Why a part of the request cannot be judged; "" if all of it can."""
        return "images cannot be judged" if self.images else ""

    def conversations(self) -> list[list[dict[str, Any]]]:
        """The conversations to judge.

        Of a response, each text and the arguments of each call are an answer to the conversation before it. Of a
        request it is the prompt (the conversation, else each text as a question), and an answer that the client began.
        """
        whole = [message.turn() for message in self.structured_messages or ()]
        turns = list(whole)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if self.input_type == "request":
            if whole:
                return [item for item in (turns, whole if whole != turns else []) if item]
            return [[{"role": "user", "content": text}] for text in self.texts or ()]
        calls = [call.function.arguments for call in self.tool_calls or () if call.function is not None]
        texts = [*(self.texts or ()), *(text for text in calls if text)]
        question = turns or [{"role": "user", "content": ""}]
        return [[*question, {"role": "assistant", "content": text}] for text in texts]


def _alone(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
