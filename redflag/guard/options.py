"""The options of a guard: its model, its policy and its second judge, for every verb that serves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from redflag.backends.open import UpstreamOptions
from redflag.bounds import option
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
    upstream: str | None = option(None, "OpenAI-compatible server that runs the model, such as http://127.0.0.1:8000.")
    upper_bound: bool = option(False, "... knows no logprob_token_ids: bound the flags by its 20 most likely tokens.")
    upstream_route: Literal["completions", "chat"] = option(
        "completions", "... who renders conversations: redflag, or a vLLM (refused if its ids differ)."
    )
    threshold: float | None = option(None, "One threshold for all categories, in place of thresholds.json.")
    thinking: Literal["template", "on", "off"] = option(
        "off", "Whether answers begin with a thought unless a request says so; template: the chat template's default."
    )
    judge_prompt: bool = option(False, "Judge prompts too, by prompt_thresholds.json (`calibrate --prompts`).")
    device: str = option("auto", "Where a local model runs: auto, cpu, cuda, cuda:0, ...")
    dtype: str = option("auto", "Type of a local model's weights: auto, bfloat16, ...")

    def open_guard(self, policy: Policy, judge: Judge | None, **served: Any) -> Guard:
        """Opens the guarded model; `served`: further options of `redflag.backends.remote.RemoteBackend`.

        Raises:
            RedflagError: There are no flags or thresholds, or the engine does not measure them.
        """
        from redflag.guard.guard import Guard
        from redflag.models.named import model_folder
        from redflag.watching.thresholds import PROMPT_THRESHOLDS_FILE, Thresholds

        if self.judge_prompt:
            prompt = Thresholds.load(model_folder(self.model), PROMPT_THRESHOLDS_FILE)
            policy = dataclasses.replace(policy, prompt=prompt)
        if self.upstream is None:
            served = {}
        else:
            served |= {**self.upstream_options(), "upper_bound": self.upper_bound, "route": self.upstream_route}
        if (memory := self.remembered()) is not None:
            served["memory"] = memory
        return Guard.from_pretrained(
            self.model, policy, self.threshold, self.dtype, self.device, judge, self.upstream, self.thinking, **served
        )


@dataclass(kw_only=True)
class PolicyOptions(JudgeOptions):
    """The policy and the second judge as flat options, for the command line and YAML.

    Example:
        >>> options = PolicyOptions(actions="weapons=halt, fraud=reflect", hold_back=4)
        >>> options.policy().decide("fraud")
        'reflect'
    """

    action: Action = option(
        "halt", f"What an alarm leads to: {'; '.join(f'{name}, {rule.help}' for name, rule in ACTIONS.items())}."
    )
    actions: str | None = option(None, "Other actions for some categories: weapons=halt,fraud=reflect.")
    hold_back: int = option(0, "A token is shown after this many more have been judged.")
    release: Literal["steps", "sentence", "end"] = option("steps", "By hold_back, by whole sentences, or all at once.")
    thoughts: Literal["hide", "show"] = option("hide", "Whether thoughts are shown; they are judged in any case.")
    observe: bool = option(False, "Report alarms and let the response go on (audit only).")
    confirmed: Literal["halt", "replace"] = option("halt", "Action after a review that confirms an alarm.")
    replacement: str = option("", "Text shown in place of the rest.")
    decoy: bool = option(False, "A replaced answer ends as if the model had written it.")
    max_interventions: int = option(2, "Reflections, second judgements and forced flags per response.")
    max_wait_tokens: int = option(256, "Hidden tokens per response.")
    rearm: float = option(0.5, "After a false alarm: watch again below this share of the threshold.")
    mute_limit: int = option(64, "... and after so many tokens at the latest.")

    reflect_cue: str | None = option(None, "Text after the flag that opens a reflection.")
    reflect_verdict: Literal["words", "flag"] = option("words", "Read the verdict from two words, or from the flag.")
    reflect_verdict_cue: str | None = option(None, "Text that asks for the verdict word.")
    reflect_words: str | None = option(None, "Harmful word, harmless word; comma between.")
    reflect_limit: float = option(0.5, "Harm from which a reflection confirms the alarm.")
    reflect_max_tokens: int = option(64, "Hidden tokens per reflection.")
    reflect_system: str | None = option(None, "Text file put at the head of the system turn while reflecting.")
    reflect_stay: bool = option(False, "Go on in the context of the reflection.")

    first_token: Literal["off", "threshold", "compare"] = option(
        "off", "Decide before the first token (refusal tokens): by thresholds, or by comparison with responding."
    )
    first_selected: str | None = option(None, "... categories that thresholds decide on, commas between; default: all.")
    first_respond: str | None = option(None, "... the category whose flag says: respond.")
    first_temperature: float = option(1.0, "... softmax temperature of the classes.")
    first_bias: str | None = option(None, "... nats on a category's logit: weapons=1.5.")
    first_thresholds: str | None = option(None, "... thresholds in place of thresholds.json: weapons=0.2,fraud=0.9.")

    judge_template: str | None = option(None, "rubric short: own prompt file with {conversation} and {answer}.")
    judge_words: str | None = option(None, "rubric short: its answers, harmful word, harmless word; default: yes,no.")
    judge_chat: bool = option(False, "rubric short: send the bare conversation (guard models with their own template).")
    judge_folder: str | None = option(None, "Second judge in this process: as judge model and its judge_name.")
    judge_device: str = option("auto", "model: where it runs: auto, cpu, cuda:1, ...")
    judge_timeout: float = option(10.0, "Seconds to wait for the second judge.")

    def policy(self) -> Policy:
        """The options as a policy.

        Raises:
            RedflagError: An option is invalid, or a file cannot be read.
        """
        from redflag.watching.policy import Policy, Reflect

        reflect = {item.name: getattr(self, f"reflect_{item.name}", None) for item in fields(Reflect)}
        if self.reflect_words is not None:
            reflect["words"] = _two(self.reflect_words, "reflect_words")
        if self.reflect_system is not None:
            reflect["system"] = _read(self.reflect_system, "reflect_system")
        same = {item.name: getattr(self, item.name) for item in fields(Policy) if hasattr(self, item.name)}
        changed = {
            "actions": _actions(self.actions),
            "default": self.action,
            "reflect": Reflect(**{name: value for name, value in reflect.items() if value is not None}),
            "first_token": self._first_token(),
        }
        return Policy(**(same | changed))

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
            raise RedflagError("first_token is off, so its other options must be left out. Or set it.")
        return None

    def second_judge(self) -> Judge | None:
        """The second judge, if the options name one; without `judge`, `judge_url` or `judge_folder` sets its kind.

        Raises:
            RedflagError: The options contradict each other, the judge cannot be used, or `escalate` has no judge.
        """
        if self.judge_url is not None and self.judge_folder is not None:
            raise RedflagError(
                f"judge_url and judge_folder must not both be given (got {self.judge_url} and {self.judge_folder}). "
                "There is one second judge: leave one of them out."
            )
        options = self
        if self.judge_folder is not None:
            options = dataclasses.replace(self, judge="model", judge_name=self.judge_folder)
        elif self.judge == "none" and self.judge_url is not None:
            options = dataclasses.replace(self, judge="endpoint")
        judge = options.open_judge(device=self.judge_device, timeout=self.judge_timeout, **self._short())
        if judge is None and "escalate" in (self.action, *_actions(self.actions).values()) and not self.observe:
            raise RedflagError(
                "the action escalate must come with a second judge. Give judge_url with judge_name, or judge_folder."
            )
        return judge

    def _short(self) -> dict[str, Any]:
        """Changes to the rubric `short`, as arguments of `EndpointJudge`."""
        changes: dict[str, Any] = {}
        if self.judge_template is not None:
            changes["template"] = _read(self.judge_template, "judge_template")
        if self.judge_words is not None:
            changes["yes"], changes["no"] = _two(self.judge_words, "judge_words")
        if self.judge_chat:
            changes["chat"] = True
        if changes and self.judge_rubric != "short":
            raise RedflagError(
                f"judge_rubric must be short with judge_template, judge_words or judge_chat (got {self.judge_rubric}). "
                "They change that rubric."
            )
        return changes


def _actions(text: str | None) -> dict[str, str]:
    return _pairs(text, "actions", "weapons=halt,fraud=reflect")


def _numbers(text: str | None, name: str) -> dict[str, float]:
    try:
        return {category: float(value) for category, value in _pairs(text, name, "weapons=0.5,fraud=2").items()}
    except ValueError:
        raise RedflagError(f"{name} must be numbers by category (got {text!r}). Write weapons=0.5,fraud=2.") from None


def _pairs(text: str | None, name: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in (text or "").split(","):
        category, _, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not category or not value or category in pairs:
            raise RedflagError(
                f"{name} must give each category one value (got {part.strip()!r} in {text!r}). Write {example}."
            )
        pairs[category] = value
    return pairs


def _two(text: str, name: str) -> tuple[str, str]:
    words = text.split(",")
    # Not stripped: " yes" and "yes" are different tokens.
    if len(words) != 2 or not words[0].strip() or not words[1].strip() or words[0].strip() == words[1].strip():
        raise RedflagError(f"{name} must be two words (got {text!r}). Write harmful word, comma, harmless word.")
    return words[0], words[1]


def _read(path: str, name: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RedflagError(f"{name} must be a text file that can be read (got {path}: {error}).") from None
