"""The nano world: generated conversations whose onset is known exactly, for demos and tests without a download.

It is language-like and free of content: people, substances, passes and machines are invented. What makes it worth
training on is what makes the real task hard. Words alone decide nothing: every frightening word has a harmless use, and
every harmful act is also refused, warned of and reported. The prompt alone decides nothing: harmful requests are
refused, redirected or obeyed, and answers to innocent ones turn harmful in the middle.

What makes it easier than the real task: **its onsets are readable**. A harmful passage opens, with few exceptions, with
an order whose first two tokens ("Poison Marlo", "Steal Marlo") are rare in harmless text, and most of the late turns
are announced by a pivot sentence ("But there is a darker use for all this."), which now and then announces nothing. So
the delay of an alarm is well defined to a token or two; in real text it is not. Results here show that the machinery
works, not how well the method does.

The `onset` is the first character of the first harmful sentence; a pivot is not harmful. In the `prefilled` kinds the
response starts in the middle of a sentence, as after a prefill; then the onset is 0.

Splits share vocabulary and sentence patterns but no request and no harmful act: each request (topic and its key words)
and each act (with its names and things) belongs to one split by its hash.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from redflag.data.rows import Row
from redflag.lab.nano import phrases

Split = Literal["train", "calibration", "test", "transfer"]

NANO_CATEGORIES: tuple[str, ...] = tuple(phrases.ACTS)
NANO_TOPICS: tuple[str, ...] = tuple(phrases.TOPICS)
HARMLESS_KINDS: dict[str, float] = {
    "plain": 0.32,  # a request and its answer
    "scary": 0.32,  # the same, in frightening words
    "refusal": 0.16,  # a harmful request, refused
    "redirect": 0.13,  # a harmful request, answered with something better
    "prefilled-harmless": 0.07,  # the response starts in mid-sentence
}
HARMFUL_KINDS: dict[str, float] = {
    "late": 0.45,  # a harmless request and several harmless sentences, then harm
    "late-request": 0.15,  # a harmful request, a preamble, then harm
    "direct": 0.2,  # a harmful request, obeyed at once
    "disguised": 0.12,  # a harmless request, harm at once
    "prefilled": 0.08,  # the response starts in the middle of harm
}
NANO_KINDS: tuple[str, ...] = (*HARMLESS_KINDS, *HARMFUL_KINDS)

# Which twentieths of the hash space belong to a split.
_SHARES: dict[str, range] = {
    "train": range(12),
    "calibration": range(12, 15),
    "test": range(15, 18),
    "transfer": range(18, 20),
}
_TAILS = (" {when}", " {when}", " {how}", "")
_NAMES = frozenset(phrases.SLOTS["name"]) | frozenset(phrases.SLOTS["city"])
_FRIGHTENING = frozenset(
    [act.split()[0] for acts in phrases.ACTS.values() for act in acts]
    + ["bomb", "murder", "die", "dies", "dead", "killer", "killed", "strike", "blow", "crash", "destroy", "slay"]
    + ["trigger", "poisoned", "sacrifice", "hijack", "drown", "choke", "strip"]
)


def nano_rows(split: Split, n: int, seed: int = 0, *, harmful: float = 0.4) -> list[Row]:
    """Draws labelled conversations.

    Args:
        split: `train`, `calibration` and `test` are in English; `transfer` is in the second language throughout. No two
            splits share a request or a harmful act.
        n: The first rows of a longer draw are those of a shorter one.
        seed: Same seed, same rows, on any machine.
        harmful: Share of rows with a harmful response.

    Returns:
        Rows with `id`, `group` (rows with the same request share it), `source` ("nano:" and one of `NANO_KINDS`), in a
        harmful row `category` (one of `NANO_CATEGORIES`) and always `onset`.

    Example:
        >>> row = next(row for row in nano_rows("train", 50) if row.source == "nano:late")
        >>> row.onset > 0 and row.response[row.onset - 1] == " "
        True
    """
    translate = velni if split == "transfer" else None
    return _draw(split, n, random.Random(f"nano:{split}:{seed}"), f"nano-{split}-{seed}", harmful, translate)


def nano_pretraining_rows(n: int, seed: int = 0) -> list[Row]:
    """Draws conversations for a base model that knows the world, harm included, and both languages.

    Three quarters are English, an eighth is in the second language, the rest asks for translations. All requests and
    acts are those of the training split.
    """
    rng = random.Random(f"nano:pretraining:{seed}")
    name = f"nano-pretraining-{seed}"
    foreign, parallel = n // 8, n // 8
    rows = _draw("train", n - foreign - parallel, rng, f"{name}-en", 0.4, None)
    rows += _draw("train", foreign, rng, f"{name}-velni", 0.4, velni)
    rows += [_translation(rng, f"{name}-pair-{i}") for i in range(parallel)]
    rng.shuffle(rows)
    return rows


def velni(text: str) -> str:
    """Translates into the second language: word for word, articles as endings, names kept.

    Words are made from a hash of their stem; plural, past and -ing forms have endings of their own, so that the
    language is regular and can be learnt from pairs.

    Example:
        >>> velni("the kettle"), velni("two kettles"), velni("Ask Marlo.")
        ('mebuldeo', 'senlen mebuldeir', 'Minal Marlo.')
    """
    text = re.sub(r"\b([Aa]n?|[Tt]he) ([A-Za-z]+)", _article, text)
    return re.sub(r"[A-Za-z]+~?", _word, text)


def _article(match: re.Match[str]) -> str:
    article, noun = match.groups()
    if noun in _NAMES:
        return noun
    noun = noun[0].upper() + noun[1:] if article[0].isupper() else noun
    return noun + "~" if article.lower() == "the" else noun


def _word(match: re.Match[str]) -> str:
    word = match.group()
    definite = word.endswith("~")
    word = word.rstrip("~")
    if word in _NAMES:
        return word
    stem, ending = word.lower(), ""
    for suffix, foreign in (("ing", "ur"), ("ed", "ak"), ("s", "ir")):
        if len(stem) > len(suffix) + 2 and stem.endswith(suffix) and not stem.endswith("ss"):
            stem, ending = stem[: -len(suffix)], foreign
            break
    result = _stem(stem) + ending + ("o" if definite else "")
    return result.capitalize() if word[0].isupper() else result


def _stem(stem: str) -> str:
    number = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big")
    syllables = 1 if len(stem) <= 2 else 2 if len(stem) <= 5 else 3
    letters = []
    for _ in range(syllables):
        number, consonant = divmod(number, 14)
        number, vowel = divmod(number, 5)
        number, coda = divmod(number, 4)
        letters.append("bdfgklmnprstvz"[consonant] + "aeiou"[vowel] + ("", "", "l", "n")[coda])
    return "".join(letters)


@dataclass
class _Scene:
    """One conversation while it is made: which split it belongs to and what its slots hold."""

    split: str
    rng: random.Random
    words: dict[str, str] = field(default_factory=dict)

    def fill(self, template: str) -> str:
        """Fills the slots; a slot at the beginning gets a capital."""
        text = phrases.SLOT.sub(lambda match: self.word(match.group(1)), template)
        return text[0].upper() + text[1:] if template.startswith("{") else text

    def word(self, slot: str) -> str:
        if slot == "act":
            return self.act(self.rng.choice(NANO_CATEGORIES))
        if slot in ("when", "how", "number") and slot not in self.words:
            return self.rng.choice(phrases.SLOTS[slot])  # not kept: another one each time, unless the request fixes it
        if slot not in self.words:
            if slot in ("a", "b"):
                self.words[slot] = str(self.rng.randrange(2, 90))
            elif slot == "sum":
                self.words[slot] = str(int(self.word("a")) + int(self.word("b")))
            else:
                self.words[slot] = self.rng.choice(phrases.SLOTS[slot])
        return self.words[slot]

    def act(self, category: str) -> str:
        """A harmful act of this split. The name is kept if it can be; everything else is drawn anew."""
        keep = {"name": self.word("name")}
        for attempt in range(10_000):
            self.words = {**self.words, **keep}
            fresh = _Scene(self.split, self.rng, dict(keep) if attempt < 200 else {})
            text = fresh.fill(self.rng.choice(phrases.ACTS[category]))
            if _belongs(text, self.split):
                self.words = {**self.words, **fresh.words}
                return text
        raise AssertionError(f"no act of {category} belongs to {self.split}")

    def pick(self, templates: tuple[str, ...], count: int = 1) -> list[str]:
        return [self.fill(template) for template in self.rng.sample(templates, min(count, len(templates)))]


def _belongs(key: str, split: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 20 in _SHARES[split]


def _draw(
    split: str, n: int, rng: random.Random, name: str, harmful: float, translate: Callable[[str], str] | None
) -> list[Row]:
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < n:
        kinds = HARMFUL_KINDS if rng.random() < harmful else HARMLESS_KINDS
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        row = _conversation(split, kind, rng, f"{name}-{len(rows)}", translate)
        text = repr(row.messages)
        if text not in seen:
            seen.add(text)
            rows.append(row)
    return rows


def _conversation(split: str, kind: str, rng: random.Random, name: str, translate: Callable[[str], str] | None) -> Row:
    scene = _Scene(split, rng)
    category = rng.choice(NANO_CATEGORIES)
    earlier = _earlier(split, rng) if rng.random() < 0.12 else []
    topic, group, act = "", "", ""
    if kind in ("refusal", "redirect", "late-request", "direct") or (kind == "prefilled" and rng.random() < 0.5):
        act = scene.act(category)
        group = f"{category}: {act}"
        prompt = rng.choice(phrases.REQUESTS).replace("{act}", act)
    else:
        topic, group, prompt = _request(scene)

    before: list[str] = []
    after: list[str] = []
    if kind in ("plain", "scary", "prefilled-harmless"):
        before = _answer(scene, topic, scary=kind == "scary")
    elif kind == "refusal":
        before = _maybe(scene, phrases.PREAMBLES, 0.3)
        before += [rng.choice(phrases.REFUSALS).replace("{act}", act).replace("{name}", scene.word("name"))]
        before += scene.pick(phrases.REDIRECTS, rng.randint(1, 2))
    elif kind == "redirect":
        before = _maybe(scene, phrases.PREAMBLES, 0.6) + scene.pick(phrases.REDIRECTS, rng.randint(2, 4))
    else:
        if kind == "late":
            before = _answer(scene, topic, closing=False)
        elif kind == "late-request":
            before = scene.pick(phrases.PREAMBLES, rng.randint(1, 2)) + scene.pick(phrases.REDIRECTS, rng.randint(0, 1))
        if kind in ("late", "late-request"):
            before += _maybe(scene, phrases.PIVOTS, 0.6)
        after = _harm(scene, category, act, least=2 if kind == "prefilled" else 1)

    sentences = before + after
    if kind.startswith("prefilled"):
        # The rest of a sentence whose first words were put into the model's mouth.
        sentences[0] = sentences[0].split(" ", rng.randint(1, 2) if kind == "prefilled-harmless" else 1)[-1]
    messages = [*earlier, {"role": "user", "content": prompt}]
    if rng.random() < 0.15:
        messages.insert(0, {"role": "system", "content": scene.fill(rng.choice(phrases.SYSTEMS))})
    if translate is not None:
        sentences = [translate(sentence) for sentence in sentences]
        messages = [{"role": m["role"], "content": translate(m["content"])} for m in messages]
    messages.append({"role": "assistant", "content": " ".join(sentences)})
    onset = len(" ".join(sentences[: len(before)])) + 1 if before else 0
    return Row(
        messages,
        category=category if after else None,
        onset=onset if after else None,
        group=group,
        source=f"nano:{kind}",
        id=name,
        lang="en" if translate is None else "velni",
        onset_source="constructed" if after else None,
    )


def _request(scene: _Scene) -> tuple[str, str, str]:
    """A harmless request that belongs to the split: its topic, group and text."""
    while True:
        name = scene.rng.choice(NANO_TOPICS)
        draft = _Scene(
            scene.split, scene.rng, {k: v for k, v in scene.words.items() if k not in phrases.TOPICS[name].key}
        )
        draft.words.update({slot: draft.word(slot) for slot in phrases.TOPICS[name].key})
        group = f"{name}: " + ", ".join(draft.words[slot] for slot in phrases.TOPICS[name].key)
        if _belongs(group, scene.split):
            scene.words.update(draft.words)
            return name, group, scene.fill(scene.rng.choice(phrases.TOPICS[name].prompts))


def _answer(scene: _Scene, name: str, *, scary: bool = False, closing: bool = True) -> list[str]:
    """A harmless answer of two to six sentences."""
    rng, topic = scene.rng, phrases.TOPICS[name]
    sentences = _maybe(scene, topic.openers, 0.6)
    steps = list(topic.steps)
    rng.shuffle(steps)
    if scary:
        steps.sort(key=lambda step: not _FRIGHTENING & set(re.findall(r"[a-z]+", step.lower())))
    steps = steps[: rng.randint(2, 4)]
    rng.shuffle(steps)
    for step in steps:
        # A pivot that announces nothing: rare enough to leave onsets readable, common enough to be no proof.
        sentences += _maybe(scene, phrases.PIVOTS, 0.005)
        text = scene.fill(step)
        if rng.random() < 0.15:
            text = text[:-1] + scene.fill(rng.choice(_TAILS)) + "."
        sentences.append(text if step.startswith(("{", "Never")) else _lead(rng, text))
    return sentences + (_maybe(scene, topic.closers, 0.5) if closing else [])


def _harm(scene: _Scene, category: str, act: str, least: int) -> list[str]:
    """One to four sentences, the first `least` or more of them orders to do harm."""
    rng = scene.rng
    sentences = []
    for _ in range(rng.randint(least, 2)):
        act = act or scene.act(category)
        tail = scene.fill(rng.choice(_TAILS))
        order = f"You can {act}{tail}." if rng.random() < 0.05 else _lead(rng, f"{act[0].upper()}{act[1:]}{tail}.")
        sentences.append(order)
        act = ""
    return sentences + scene.pick(phrases.AFTERMATH, rng.randint(0, 2))


def _lead(rng: random.Random, sentence: str) -> str:
    """Sometimes opens a sentence with a word without meaning."""
    if rng.random() > 0.1:
        return sentence
    first = sentence.split(" ")[0].rstrip(".,'s")
    return rng.choice(("Then ", "Next, ", "First, ", "Quietly, ")) + (
        sentence if first in _NAMES or first == "I" else sentence[0].lower() + sentence[1:]
    )


def _earlier(split: str, rng: random.Random) -> list[dict[str, str]]:
    """One earlier exchange, always harmless: an answer, or a refusal."""
    scene = _Scene(split, rng)
    if rng.random() < 0.3:
        act = scene.act(rng.choice(NANO_CATEGORIES))
        prompt, answer = (
            rng.choice(phrases.REQUESTS).replace("{act}", act),
            [rng.choice(phrases.REFUSALS[:6]).replace("{act}", act)],
        )
    else:
        topic, _, prompt = _request(scene)
        answer = scene.pick(phrases.TOPICS[topic].steps, 2)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": " ".join(answer)}]


def _maybe(scene: _Scene, templates: tuple[str, ...], chance: float) -> list[str]:
    return scene.pick(templates) if scene.rng.random() < chance else []


def _translation(rng: random.Random, name: str) -> Row:
    scene = _Scene("train", rng)
    category = None
    if rng.random() < 0.5:
        text = scene.fill(rng.choice(rng.choice(list(phrases.TOPICS.values())).steps))
    else:
        category = rng.choice(NANO_CATEGORIES)
        act = scene.act(category)
        text = f"{act[0].upper()}{act[1:]}{scene.fill(rng.choice([' {when}', ' {how}', '']))}."
    source, answer = (text, velni(text)) if rng.random() < 0.7 else (velni(text), text)
    messages = [
        {"role": "user", "content": f"Translate: {source}"},
        {"role": "assistant", "content": answer},
    ]
    return Row(messages, category, 0 if category else None, None, source="nano:translation", id=name)
