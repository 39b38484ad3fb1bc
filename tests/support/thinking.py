"""What models with a thinking mode write, by their released tokenizers."""

from __future__ import annotations

from test_real_tokenizers import world

from redflag.control_tokens import content_ids
from redflag.thoughts import thought_marks
from redflag.watching.thresholds import Thresholds

ASK = [{"role": "user", "content": "Hi"}]


def encoded(tokenizer, text):
    """Ids of a text, marks in it spelled out in ordinary tokens."""
    return content_ids(tokenizer, text, tokenizer.added_tokens_decoder.keys())[0] if text else []


def written(name, thought="Let me think.", answer="Hello there", *, end=True):
    """The ids that a model writes behind an opened thought, and where its answer begins."""
    tokenizer, _ = world(name)
    marks = thought_marks(tokenizer)
    early = [*encoded(tokenizer, thought + marks.before_end), *marks.end_ids]
    late = encoded(tokenizer, marks.before_answer + answer)
    return [*early, *late, *([tokenizer.eos_token_id] if end else [])], len(early)


def limits(spec, answer=0.5, thought=None):
    named = {"run_id": spec.run_id, "template_hash": spec.template_hash}
    own = None if thought is None else Thresholds.manual(thought, spec.categories, **named)
    values = dict.fromkeys(spec.categories, answer)
    return Thresholds(values, thoughts=own, **named)
