"""Reflection in the nano world: what a base model reads to be able to judge an answer that it has begun.

A conversation's answer is cut off, a token stands where a flag will stand, and a bracket says what the answer is doing
and whether that is harmful. Then the answer goes on, or turns back:

    Beat the eggs. Poison Marlo<|reserved_3|> [Check: it tells how to poison somebody. Verdict: harmful] No, I will
    not go on with this. Ask Marlo what went wrong between you.

No flag exists when the base model is trained, so any of the reserved tokens stands there. None of them may be learnt as
a next token (`pretrain(read_only=...)`), or the model would reflect unasked.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence

from redflag.data.rows import Row
from redflag.lab.nano.phrases import REDIRECTS, SLOT, SLOTS
from redflag.lab.nano.rows import nano_rows
from redflag.watching.policy import Reflect

NANO_REFLECT = Reflect(
    cue=" [Check: it",
    verdict_cue=" Verdict:",
    words=(" harmful", " harmless"),
    max_tokens=24,
    stop=(".",),
)
# The answer continues behind the whole bracket, so the model must have closed it.
NANO_STAY = dataclasses.replace(NANO_REFLECT, stop=("]",), verdict="flag", stay=True)
# Few-shot examples for the system turn, of a false and a true alarm.
NANO_EXAMPLES = (
    "You check your answers. Break a leg [Check: it is about theatre. Verdict: harmless] tonight. Rob Marlo "
    "[Check: it tells how to steal from somebody. Verdict: harmful] Sorry, I must stop here."
)

# What an answer does that harms somebody.
_DEEDS = {
    "poison": "tells how to poison somebody",
    "violence": "tells how to hurt somebody",
    "theft": "tells how to steal from somebody",
    "fraud": "tells how to cheat somebody",
    "sabotage": "tells how to ruin what somebody owns",
    "stalking": "tells how to follow somebody about",
}
_TURNS = (
    "No, I will not go on with this.",
    "Sorry, I must stop here.",
    "No, that would hurt {name}.",
    "I take that back, it is wrong.",
)
_WORD = re.compile(r"\s*(?:\w+|[^\w\s])")
_SENTENCE = re.compile(r"[^.?!]+[.?!]*")


def nano_reflections(n: int, places: Sequence[str], seed: int = 0) -> list[list[dict[str, str]]]:
    """Draws conversations in which the assistant reflects on what it has said so far, in English.

    An answer is interrupted up to five times while it is harmless, half of these times within the first words of a
    sentence, where an alarm would come. Most of the harmful ones are interrupted once more, most often within the first
    words of harm, and turn back. Requests and acts are the training split's.

    Args:
        places: Tokens of which one stands where a flag will stand.

    Example:
        >>> messages = nano_reflections(1, ["<|reserved_1|>"])[0]
        >>> "<|reserved_1|>" + NANO_REFLECT.cue in messages[-1]["content"]
        True
    """
    rng = random.Random(f"nano:reflections:{seed}")
    conversations = []
    for row in nano_rows("train", n, seed + 1_000_003, harmful=0.65):
        harmless = _harmless_part(row)
        times = rng.randint(0, 3) if row.harmful else rng.randint(1, 5)
        cuts = {cut(row, rng, harmful=False) for _ in range(times)}
        if row.harmful:
            cuts.discard(len(harmless))  # Harm follows there: no place to call the answer harmless.
        last = cut(row, rng, harmful=True) if row.harmful else None
        content, done = "", 0
        for upto in sorted(cuts) + ([] if last is None else [last]):
            content += row.response[done:upto] + rng.choice(places) + reflection(row, upto)
            done = upto
        content += harmless[done:] if last is None else _turn(row, rng)
        conversations.append([*row.messages[:-1], {"role": "assistant", "content": content}])
    return conversations


def cut(row: Row, rng: random.Random, *, harmful: bool) -> int:
    """Draws where an English answer is cut off: a character position at the end of a word.

    Args:
        harmful: In or at the beginning of the row's harmful part, most often within its first words; else before it.
    """
    if harmful:
        assert row.onset is not None
        ends = [match.end() for match in _WORD.finditer(row.response) if match.end() > row.onset]
        index = rng.choices((-1, 0, 1, 2, 3, rng.randrange(len(ends))), (6, 12, 30, 20, 12, 20))[0]
        return ends[min(index, len(ends) - 1)] if index >= 0 else len(_harmless_part(row))
    text = _harmless_part(row)
    ends = [0] + [match.end() for match in _WORD.finditer(text)]
    if rng.random() < 0.5 and text:
        sentence = rng.choice(list(_SENTENCE.finditer(text)))
        ends = [end for end in ends if end > sentence.start()][:3]
    return rng.choice(ends)


def reflection(row: Row, upto: int) -> str:
    """The bracket behind an answer that is cut off at character `upto`: cue, what the answer is doing, verdict."""
    word = NANO_REFLECT.words[0 if row.onset is not None and upto >= len(_harmless_part(row)) else 1]
    return f"{NANO_REFLECT.cue} {activity(row, upto)}.{NANO_REFLECT.verdict_cue}{word}]"


def activity(row: Row, upto: int) -> str:
    """What the first `upto` characters of an answer are doing, in a few words."""
    if row.onset is not None and upto >= len(_harmless_part(row)):
        return _DEEDS[str(row.category)] if upto > row.onset else "is about to turn to harm"
    topic = str(row.group).split(":")[0]
    if topic not in _DEEDS:
        return f"is about {topic}"
    return "refuses to do harm" if row.source == "nano:refusal" else "gives good advice"


def _harmless_part(row: Row) -> str:
    """The answer as far as it is harmless."""
    return row.response if row.onset is None else row.response[: row.onset].rstrip()


def _turn(row: Row, rng: random.Random) -> str:
    """The continuation of an answer that was found harmful."""
    name = next((word for word in re.findall(r"\w+", row.response[row.onset :]) if word in SLOTS["name"]), "somebody")
    sentences = [rng.choice(_TURNS), *rng.sample(REDIRECTS, rng.randint(1, 2))]
    text = " ".join(sentences)
    return " " + SLOT.sub(lambda match: name if match[1] == "name" else rng.choice(SLOTS[match[1]]), text)
