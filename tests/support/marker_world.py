"""A tiny model with two markers, as likely as a test wants them, and a server before it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from running import MODEL, body_of, running
from tiny import TEXT, build

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.backends.turns import Turns
from redflag.flags import FlagSpec, attach
from redflag.guard.guard import Guard
from redflag.models.pretrain import train_tokenizer
from redflag.prompt import render_prompt, template_hash
from redflag.server.access import Limits
from redflag.server.audit_log import AuditLog
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

ASKED = [{"role": "user", "content": "tell me of the old town"}]


SEVERITY = {"mild": 0.5, "severe": 0.01}  # above 50% for the one, above 1% for the other: the proposal's example


OPERATOR = "operator-key-0123456789"


RECIPE = Path(__file__).parents[2] / "recipes" / "papers" / "marker-before-refusals"


SAMPLING = Sampling(max_new_tokens=6, seed=3)


@dataclass
class World:
    """A tiny model with the flags `mild` and `severe`, and how likely they are."""

    model: Any
    tokenizer: Any
    spec: FlagSpec
    backend: HFBackend
    bias: torch.Tensor

    def thresholds(self, **values: float) -> Thresholds:
        manual = Thresholds.manual(
            0.5, self.spec.categories, run_id=self.spec.run_id, template_hash=self.spec.template_hash
        )
        return dataclasses.replace(manual, values={**SEVERITY, **values})

    def guard(self, policy: Policy | None = None, backend: Any = None, **values: float) -> Guard:
        return Guard(backend or self.backend, self.tokenizer, self.spec, self.thresholds(**values), policy)

    def likely(self, messages: list[dict[str, str]] = ASKED, **wanted: float) -> None:
        """Gives the flags these probabilities after a prompt (elsewhere they come out near them)."""
        self.bias.zero_()
        self.backend.forget()
        ids = torch.tensor([render_prompt(self.tokenizer, messages, self.spec)])
        with torch.inference_mode():
            logits = self.model(input_ids=ids).logits[0, -1].double()
        rest = [i for i in range(len(logits)) if i not in self.spec.ids]
        total = logits[rest].logsumexp(0)
        left = 1.0 - sum(wanted.values())
        for flag in self.spec.flags:
            p = wanted.get(flag.category, 1e-9)
            self.bias[flag.id] = math.log(p / left) + total - logits[flag.id]


@pytest.fixture(scope="module")
def made() -> World:
    tokenizer = train_tokenizer([TEXT] * 5, 320)
    model = build("llama", len(tokenizer), tied=False).eval()
    spec = attach(model, tokenizer, FlagSpec.of("mild", "severe"))
    spec = dataclasses.replace(spec, run_id="run-1", template_hash=template_hash(tokenizer))
    bias = torch.zeros(model.get_output_embeddings().weight.shape[0])
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits + bias)
    return World(model, tokenizer, spec, HFBackend(model, tokenizer, spec), bias)


@pytest.fixture
def world(made: World) -> World:
    made.bias.zero_()
    made.backend.forget()
    return made


@contextlib.contextmanager
def served(world: World, audit: Path, policy: Policy | None = None, **values: float) -> Iterator[Any]:
    guard = world.guard(policy, Turns(world.backend), **values)
    log = AuditLog(audit, guard.thresholds.values)
    with running(guard, Limits(MODEL, operator_key=OPERATOR), audit=log) as server:
        yield server


def ask(server: Any, *, override: str | None = None, key: str = OPERATOR, **more: Any) -> httpx.Response:
    headers = {} if override is None else {"X-Redflag-Override": override, "X-Redflag-Operator": key}
    body = body_of("/v1/chat/completions", max_tokens=6, seed=3, **more) | {"messages": ASKED}
    return httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers, timeout=30)


def choice(answer: httpx.Response) -> tuple[str, str]:
    """(text, how it ended)."""
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["choices"]
    return found["message"]["content"] or "", found["finish_reason"]


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
