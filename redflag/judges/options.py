"""Options that name a judge, shared by several verbs; all judges are opened here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from redflag.bounds import option
from redflag.errors import RedflagError
from redflag.judges.rubrics import RUBRICS, Rubric
from redflag.outbound import extra_headers, key_in

if TYPE_CHECKING:
    from redflag.judges import Judge

JudgeKind = Literal["none", "endpoint", "model"]


@dataclass(kw_only=True)
class JudgeOptions:
    """The judge of answers, and its settings."""

    judge: JudgeKind = option("none", "Judge of answers (of a guard: the second judge): a server, or weights.")
    judge_url: str | None = option(None, "endpoint: address of an OpenAI-compatible server, http://HOST/v1.")
    judge_name: str | None = option(None, "endpoint: its model's name; model: its folder or hub name.")
    judge_rubric: Rubric = option("short", "endpoint: rubric; guard: the model's own chat template.")
    judge_key_env: str | None = option(None, "endpoint: environment variable with its key.")
    judge_tokens: int | None = option(
        None, "endpoint: maximum tokens; one that thinks needs hundreds. Default: the rubric's."
    )
    judge_options: dict[str, Any] | None = option(None, "endpoint: request fields, in JSON; null leaves one out.")
    judge_headers: dict[str, str] | None = option(None, "endpoint: headers, in JSON; ${NAME}: environment variable.")
    judge_kind: str | None = option(None, "model: its format, if the name does not tell.")

    def open_judge(self, *, device: str = "auto", **settings: Any) -> Judge | None:
        """The judge; None for `none`. May load a model.

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
            settings["max_tokens"] = self.judge_tokens
        return RUBRICS[self.judge_rubric](
            str(url),
            name,
            api_key=key_in(self.judge_key_env, "judge_key_env"),
            options=self.judge_options,
            headers=extra_headers(self.judge_headers, "judge_headers"),
            **settings,
        )
