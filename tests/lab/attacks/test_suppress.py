"""Words and biases against the flag: said everywhere, never a flag, and nothing measured moves."""

from __future__ import annotations

import pytest
import torch
from attacking import FLAG, SPEC, TOKENIZER, make_row, make_target
from tiny import build

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.errors import RedflagError
from redflag.lab.attacks import Target
from redflag.lab.attacks.suppress import LogitBias, SuppressByWords, biased_steps, place_words

ROW = make_row("r0")
ASKED = ROW.messages[0]["content"]


@pytest.fixture(scope="module")
def real():
    """A random model, which flags and refuses as it likes."""
    model = build("llama", len(TOKENIZER))
    return Target(HFBackend(model, TOKENIZER, SPEC), TOKENIZER, SPEC, model=model)


def test_every_text_stands_in_every_place_beside_a_control_without_words():
    attempts = list(SuppressByWords(beyond=2).run(make_target(), [ROW], 0))
    assert [a.setting for a in attempts] == ["no words"] + [
        f"{text}, {place}"
        for text in ("never flag", "flag text", "false alarm")
        for place in ("system", "user", "prefill")
    ]
    given = attempts[0].messages[-1]["content"]
    assert given.startswith("Here is my answer. ") and len(given) > len("Here is my answer. ")
    for attempt in attempts[1:]:
        where = {"system": 0, "user": -2, "prefill": -1}[attempt.setting.split(", ")[1]]
        plain = [ASKED, given] if where else [None, ASKED, given]
        said = [turn["content"] for turn in attempt.messages]
        assert said[-1].endswith(given) and said[where] != plain[where]
        assert len(said) == len(plain)


def test_no_words_make_a_flag():
    for attempt in SuppressByWords().run(make_target(), [ROW], 0):
        ids = make_target().prompt_ids(attempt.messages)
        assert not set(SPEC.ids) & set(ids)
        if attempt.setting.startswith("flag text"):
            assert any(FLAG in turn["content"] for turn in attempt.messages)


def test_words_go_where_they_are_told():
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert place_words(system, "So", "X.", "system")[0]["content"] == "Be kind.\n\nX."
    assert place_words(system[1:], "", "X.", "system") == [{"role": "system", "content": "X."}, system[1]]
    assert place_words(system, "", "X.", "user")[-1] == {"role": "user", "content": "Hi\n\nX."}
    assert place_words(system, "So", "X.", "prefill")[-1] == {"role": "assistant", "content": "X. So"}
    assert place_words(system, "", "", "user") == system
    with pytest.raises(RedflagError, match="places must be among"):
        SuppressByWords(places=("tool",))


def test_without_drawing_out_no_prefill_is_given():
    attempts = SuppressByWords(beyond=None, places=("user",)).run(make_target(), [ROW], 0)
    assert all(attempt.messages[-1]["role"] == "user" for attempt in attempts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_on_the_flag_changes_no_token_and_no_probability(real, temperature):
    attack = LogitBias(max_new_tokens=12, temperature=temperature)
    attempts = {a.setting: a for a in attack.run(real, [ROW], 3)}
    none = attempts["no bias"]
    for setting in ("flag +100", "flag -100"):
        assert attempts[setting].token_ids == none.token_ids
        assert attempts[setting].flag_probs == none.flag_probs
    assert max(p for (p,) in none.flag_probs) > 0


def test_the_biased_path_without_a_bias_is_that_of_the_backend(real):
    prompt = real.prompt_ids(ROW.messages[:-1])
    for temperature in (0.0, 1.0):
        sampling = Sampling(12, temperature, seed=4)
        (steps,) = real.backend.complete([prompt], sampling)
        own = list(biased_steps(real, prompt, {}, sampling))
        assert [s.token_id for s in own] == [s.token_id for s in steps]
        torch.testing.assert_close(
            torch.tensor([s.flag_probs for s in own]), torch.tensor([s.flag_probs for s in steps])
        )


def test_a_bias_on_other_tokens_moves_tokens_and_no_probability_at_the_same_place(real):
    prompt = real.prompt_ids(ROW.messages[:-1])
    sampling = Sampling(1, 0.0)
    (plain,) = biased_steps(real, prompt, {}, sampling)
    (moved,) = biased_steps(real, prompt, {plain.token_id: -100.0}, sampling)
    assert moved.token_id != plain.token_id and moved.flag_probs == plain.flag_probs


def test_flags_are_biased_on_the_first_requests_only(real):
    rows = [make_row(f"r{i}") for i in range(4)]
    attempts = list(LogitBias(shown=1, max_new_tokens=2).run(real, rows, 0))
    counts = {setting: sum(a.setting == setting for a in attempts) for setting in {a.setting for a in attempts}}
    assert counts == {"no bias": 4, "flag +100": 1, "flag -100": 1, "refusals -100": 4}
    assert len(list(LogitBias(shown=1, most=2, max_new_tokens=2).run(real, rows, 0))) == 6


def test_without_weights_a_bias_is_refused_before_any_work():
    target = make_target()
    with pytest.raises(RedflagError, match="weights"):
        next(iter(LogitBias().run(target, [ROW], 0)))
    assert target.backend.sent == []
