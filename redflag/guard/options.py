"""The options of a policy and of its second judge, for every verb that serves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from redflag.backends.outbound import extra_headers, key_in
from redflag.errors import RedflagError

if TYPE_CHECKING:
    from redflag.judges import Judge
    from redflag.watching.first_token import FirstTokenRule
    from redflag.watching.policy import Policy


@dataclass
class PolicyOptions:
    """What alarms lead to, when text is released, and who is asked a second time.

    Flat, so that a YAML file can hold it; `policy` and `judge` make the objects.

    Example:
        >>> options = PolicyOptions(actions="weapons=halt, fraud=reflect", hold_back=4)
        >>> options.policy().decide("fraud")
        'reflect'
    """

    action: Literal["continue", "halt", "reflect", "replace", "escalate", "force"] = field(
        default="halt", metadata={"help": "What an alarm leads to."}
    )
    actions: str | None = field(
        default=None, metadata={"help": "Other actions for some categories: weapons=halt,fraud=reflect."}
    )
    hold_back: int = field(default=0, metadata={"help": "Tokens that wait until so many more have been judged."})
    release: Literal["steps", "sentence", "end"] = field(
        default="steps", metadata={"help": "steps: after hold_back; sentence: whole sentences; end: all at once."}
    )
    observe: bool = field(default=False, metadata={"help": "Report alarms and let the response go on (audit only)."})
    confirmed: Literal["halt", "replace"] = field(
        default="halt", metadata={"help": "What a reflection or second judge that confirms an alarm leads to."}
    )
    replacement: str = field(default="", metadata={"help": "Text shown in place of the rest."})
    decoy: bool = field(default=False, metadata={"help": "A replaced answer ends as if the model had written it."})
    max_interventions: int = field(
        default=2, metadata={"help": "Reflections, second judgements and forced flags per response."}
    )
    max_wait_tokens: int = field(default=256, metadata={"help": "Hidden tokens per response."})
    rearm: float = field(
        default=0.5, metadata={"help": "After a false alarm: watch again below this share of the threshold."}
    )
    mute_limit: int = field(default=64, metadata={"help": "... and after so many tokens at the latest."})

    reflect_cue: str | None = field(default=None, metadata={"help": "Text after the flag that opens a reflection."})
    reflect_verdict: Literal["words", "flag"] = field(
        default="words", metadata={"help": "Read the verdict from two words, or from the flag after reflection."}
    )
    reflect_verdict_cue: str | None = field(default=None, metadata={"help": "Text that asks for the verdict word."})
    reflect_words: str | None = field(default=None, metadata={"help": "Harmful word, harmless word; comma between."})
    reflect_limit: float = field(default=0.5, metadata={"help": "Harm from which a reflection confirms the alarm."})
    reflect_max_tokens: int = field(default=64, metadata={"help": "Hidden tokens per reflection."})
    reflect_system: str | None = field(
        default=None, metadata={"help": "Text file put at the head of the system turn while reflecting."}
    )
    reflect_stay: bool = field(default=False, metadata={"help": "Go on in the context of the reflection."})

    first_token: Literal["off", "threshold", "compare"] = field(
        default="off",
        metadata={"help": "Decide before the first token (refusal tokens): by thresholds, or against responding."},
    )
    first_selected: str | None = field(
        default=None, metadata={"help": "... categories that thresholds decide on, commas between; default: all."}
    )
    first_respond: str | None = field(default=None, metadata={"help": "... the category whose flag says: respond."})
    first_temperature: float = field(default=1.0, metadata={"help": "... softmax temperature of the classes."})
    first_bias: str | None = field(default=None, metadata={"help": "... nats on a category's logit: weapons=1.5."})
    first_thresholds: str | None = field(
        default=None, metadata={"help": "... thresholds in place of thresholds.json: weapons=0.2,fraud=0.9."}
    )

    judge_url: str | None = field(
        default=None, metadata={"help": "Second judge: OpenAI-compatible server (http://host:port/v1)."}
    )
    judge_name: str | None = field(default=None, metadata={"help": "... the model's name there."})
    judge_template: str | None = field(
        default=None, metadata={"help": "... prompt file with {conversation} and {answer}; default: a short rubric."}
    )
    judge_words: str = field(default="yes,no", metadata={"help": "... its answers: harmful word, harmless word."})
    judge_chat: bool = field(
        default=False,
        metadata={"help": "... it is a guard model with a template of its own: send the bare conversation."},
    )
    judge_key_env: str | None = field(default=None, metadata={"help": "... environment variable with its API key."})
    judge_tokens: int = field(
        default=16, metadata={"help": "... most tokens of its answer; a model that thinks first needs hundreds."}
    )
    judge_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "... further fields of the request, as JSON; null leaves one out."}
    )
    judge_headers: dict[str, str] | None = field(
        default=None, metadata={"help": "... further headers, as JSON; ${NAME} stands for an environment variable."}
    )
    judge_folder: str | None = field(
        default=None, metadata={"help": "Second judge in this process: folder or hub name of a guard model."}
    )
    judge_kind: str | None = field(default=None, metadata={"help": "... its format, where the name does not tell."})
    judge_device: str = field(default="auto", metadata={"help": "... where it runs: auto, cpu, cuda:1, ..."})
    judge_timeout: float = field(default=10.0, metadata={"help": "Seconds until a second judge counts as silent."})

    def policy(self) -> Policy:
        """The policy.

        Raises:
            RedflagError: An option has no meaning, or a file cannot be read.
        """
        from redflag.watching.policy import Policy, Reflect

        reflect: dict[str, Any] = {
            "cue": self.reflect_cue,
            "verdict": self.reflect_verdict,
            "verdict_cue": self.reflect_verdict_cue,
            "words": None if self.reflect_words is None else _two(self.reflect_words, "reflect_words"),
            "limit": self.reflect_limit,
            "max_tokens": self.reflect_max_tokens,
            "system": None if self.reflect_system is None else _read(self.reflect_system, "reflect_system"),
            "stay": self.reflect_stay,
        }
        return Policy(
            actions=_actions(self.actions),
            default=self.action,
            hold_back=self.hold_back,
            observe=self.observe,
            release=self.release,
            confirmed=self.confirmed,
            replacement=self.replacement,
            decoy=self.decoy,
            reflect=dataclasses.replace(Reflect(), **{k: v for k, v in reflect.items() if v is not None}),
            max_interventions=self.max_interventions,
            max_wait_tokens=self.max_wait_tokens,
            rearm=self.rearm,
            mute_limit=self.mute_limit,
            judge_timeout=self.judge_timeout,
            first_token=self._first_token(),
        )

    def _first_token(self) -> FirstTokenRule | None:
        from redflag.watching.first_token import FirstTokenRule

        rule = FirstTokenRule(
            compare=self.first_token == "compare",
            selected=None if self.first_selected is None else tuple(map(str.strip, self.first_selected.split(","))),
            respond=self.first_respond,
            temperature=self.first_temperature,
            bias=_numbers(self.first_bias, "first_bias"),
            thresholds=_numbers(self.first_thresholds, "first_thresholds"),
        )
        if self.first_token != "off":
            return rule
        if rule != FirstTokenRule():
            raise RedflagError(
                "first_token is off and other options of the first token are given, which would do nothing: set "
                "first_token to threshold or compare, or leave them out"
            )
        return None

    def judge(self) -> Judge | None:
        """The second judge that the options name; None where they name none. May load a model.

        Raises:
            RedflagError: The options contradict each other, the judge cannot be used, or `escalate` has nobody to ask.
        """
        if self.judge_url is not None and self.judge_folder is not None:
            raise RedflagError(
                f"judge_url is {self.judge_url} and judge_folder is {self.judge_folder}, but one second judge decides: "
                "leave one of them out"
            )
        if self.judge_url is not None:
            from redflag.judges.endpoint import EndpointJudge

            if self.judge_name is None:
                raise RedflagError("judge_url is given without judge_name, so it is open who judges: name the model")
            yes, no = _two(self.judge_words, "judge_words")
            return EndpointJudge(
                self.judge_url,
                self.judge_name,
                api_key=key_in(self.judge_key_env, "judge_key_env"),
                template=None if self.judge_template is None else _read(self.judge_template, "judge_template"),
                timeout=self.judge_timeout,
                yes=yes,
                no=no,
                chat=self.judge_chat,
                max_tokens=self.judge_tokens,
                options=self.judge_options,
                headers=extra_headers(self.judge_headers, "judge_headers"),
            )
        if self.judge_folder is not None:
            from redflag.judges.model import ModelJudge

            return ModelJudge(self.judge_folder, kind=self.judge_kind, device=self.judge_device)
        if "escalate" in (self.action, *_actions(self.actions).values()) and not self.observe:
            raise RedflagError(
                "the action escalate asks a second judge and none is named, so nobody could answer: give judge_url "
                "with judge_name, or judge_folder"
            )
        return None


def _actions(text: str | None) -> dict[str, str]:
    return _pairs(text, "actions", "weapons=halt,fraud=reflect")


def _numbers(text: str | None, name: str) -> dict[str, float]:
    try:
        return {category: float(value) for category, value in _pairs(text, name, "weapons=0.5,fraud=2").items()}
    except ValueError:
        raise RedflagError(f"{name} is {text!r}, which has a word for a number: write weapons=0.5,fraud=2") from None


def _pairs(text: str | None, name: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in (text or "").split(","):
        category, found, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not found or not category or not value or category in pairs:
            raise RedflagError(
                f"{name} is {text!r}, of which {part.strip()!r} gives no category a value of its own, so an alarm "
                f"would lead to something else than meant: write {example}"
            )
        pairs[category] = value
    return pairs


def _two(text: str, name: str) -> tuple[str, str]:
    words = text.split(",")
    # Not stripped: " yes" and "yes" are different tokens.
    if len(words) != 2 or not words[0].strip() or not words[1].strip() or words[0].strip() == words[1].strip():
        raise RedflagError(f"{name} is {text!r}, which are not two words: write harmful word, comma, harmless word")
    return words[0], words[1]


def _read(path: str, name: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RedflagError(f"{name} names {path}, which cannot be read ({error}): give a text file") from None
