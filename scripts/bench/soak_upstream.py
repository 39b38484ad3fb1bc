"""An upstream for `scripts/bench/soak.py` that speaks vLLM's dialect, writes known texts, and breaks in known ways.

Every request names a case, `case-17`, in its last message. The case decides everything: the response, where a flag is
high, what a reflection says, what breaks and when (`Case`). `call case-17` gets the call of a tool; a prompt that ends
in an opened thought, a thought and an answer. Every token that must not be shown (from a harmful onset
on, in hidden reflections, or sent without a judgement) holds the letter Q or Z, which no other token does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from tokenizers import Tokenizer

from redflag.flags import FlagSpec

FAULTS = ("nan", "cut", "missing", "flag", "stall", "error")
WORDS = " one two three four five six seven eight nine ten and the river runs down to a house near some trees"
MARKED = re.compile("[QZ]")
TOOL = "lookup"
THINKS = ("<|reserved_6|>", "<|reserved_7|>")  # what opens a thought, what ends it


@dataclass(frozen=True)
class Case:
    """What happens to one request.

    Attributes:
        length: Response tokens, without the end-of-sequence token.
        alarm: At which of them the flag is high; None for none.
        harmful: Whether the reflection on it says so.
        fault: What breaks; None for nothing.
        fault_at: Before which token.
    """

    length: int
    alarm: int | None
    harmful: bool
    fault: str | None
    fault_at: int

    @classmethod
    def of(cls, number: int, length: int) -> Case:
        """The case of this number, for a response of so many tokens."""
        draw = random.Random(number)
        harmful, alarms = draw.random() < 0.5, draw.random() < 0.4
        fault = draw.choice(FAULTS) if draw.random() < 0.15 else None
        return cls(length, draw.randrange(length) if alarms else None, harmful, fault, draw.randint(0, length))

    @property
    def breaks(self) -> bool:
        """Whether something happens that cannot be judged."""
        return self.fault not in (None, "stall")

    def outcome(self, hold_back: int, thought: int = 0) -> tuple[str, int]:
        """How it ends (`done`, `halted`, `fault`) and how many tokens are shown, undisturbed.

        Args:
            hold_back: Tokens that wait.
            thought: Tokens of the thought, its end included: once it is over, none of them waits.
        """
        at = 0 if self.fault == "error" else self.fault_at
        if self.alarm is not None and self.harmful and (not self.breaks or self.alarm < at):
            ends, at = "halted", self.alarm
        elif self.breaks:
            ends = "fault"
        else:
            return "done", self.length
        return ends, max(0, at - hold_back, thought if at >= thought else 0)


class Tongue:
    """The words of the upstream, as ids of a model's tokenizer."""

    def __init__(self, model: str) -> None:
        # Without torch and transformers: a killed upstream has to be back soon.
        self.tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        spec = FlagSpec.load(model)
        eos = json.loads(Path(model, "config.json").read_text())["eos_token_id"]
        self.flag_ids, self.eos_id = spec.ids, eos if isinstance(eos, int) else eos[0]
        self.flag_text = spec.flags[0].token
        ids = dict.fromkeys(self.tokenizer.encode(WORDS, add_special_tokens=False).ids)
        self.words = [i for i in ids if not MARKED.search(self.tokenizer.decode([i]))]
        self.opens, self.closes = (self.tokenizer.token_to_id(mark) for mark in THINKS)
        self.marks = self.tokenizer.encode("QZQZQZ", add_special_tokens=False).ids
        assert all(MARKED.search(self.tokenizer.decode([i])) for i in self.marks), "the marks cannot be told apart"

    def script(self, number: int, call: bool = False, thinks: bool = False) -> list[int]:
        """The tokens of a case: words; the call of a tool; or a thought, what ends it, and words."""
        draw = random.Random(-number)
        words = [draw.choice(self.words) for _ in range(draw.randint(4, 60))]
        if call:
            text = json.dumps({"name": TOOL, "arguments": {"place": self.decode(words)}})
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return [*words[: len(words) // 2], self.closes, *words[len(words) // 2 :]] if thinks else words

    def parts(self, script: list[int], thinks: bool = False) -> tuple[str, str]:
        """The thought and the answer that a reader of so much of a script sees."""
        end = script.index(self.closes) if self.closes in script else len(script) if thinks else -1
        return self.decode(script[: max(end, 0)]), self.decode(script[end + 1 :])

    def decode(self, ids: list[int]) -> str:
        """Their text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Upstream:
    """The server."""

    def __init__(self, tongue: Tongue, seconds: float) -> None:
        self._tongue = tongue
        self._seconds = seconds
        self._starts: dict[int, int] = {}  # case -> tokens of its prompt

    async def models(self, request: web.Request) -> web.Response:
        """The one model."""
        return web.json_response({"data": [{"id": "fake", "max_model_len": 1_000_000}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """A streamed completion."""
        body = await request.json()
        prompt, watched = body["prompt"], body["logprob_token_ids"]
        asked = re.findall(r"(call )?case-(\d+)", self._tongue.tokenizer.decode(prompt[-4000:]))
        number = int(asked[-1][1]) if asked else None
        reflects = bool(set(self._tongue.flag_ids) & set(prompt))
        script: list[int] = []
        if number is not None:
            script = self._tongue.script(number, bool(asked[-1][0]), self._tongue.opens in prompt)
        case = Case.of(number, len(script)) if number is not None else None
        if case is not None and case.fault == "error" and not reflects:
            return web.json_response({"error": {"message": "out of memory", "code": 500}}, status=500)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        steps = self._steps(number, case, script, prompt, reflects, set(body.get("logit_bias", {})))
        for count, (token_id, prob, kind) in enumerate(steps, 1):
            if case is not None:
                await asyncio.sleep(self._seconds * random.uniform(0.5, 1.5))
            if kind == "stall":
                await asyncio.sleep(2.0)
            if kind == "cut":
                assert request.transport is not None
                request.transport.abort()
                return response
            over = token_id in body["stop_token_ids"]
            last = over or count == body["max_tokens"]
            finish = ("stop" if over else "length") if last else None
            await response.write(self._chunk(token_id, prob, watched, kind, finish, number))
            if last:
                break
        await response.write(b"data: [DONE]\n\n")
        return response

    def _steps(
        self,
        number: int | None,
        case: Case | None,
        words: list[int],
        prompt: list[int],
        reflects: bool,
        banned: set[str],
    ) -> Any:
        """Tokens with the flag's probability at each, and what is wrong with them."""
        tongue = self._tongue
        if number is None or case is None:  # a handshake: the most likely token, unless it may not be chosen
            while True:
                yield next(i for i in tongue.words if str(i) not in banned), 1e-4, None
        if reflects:
            for index in range(random.Random(number).randint(2, 8)):
                yield tongue.marks[index % len(tongue.marks)], 0.5, None
            yield tongue.eos_id, 0.5, None
            return
        start = self._starts.setdefault(number, len(prompt))
        spoilt = False
        for index in range(len(prompt) - start, case.length + 1):
            kind = case.fault if index == case.fault_at and case.fault != "error" else None
            alarm = index == case.alarm
            spoilt |= kind not in (None, "stall") or (alarm and case.harmful)
            over = index == case.length and kind in (None, "stall")
            token_id = (
                tongue.marks[index % len(tongue.marks)] if spoilt and not over else [*words, tongue.eos_id][index]
            )
            yield (tongue.flag_ids[0] if kind == "flag" else token_id), 0.9 if alarm else 1e-4, kind

    def _chunk(
        self, token_id: int, prob: float, watched: list[int], kind: str | None, finish: str | None, number: int | None
    ) -> bytes:
        top: dict[str, float | None] = {f"token_id:{i}": self._logprob(i, prob, watched, number) for i in watched}
        if kind == "nan":
            top = dict.fromkeys(top)
        top.setdefault(f"token_id:{token_id}", -1.0)
        own = f"token_id:{token_id}"
        logprobs = {"tokens": [own], "top_logprobs": [top], "token_logprobs": [top[own]]}
        choice = {
            "index": 0,
            "text": "x",
            "finish_reason": finish,
            "token_ids": [token_id],
            "logprobs": None if kind == "missing" else logprobs,
        }
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"

    def _logprob(self, token_id: int, prob: float, watched: list[int], number: int | None) -> float:
        if token_id in self._tongue.flag_ids:
            return math.log(prob)
        if number is None:
            return math.log(0.5) if token_id == self._tongue.words[0] else -8.0
        # The verdict words, harmful first.
        harmful = Case.of(number, 1).harmful
        return math.log(0.7 if (token_id == watched[0]) == harmful else 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the flagged folder whose tokenizer is spoken")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step", type=float, default=0.03, help="seconds per token, on average")
    arguments = parser.parse_args()
    upstream = Upstream(Tongue(arguments.model), arguments.step)
    app = web.Application(client_max_size=64 << 20)
    app.add_routes([web.get("/v1/models", upstream.models), web.post("/v1/completions", upstream.complete)])
    web.run_app(app, host="127.0.0.1", port=arguments.port, print=lambda *words: None, access_log=None)


if __name__ == "__main__":
    main()
