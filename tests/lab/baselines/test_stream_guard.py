"""The streaming guard is fed what has been written and nothing more, and read after each of its tokens."""

import json

import pytest
import torch
from stand_in_guard import InWords, Streaming, levels_of

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.baselines.stream_guard import StreamGuard, stream_guard

ROW = Row([{"role": "user", "content": "tell cat"}, {"role": "assistant", "content": "the cat sat on a mat"}])


def test_each_step_is_the_verdict_on_the_tokens_before_it(context):
    model = Streaming()
    guard = StreamGuard(context, model, context.tokenizer, "a guard")
    recording = guard.score([ROW])
    (read,) = context.read([ROW])
    opening, fed = model.fed[0][: -len(read.judged_ids) + 1], model.fed[0][-len(read.judged_ids) + 1 :]
    # Everything but the last token of the turn, after which nothing is judged.
    assert fed == read.judged_ids[:-1] and model.closed == 1
    for i, prob in enumerate(recording.probs[:, 0]):
        probs = torch.softmax(levels_of(opening + fed[:i]), dim=0)
        assert prob == pytest.approx(float(probs[1] + probs[2]), abs=1e-6)
    loose = StreamGuard(context, Streaming(), context.tokenizer, "a guard", strict=False).score([ROW])
    assert (loose.probs < recording.probs).all()


def test_a_guard_that_answers_in_words_is_read_by_the_winners_probability(context):
    model = InWords()
    recording = StreamGuard(context, model, context.tokenizer, "a guard").score([ROW])
    exact = StreamGuard(context, Streaming(), context.tokenizer, "a guard").score([ROW])
    assert model.roles[0] == "user" and set(model.roles[1:]) == {"assistant"}
    sure = [(p, q) for p, q in zip(recording.probs[:, 0], exact.probs[:, 0], strict=True) if q < 0.5]
    # A safe verdict leaves the rest to harm; a harmful one tells of the winner alone.
    assert sure and all(p == pytest.approx(q, abs=0.006) for p, q in sure)
    assert (recording.probs <= exact.probs + 0.006).all()


def test_a_guard_with_another_tokenizer_reads_whole_words(context):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(context.base)
    other.add_tokens(["zz"])
    model = Streaming()
    guard = StreamGuard(context, model, other, "a guard")
    (read,) = context.read([ROW])
    arriving = [other.decode(ids) for ids in guard._arriving(read)]
    written = ["", *(context.tokenizer.decode(read.judged_ids[:i]) for i in range(1, len(read.judged_ids)))]
    assert len(arriving) == len(written) == len(read.judged_ids)
    for i in range(len(written)):
        heard = "".join(arriving[: i + 1])
        assert written[i].startswith(heard)
        # Every word behind which another begins has been heard; at the end all have.
        assert heard == (written[i] if i == read.tokens else written[i].rpartition(" ")[0])
    assert "whole words" in guard.what


def folder_of_code(folder):
    """A guard as the hub has them: weights beside Python code that has to be trusted."""
    (folder / "tiny_guard.py").write_text(
        "import torch\nfrom transformers import PretrainedConfig, PreTrainedModel\n\n\n"
        "class TinyGuardConfig(PretrainedConfig):\n    model_type = 'tiny_guard'\n\n\n"
        "class TinyGuard(PreTrainedModel):\n    config_class = TinyGuardConfig\n\n"
        "    def __init__(self, config):\n        super().__init__(config)\n        self.line = torch.nn.Linear(2, 2)\n"
        "        self.post_init()\n\n"
        "    def stream_moderate_from_ids(self, token_ids, role, stream_state=None):\n"
        "        return {'risk_level': ['Unsafe'], 'risk_prob': [0.75], 'category': ['Violent']}, stream_state\n"
    )
    names = {"AutoConfig": "tiny_guard.TinyGuardConfig", "AutoModel": "tiny_guard.TinyGuard"}
    config = {"model_type": "tiny_guard", "architectures": ["TinyGuard"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    tensors = {"line.weight": torch.zeros(2, 2), "line.bias": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folders_code_runs_only_when_it_is_trusted(context, tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "guard"
    folder.mkdir()
    folder_of_code(folder)
    context.tokenizer.save_pretrained(folder)
    with pytest.raises(RedflagError, match="trust_remote_code"):
        stream_guard(context, folder)
    guard = stream_guard(context, folder, trust_remote_code=True)
    assert set(guard.score([ROW]).probs[:, 0].tolist()) == {0.75}


def test_without_a_folder_there_is_no_guard_and_a_wrong_one_is_refused(context, tmp_path):
    assert stream_guard(context) is None
    with pytest.raises(RedflagError, match="must be a local folder"):
        stream_guard(context, "Qwen/Qwen3Guard-Stream-0.6B", trust_remote_code=True)
    with pytest.raises(RedflagError, match="must be the whole folder"):
        stream_guard(context, tmp_path, trust_remote_code=True)
    with pytest.raises(RedflagError, match="must have stream_generate"):
        StreamGuard(context, torch.nn.Linear(1, 1), context.tokenizer, "a guard")
