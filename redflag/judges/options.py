"""Options that name a judge, shared by several verbs; all judges are opened here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from redflag.errors import RedflagError
from redflag.judges.rubrics import RUBRICS, Rubric
from redflag.outbound import extra_headers, key_in

if TYPE_CHECKING:
    from redflag.judges import Judge

JudgeKind = Literal["none", "endpoint", "model"]


@dataclass(kw_only=True)
class JudgeOptions:
    """The judge of answers, and its settings."""

    judge: JudgeKind = field(
        default="none", metadata={"help": "Judge of answers (of a guard: the second judge): a server, or weights."}
    )
    judge_url: str | None = field(
        default=None, metadata={"help": "endpoint: address of the judge, an OpenAI-compatible server, http://HOST/v1."}
    )
    judge_name: str | None = field(
        default=None, metadata={"help": "endpoint: its model's name; model: its folder or hub name."}
    )
    judge_rubric: Rubric = field(
        default="short",
        metadata={"help": "endpoint: rubric of the prompt; guard: the model's own chat template (Llama Guard, ...)."},
    )
    judge_key_env: str | None = field(default=None, metadata={"help": "endpoint: environment variable with its key."})
    judge_tokens: int | None = field(
        default=None,
        metadata={
            "help": "endpoint: maximum tokens of its answer; a model that thinks first needs hundreds. Default: the "
            "rubric's own."
        },
    )
    judge_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "endpoint: further fields of the request, as JSON; null leaves one out."}
    )
    judge_headers: dict[str, str] | None = field(
        default=None, metadata={"help": "endpoint: further headers, as JSON; ${NAME}: an environment variable."}
    )
    judge_kind: str | None = field(default=None, metadata={"help": "model: its format, if the name does not tell."})

    def open_judge(self, *, device: str = "auto", **asked: Any) -> Judge | None:
        """The judge; None for `none`. May load a model.

        Args:
            device: Device of a judge in this process.
            **asked: Further settings of a judge behind an address.

        Raises:
            RedflagError: An option is missing, or the judge cannot be used.
        """
        kind, url, name = self.judge, self.judge_url, self.judge_name
        if kind == "none":
            return None
        if not name or (kind == "endpoint" and not url):
            both = "judge_name and judge_url" if kind == "endpoint" else "judge_name"
            raise RedflagError(f"{both} must be given with the judge {kind}.")
        if kind == "model":
            from redflag.judges.model import ModelJudge

            return ModelJudge(name, kind=self.judge_kind, device=device)
        if self.judge_tokens is not None:
            asked["max_tokens"] = self.judge_tokens
        return RUBRICS[self.judge_rubric](
            str(url),
            name,
            api_key=key_in(self.judge_key_env, "judge_key_env"),
            options=self.judge_options,
            headers=extra_headers(self.judge_headers, "judge_headers"),
            **asked,
        )
