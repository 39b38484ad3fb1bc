"""The options of a guard: its model, its policy and its second judge, for every verb that serves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from redflag.backends.open import UpstreamOptions
from redflag.errors import RedflagError
from redflag.judges.options import JudgeOptions
from redflag.watching.options import MemoryOptions
from redflag.watching.policy import ACTIONS, Action

if TYPE_CHECKING:
    from redflag.guard.guard import Guard
    from redflag.judges import Judge
    from redflag.watching.first_token import FirstTokenRule
    from redflag.watching.policy import Policy


@dataclass(kw_only=True)
class GuardOptions(UpstreamOptions, MemoryOptions):
    """The guarded model, and where it runs."""

    model: str = field(
        metadata={"help": "Folder that `redflag train` wrote; before an upstream its tokenizer, flags and thresholds."}
    )
    upstream: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible server that runs the model, such as http://127.0.0.1:8000."}
    )
    upper_bound: bool = field(
        default=False,
        metadata={"help": "... knows no logprob_token_ids: bound the flags by its 20 most likely tokens."},
    )
    upstream_route: Literal["completions", "chat"] = field(
        default="completions",
        metadata={"help": "... who renders conversations: redflag, or a vLLM (refused where its ids differ)."},
    )
    threshold: float | None = field(
        default=None, metadata={"help": "One threshold for all categories, in place of thresholds.json."}
    )
    thinking: Literal["template", "on", "off"] = field(
        default="off",
        metadata={
            "help": "Whether answers begin with a thought where a request says nothing; template: what it does itself."
        },
    )
    judge_prompt: bool = field(
        default=False,
        metadata={"help": "Judge prompts too, before the answer, by prompt_thresholds.json (`calibrate --prompts`)."},
    )
    device: str = field(default="auto", metadata={"help": "Where a local model runs: auto, cpu, cuda, cuda:0, ..."})
    dtype: str = field(default="auto", metadata={"help": "Type of a local model's weights: auto, bfloat16, ..."})

    def open_guard(self, policy: Policy, judge: Judge | None, **served: Any) -> Guard:
        """The guarded model, proved to measure.

        Args:
            policy: What alarms lead to.
            judge: Is asked where the policy escalates.
            **served: Further options of the server, where one runs the model.

        Raises:
            RedflagError: There are no flags or thresholds, or the engine does not measure them.
        """
        from redflag.guard.guard import Guard
        from redflag.models.named import model_folder
        from redflag.watching.thresholds import PROMPT_THRESHOLDS_FILE, Thresholds

        if self.judge_prompt:
            prompt = Thresholds.load(model_folder(self.model), PROMPT_THRESHOLDS_FILE)
            policy = dataclasses.replace(policy, prompt=prompt)
        remembered = self.remembered()
        memory = {} if remembered is None else {"memory": remembered}
        if self.upstream is None:
            served = {}
        else:
            served |= {**self.upstream_options(), "upper_bound": self.upper_bound, "route": self.upstream_route}
        return Guard.from_pretrained(
            self.model,
            policy,
            self.threshold,
            self.dtype,
            self.device,
            judge,
            self.upstream,
            self.thinking,
            **memory,
            **served,
        )


@dataclass(kw_only=True)
class PolicyOptions(JudgeOptions):
    """What alarms lead to, when text is released, and who is asked a second time.

    Flat, so that a YAML file can hold it; `policy` and `second_judge` make the objects.

    Example:
        >>> options = PolicyOptions(actions="weapons=halt, fraud=reflect", hold_back=4)
        >>> options.policy().decide("fraud")
        'reflect'
    """

    action: Action = field(
        default="halt",
        metadata={
            "help": f"What an alarm leads to: {'; '.join(f'{name}, {rule.help}' for name, rule in ACTIONS.items())}."
        },
    )
    actions: str | None = field(
        default=None, metadata={"help": "Other actions for some categories: weapons=halt,fraud=reflect."}
    )
    hold_back: int = field(default=0, metadata={"help": "Tokens that wait until so many more have been judged."})
    release: Literal["steps", "sentence", "end"] = field(
        default="steps", metadata={"help": "steps: after hold_back; sentence: whole sentences; end: all at once."}
    )
    thoughts: Literal["hide", "show"] = field(
        default="hide", metadata={"help": "Whether thoughts are shown, apart from the answer; judged they all are."}
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

    judge_template: str | None = field(
        default=None,
        metadata={"help": "rubric short: prompt file with {conversation} and {answer} in place of redflag's."},
    )
    judge_words: str | None = field(
        default=None, metadata={"help": "rubric short: its answers, harmful word, harmless word; default: yes,no."}
    )
    judge_chat: bool = field(
        default=False,
        metadata={"help": "rubric short: a guard model with a template of its own; send the bare conversation."},
    )
    judge_folder: str | None = field(
        default=None, metadata={"help": "Second judge in this process: as judge model and its judge_name."}
    )
    judge_device: str = field(default="auto", metadata={"help": "model: where it runs: auto, cpu, cuda:1, ..."})
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
            thoughts=self.thoughts,
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

    def second_judge(self) -> Judge | None:
        """The second judge that the options name; None where they name none. May load a model.

        `judge_url` or `judge_folder` alone says as well which kind it is.

        Raises:
            RedflagError: The options contradict each other, the judge cannot be used, or `escalate` has nobody to ask.
        """
        if self.judge_url is not None and self.judge_folder is not None:
            raise RedflagError(
                f"judge_url is {self.judge_url} and judge_folder is {self.judge_folder}, but one second judge decides: "
                "leave one of them out"
            )
        options = self
        if self.judge_folder is not None:
            options = dataclasses.replace(self, judge="model", judge_name=self.judge_folder)
        elif self.judge == "none" and self.judge_url is not None:
            options = dataclasses.replace(self, judge="endpoint")
        judge = options.open_judge(device=self.judge_device, timeout=self.judge_timeout, **self._short())
        if judge is None and "escalate" in (self.action, *_actions(self.actions).values()) and not self.observe:
            raise RedflagError(
                "the action escalate asks a second judge and none is named, so nobody could answer: give judge_url "
                "with judge_name, or judge_folder"
            )
        return judge

    def _short(self) -> dict[str, Any]:
        """Changes to the rubric `short`, as arguments of `EndpointJudge`."""
        asked: dict[str, Any] = {}
        if self.judge_template is not None:
            asked["template"] = _read(self.judge_template, "judge_template")
        if self.judge_words is not None:
            asked["yes"], asked["no"] = _two(self.judge_words, "judge_words")
        if self.judge_chat:
            asked["chat"] = True
        if asked and self.judge_rubric != "short":
            raise RedflagError(
                f"judge_rubric must be short with judge_template, judge_words or judge_chat (got {self.judge_rubric}). "
                "They change that rubric: leave it out, or them"
            )
        return asked


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
