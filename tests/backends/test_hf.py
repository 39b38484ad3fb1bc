from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from redflag.backends import Sampling
from redflag.backends.choose import Chooser
from redflag.backends.head import head_agrees
from redflag.backends.hf import HFBackend
from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec

PROMPT = [20, 30, 40, 50, 60, 70, 21, 31, 41, 51, 61]
GREEDY = Sampling(max_new_tokens=20, temperature=0.0)


def true_probs(model, token_ids, flag_ids):
    """Softmax over all raw logits of one plain forward pass, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(token_ids)])).logits[0].double()
    return logits.softmax(-1)[:, list(flag_ids)].numpy()


def tokens(steps):
    return [step.token_id for step in steps]


def test_probabilities_are_the_softmax_of_a_plain_forward_pass_over_the_whole_vocabulary(backend, model, spec):
    for sampling in (GREEDY, Sampling(max_new_tokens=20, temperature=2.5, top_k=5, repetition_penalty=2.0, seed=0)):
        steps = list(backend.stream(PROMPT, sampling))
        expected = true_probs(model, PROMPT + tokens(steps), spec.ids)[len(PROMPT) - 1 : -1]
        np.testing.assert_allclose([step.flag_probs for step in steps], expected, atol=1e-5, rtol=1e-3)


def test_greedy_tokens_are_those_of_generate_with_the_flags_suppressed(backend, model, spec):
    for penalty in (1.0, 1.7):
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([PROMPT]),
                attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
                max_new_tokens=20,
                do_sample=False,
                suppress_tokens=list(spec.ids),
                repetition_penalty=penalty,
            )[0, len(PROMPT) :].tolist()
        sampling = Sampling(max_new_tokens=20, temperature=0.0, repetition_penalty=penalty)
        assert tokens(backend.stream(PROMPT, sampling)) == expected


def test_a_flag_is_never_chosen_even_when_it_is_almost_certain(build, tokenizer, spec):
    model = build("llama")
    model.get_output_embeddings().bias = torch.nn.Parameter(
        torch.zeros(len(tokenizer)).index_fill(0, torch.tensor(spec.ids[:1]), 1e4)
    )
    for sampling in (GREEDY, Sampling(max_new_tokens=20, seed=0), Sampling(max_new_tokens=20, top_k=1, seed=0)):
        backend = HFBackend(model, tokenizer, spec)
        steps = list(backend.stream(PROMPT, sampling))
        assert all(step.flag_probs[0] > 0.99 for step in steps)
        assert not set(tokens(steps)) & set(spec.ids)


def test_draws_follow_the_distribution_without_the_flag():
    logits = torch.tensor([2.0, 1.0, 0.0, 5.0, -2.0])  # the flag, 3, is the most likely
    draws = 4000
    chooser = Chooser(Sampling(seed=0), [[]] * draws, torch.tensor([3]), logits.device)
    steps = chooser.step(logits.repeat(draws, 1), range(draws))
    (probs,) = {step.flag_probs for step in steps}
    assert probs == pytest.approx([float(logits.softmax(-1)[3])])
    expected = logits.index_fill(0, torch.tensor([3]), -math.inf).double().softmax(-1).numpy()
    found = np.bincount(tokens(steps), minlength=5) / draws
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()


@pytest.mark.parametrize(
    ("option", "kept"),
    [({"top_k": 3}, 3), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1), ({"temperature": 1e-4}, 1)],
)
def test_draws_stay_within_what_the_options_keep(backend, option, kept):
    found = {next(backend.stream(PROMPT, Sampling(max_new_tokens=1, seed=s, **option))).token_id for s in range(40)}
    assert len(found) <= kept


def test_without_a_seed_draws_follow_torchs_global_generator(backend):
    torch.manual_seed(3)
    first = tokens(backend.stream(PROMPT, Sampling(max_new_tokens=8)))
    torch.manual_seed(3)
    assert tokens(backend.stream(PROMPT, Sampling(max_new_tokens=8))) == first


class CountedForwards:
    """Counts the tokens that run through a model."""

    def __init__(self, model):
        self.tokens = 0
        self.handle = model.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, module, args, kwargs):
        self.tokens += kwargs["input_ids"].numel()


@pytest.mark.parametrize("length", [1, 5, 6, 11, 16])
def test_an_edited_prefix_gives_what_a_fresh_backend_gives(backend, model, tokenizer, spec, length):
    response = tokens(backend.stream(PROMPT, GREEDY))
    edited = [*(PROMPT + response)[:length], 33, 44]
    again = list(backend.stream(edited, GREEDY))
    fresh = list(HFBackend(model, tokenizer, spec, reuse_prefix=False).stream(edited, GREEDY))
    assert tokens(again) == tokens(fresh)
    np.testing.assert_allclose(
        [step.flag_probs for step in again], [step.flag_probs for step in fresh], atol=1e-5, rtol=1e-3
    )


def test_only_the_new_end_of_a_prompt_is_run(build, tokenizer, spec):
    model = build("llama")
    backend = HFBackend(model, tokenizer, spec)
    stream = backend.stream(PROMPT, GREEDY)
    next(stream)
    stream.close()
    counted = CountedForwards(model)
    for prompt, expected in (([*PROMPT, 33], 1), ([*PROMPT[:8], 44], 1), (PROMPT[:5], 1), ([99, *PROMPT], 12)):
        counted.tokens = 0
        stream = backend.stream(prompt, GREEDY)
        next(stream)
        stream.close()
        assert counted.tokens == expected, prompt
    backend.forget()
    counted.tokens = 0
    next(backend.stream([99, *PROMPT], GREEDY))
    assert counted.tokens == 12


def test_a_full_sliding_window_is_run_anew_instead_of_being_cut(build, tokenizer, spec):
    model = build("gemma3")
    backend = HFBackend(model, tokenizer, spec)
    counted = CountedForwards(model)
    # The window holds 8: 5 prompt tokens can be cut back, 12 cannot, and going on needs no cut.
    for first, then, expected in (
        (PROMPT[:5], [*PROMPT[:3], 90], 1),
        (PROMPT, [*PROMPT[:6], 90], 7),
        (PROMPT, [*PROMPT, 90], 1),
    ):
        backend.forget()
        stream = backend.stream(first, GREEDY)
        next(stream)
        stream.close()
        counted.tokens = 0
        stream = backend.stream(then, GREEDY)
        next(stream)
        stream.close()
        assert counted.tokens == expected


def test_a_fault_in_a_forward_pass_leaves_no_cache_for_the_next_prompt(build, tokenizer, spec):
    model = build("llama")
    backend = HFBackend(model, tokenizer, spec)
    fresh = tokens(backend.stream(PROMPT, GREEDY))
    backend.forget()
    stream = backend.stream(PROMPT, GREEDY)
    next(stream)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.get_decoder().layers[1].register_forward_pre_hook(fail)  # the first layer's cache is longer then
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)
    handle.remove()
    assert tokens(backend.stream(PROMPT, GREEDY)) == fresh


def test_nan_logits_give_a_nan_step_which_is_the_last(backend, model):
    capped = getattr(model.config, "final_logit_softcapping", None)  # makes a number of infinity
    for value in (math.nan,) if capped else (math.nan, math.inf):
        backend.forget()
        handle = model.get_output_embeddings().register_forward_hook(
            lambda _m, _i, out, value=value: out.index_fill(-1, torch.tensor([77]), value)
        )
        for sampling in (GREEDY, Sampling(seed=0, top_p=0.9)):
            steps = list(backend.stream(PROMPT, sampling))
            assert len(steps) == 1 and all(map(math.isnan, steps[0].flag_probs))
        assert [len(steps) for steps in backend.complete([PROMPT, PROMPT[:3]], GREEDY)] == [1, 1]
        assert np.isnan(backend.score([(PROMPT, [5, 6])])[0]).all()
        handle.remove()
    assert len(list(backend.stream(PROMPT, GREEDY))) > 1


def test_a_closed_stream_frees_its_cache(build, tokenizer, spec, monkeypatch):
    import redflag.backends.hf as hf

    caches = []

    def remembered(**options):
        cache = hf_cache(**options)
        caches.append(weakref.ref(cache))
        return cache

    hf_cache = hf.DynamicCache
    monkeypatch.setattr(hf, "DynamicCache", remembered)
    backend = HFBackend(build("llama"), tokenizer, spec)
    streams = [backend.stream([i, *PROMPT], GREEDY) for i in range(10, 15)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    gc.collect()
    assert sum(cache() is not None for cache in caches) == 1  # the one kept for the next prompt
    backend.forget()
    gc.collect()
    assert all(cache() is None for cache in caches)


def test_complete_gives_the_steps_of_stream_for_prompts_of_any_length(backend):
    prompts = [PROMPT, PROMPT[:2], [99] * 17, PROMPT[3:7], [101], [20] * 60, PROMPT[:2]]
    for sampling, batch_size in (
        (GREEDY, 3),
        (Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=1.5), 16),
    ):
        together = backend.complete(prompts, sampling, batch_size=batch_size)
        for prompt, steps in zip(prompts, together, strict=True):
            alone = list(backend.stream(prompt, sampling))
            assert tokens(steps) == tokens(alone)
            np.testing.assert_allclose(
                [step.flag_probs for step in steps], [step.flag_probs for step in alone], atol=1e-5, rtol=1e-3
            )


def test_row_i_of_a_seeded_batch_draws_as_a_stream_with_seed_plus_i(backend):
    together = backend.complete([PROMPT, PROMPT, PROMPT[:4]], Sampling(max_new_tokens=10, seed=4))
    for index, prompt in enumerate([PROMPT, PROMPT, PROMPT[:4]]):
        assert tokens(together[index]) == tokens(backend.stream(prompt, Sampling(max_new_tokens=10, seed=4 + index)))


def test_scores_of_a_response_are_the_probabilities_streamed_with_it(backend):
    prompts = [PROMPT, PROMPT[:2], [99] * 17, [101]]
    streamed = [list(backend.stream(prompt, Sampling(max_new_tokens=15, seed=i))) for i, prompt in enumerate(prompts)]
    for batch_size in (1, 2, 16):
        scores = backend.score(
            [(prompt, tokens(steps)) for prompt, steps in zip(prompts, streamed, strict=True)], batch_size=batch_size
        )
        for steps, score in zip(streamed, scores, strict=True):
            assert score.dtype == np.float32 and score.shape == (len(steps), 2)
            np.testing.assert_allclose(score, [step.flag_probs for step in steps], atol=1e-4)


def test_scoring_nothing_gives_empty_arrays(backend):
    assert backend.score([]) == []
    assert [score.shape for score in backend.score([(PROMPT, []), (PROMPT, [4])])] == [(0, 2), (1, 2)]


@pytest.mark.parametrize(("pair", "named"), [(([], [5]), "prompt 1 must"), (([20] * 40, [5] * 25), "got 65")])
def test_a_conversation_that_cannot_be_scored_is_named(backend, pair, named):
    with pytest.raises(RedflagError, match=named):
        backend.score([(PROMPT, [5]), pair])


def test_scoring_holds_only_a_few_positions_logits(backend, model, monkeypatch):
    import redflag.backends.head as head

    monkeypatch.setattr(head, "_LOGITS_AT_ONCE", 3 * 300)
    sizes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: sizes.append(out.numel()))
    pairs = [(PROMPT, [5] * 30), (PROMPT[:3], [6] * 20)]
    chunked = backend.score(pairs)
    handle.remove()
    assert len(sizes) > 10 and max(sizes[2:]) <= 3 * 300
    monkeypatch.undo()
    for one, other in zip(chunked, backend.score(pairs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


SMALL = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
)


def other_families():
    torch.manual_seed(0)
    yield CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3))
    yield GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=7.0))
    yield GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1)
    )


@pytest.mark.parametrize("family", range(3))
def test_families_that_scale_their_logits_are_scored_as_they_are_streamed(family, tokenizer, spec):
    model = list(other_families())[family].eval()
    assert head_agrees(model, torch.tensor([PROMPT]))
    backend = HFBackend(model, tokenizer, spec)
    steps = list(backend.stream(PROMPT, Sampling(max_new_tokens=10, seed=0)))
    score = backend.score([(PROMPT, tokens(steps))])[0]
    np.testing.assert_allclose(score, [step.flag_probs for step in steps], atol=1e-4)
    assert tokens(backend.complete([PROMPT[:3], PROMPT], GREEDY)[1]) == tokens(backend.stream(PROMPT, GREEDY))


def test_a_head_that_is_not_understood_is_found_out_and_scored_by_the_whole_model(tokenizer, spec):
    model = next(other_families()).eval()
    model.logit_scale = 2.0  # not what the configuration says
    assert not head_agrees(model, torch.tensor([PROMPT]))
    backend = HFBackend(model, tokenizer, spec)
    steps = list(backend.stream(PROMPT, Sampling(max_new_tokens=10, seed=0)))
    score = backend.score([(PROMPT, tokens(steps)), (PROMPT[:2], [5])])[0]
    np.testing.assert_allclose(score, [step.flag_probs for step in steps], atol=1e-4)


def test_adapters_stay_in_force(build, tokenizer, spec):
    from peft import LoraConfig, get_peft_model

    plain = build("llama")
    before = HFBackend(plain, tokenizer, spec).score([(PROMPT, [5, 6, 7])])[0]
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    backend = HFBackend(adapted, tokenizer, spec)
    steps = list(backend.stream(PROMPT, GREEDY))
    np.testing.assert_allclose(
        backend.score([(PROMPT, tokens(steps))])[0], [step.flag_probs for step in steps], atol=1e-4
    )
    after = backend.score([(PROMPT, [5, 6, 7])])[0]
    assert np.abs(after - before).max() > 1e-4


def test_a_flag_id_outside_the_models_vocabulary_is_refused(model, tokenizer):
    with pytest.raises(RedflagError, match="5000"):
        HFBackend(model, tokenizer, FlagSpec(flags=(Flag("harm", "<|x|>", id=5000),)))


def test_eos_ids_come_from_generation_configuration_model_and_tokenizer(build, tokenizer, spec):
    model = build("llama")
    model.generation_config.eos_token_id = [8, 9]
    assert HFBackend(model, tokenizer, spec).eos_ids == {1, 8, 9}
