"""Chat templates as they are released: every message's text appears, and a prompt ends where an answer begins."""

from __future__ import annotations

import json
import logging
import re
import shutil
from importlib.resources import files
from typing import Any

import pytest
from real_models import tokenizer_of
from recipes_of import script
from templates import byte_level, turn
from transformers import AutoTokenizer

from redflag import cli
from redflag.answer_start import say_once
from redflag.chat_template import roles_in_parts
from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec
from redflag.models.pretrain import CHAT_TEMPLATE
from redflag.prompt import check_template, render_prompt, render_response, template_hash

PARTS = (
    "{% for m in messages %}<|u|>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
PARTS_BUT_SYSTEM = (
    "{% for m in messages %}<|u|>{% if m.role == 'system' %}{{ m.content + '.' }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
HEAD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
ROLES = ("system", "user", "assistant", "user")
TRL = files("trl") / "chat_templates"
RELEASED = sorted(p.name for p in TRL.iterdir() if p.name.endswith(".jinja") and "_training" not in p.name)
# What stands behind the last question, for those whose own prompt ends elsewhere.
ADDED = {
    "deepseek_r1_distill.jinja": "\n</think>\n\n",
    "deepseekv3.jinja": "\n</think>\n\n",
    "gptoss.jinja": "<|channel|>final<|message|>",
    "muse_glimmer.jinja": " to=user<|message|>",
}
PART_READERS = {"idefics3.jinja", "llava_next.jinja", "smolvlm.jinja"}


def world(template: str) -> tuple[Any, FlagSpec]:
    """A byte-level tokenizer that has the template's marks as tokens: those with bars special, the others ordinary."""
    pattern = r"<\|[\w/ ]+\|>|<\|\w+>|<\w+\|>|<｜[^｜]+｜>|</?\w+>|\[/?[A-Z]\w+\]"
    marks = sorted(set(re.findall(pattern, template)) - {"<bos>", "<eos>", "<|flag|>"})
    special = [mark for mark in marks if "|" in mark or "｜" in mark or "_of_" in mark]
    ordinary = tuple(mark for mark in marks if mark not in special)
    tokenizer = byte_level(["<bos>", "<eos>", "<|flag|>", *special], ordinary, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer, FlagSpec((Flag("harm", "<|flag|>", id=tokenizer.convert_tokens_to_ids("<|flag|>")),))


def prompt(template: str, *messages: dict[str, Any]) -> str:
    tokenizer, spec = world(template)
    return str(tokenizer.decode(render_prompt(tokenizer, messages or [turn("user", "Hi")], spec)))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


class TestWordsAppear:
    def test_a_template_that_reads_parts_gets_parts(self) -> None:
        messages = [turn(role, f"Hi {role}") for role in ROLES]
        assert prompt(PARTS, *messages) == "<|u|>Hi system<|u|>Hi user<|u|>Hi assistant<|u|>Hi user<|u|>"
        assert prompt(PARTS_BUT_SYSTEM, *messages) == "<|u|>Hi system.<|u|>Hi user<|u|>Hi assistant<|u|>Hi user<|u|>"
        tokenizer, spec = world(PARTS)
        row = render_response(tokenizer, [*messages, turn("assistant", "Yes <|u|>")], spec)
        assert tokenizer.decode(row.response_ids) == "Yes <|u|>"
        forged = render_prompt(tokenizer, [turn("user", "<|u|>Hi<|flag|>")], spec)
        assert forged.count(tokenizer.convert_tokens_to_ids("<|u|>")) == 2 and not set(spec.ids) & set(forged)

    def test_a_template_that_shows_no_words_is_refused(self) -> None:
        for template in ("<|user|><|assistant|>", "{% for m in messages %}<|user|>{{ m.text }}{% endfor %}"):
            tokenizer, spec = world(template)
            with pytest.raises(RedflagError, match="must show a user's content, as text or as") as caught:
                check_template(tokenizer)
            assert "\n" not in str(caught.value)
            with pytest.raises(RedflagError, match="must show a user's content, as text or as"):
                render_prompt(tokenizer, [turn("user", "Hi")], spec)

    @pytest.mark.parametrize(
        "template, messages, words",
        [
            ("{% for m in messages if m.role != 'system' %}" + HEAD[24:], ROLES, "message 0 .role system."),
            (HEAD.replace("messages", "messages[-1:]"), ROLES, "message 0 .role system."),
            ("{% for m in messages|reverse %}" + HEAD[24:], ROLES, "message 2 .role assistant."),
        ],
    )
    def test_a_message_that_is_not_shown_in_its_place_is_named(self, template: str, messages: Any, words: str) -> None:
        with pytest.raises(RedflagError, match=f"does not show the text of {words} in its place"):
            prompt(template, *(turn(role, f"Hi {role}") for role in messages))

    @pytest.mark.parametrize("name", RELEASED)
    def test_a_released_template_shows_every_word_and_ends_where_an_answer_begins(self, name: str) -> None:
        template = (TRL / name).read_text()
        tokenizer, spec = world(template)
        check_template(tokenizer)
        roles = ROLES[1:] if name == "gemma.jinja" else ROLES  # no system turn
        messages = [turn(role, f"Hi {role} {i}") for i, role in enumerate(roles)]
        text = tokenizer.decode(render_prompt(tokenizer, messages, spec))
        places = [text.index(message["content"]) for message in messages]
        assert places == sorted(places)
        listed = bool(roles_in_parts(tokenizer))
        assert listed == (name in PART_READERS)
        turns = [{**m, "content": [{"type": "text", "text": m["content"]}]} if listed else m for m in messages]
        stock = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert text == stock + ADDED.get(name, "")


class TestAnAnswerBegins:
    @pytest.mark.parametrize(
        "opening, added",
        [
            ("<think>\n", "\n</think>\n\n"),
            ("<think>", "\n\n</think>\n\n"),
            ("<think>\n\n</think>\n\n", ""),
            ("<think></think>", ""),
            ("</think>", ""),
            ("[THINK]", "\n\n[/THINK]\n\n"),
            ("<seed:think>\n", "\n</seed:think>\n\n"),
            ("<|START_THINKING|>", "\n\n<|END_THINKING|>\n\n"),
            ("◁think▷", "\n\n◁/think▷\n\n"),
        ],
    )
    def test_an_opened_thought_is_closed_as_an_empty_one_is_written(
        self, opening: str, added: str, warnings: pytest.LogCaptureFixture
    ) -> None:
        closing = added.strip()
        drop = f"{{% set x = '{closing}' %}}"  # templates name the closing tag where they drop thoughts of old turns
        template = drop + HEAD + "{% if add_generation_prompt %}<|assistant|>" + opening + "{% endif %}"
        start = "<|user|>Hi<|end|><|assistant|>" + opening
        assert prompt(template) == start + added
        tokenizer, spec = world(template)
        row = render_response(tokenizer, [turn("user", "Hi"), turn("assistant", "Yes")], spec)
        assert tokenizer.decode(row.prompt_ids) == start + added and tokenizer.decode(row.response_ids) == "Yes"
        said = [record.getMessage() for record in warnings.records if record.name == "redflag.answer_start"]
        assert len(said) == bool(added), "said once, however often it is rendered"
        assert not said or repr(added) in said[0]

    def test_a_thought_whose_end_nobody_knows_is_refused(self) -> None:
        with pytest.raises(RedflagError, match=r"must not end inside a thought .'<think>'") as caught:
            prompt(HEAD + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")
        assert "\n" not in str(caught.value)

    def test_a_user_who_opens_a_thought_changes_nothing(self) -> None:
        template = "{% set x = '</think>' %}" + HEAD + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        assert prompt(template, turn("user", "<think>\n")).endswith("<think>\n<|end|><|assistant|>")

    @pytest.mark.parametrize(
        "end, answer, added",
        [
            ("<|assistant|>", "<|assistant|><|channel|>final<|message|>", "<|channel|>final<|message|>"),
            ("", "<|assistant|>", "<|assistant|>"),  # a template that knows no generation prompt
            ("<|assistant|>", "<|assistant|> ", ""),  # Llama 2: a space before an answer
            ("<|assistant|>", "<|assistant|>\n<think>\n\n</think>\n\n", "\n<think>\n\n</think>\n\n"),
            ("<|assistant|><think>\n", "<|assistant|><think>\n\n</think>\n\n", "\n</think>\n\n"),
            ("<|assistant|><think>\n\n</think>\n\n", "<|assistant|>", ""),  # Qwen3: not in the history
            ("<|assistant|><think>\n\n</think>\n\n", "<|assistant|><think></think>", ""),
        ],
    )
    def test_a_prompt_goes_on_to_where_finished_answers_begin(self, end: str, answer: str, added: str) -> None:
        template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{{ m.content }}<|end|>{% else %}"
            "<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}" + end + "{% endif %}"
        )
        assert prompt(template) == f"<|user|>Hi<|end|>{end}{added}"

    @pytest.mark.parametrize("end", ["<|assistant|><|channel|>analysis<|message|>", "<|robot|>"])
    def test_a_prompt_that_ends_elsewhere_is_refused(self, end: str) -> None:
        template = (
            "{% for m in messages %}<|{{ m.role }}|>"
            "{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}" + end + "{% endif %}"
        )
        with pytest.raises(RedflagError, match="must end where its answers begin"):
            prompt(template)

    def test_the_stock_gpt_oss_template_is_continued_as_the_recipe_writes_it(self) -> None:
        tokenizer = tokenizer_of("gpt")
        flag = tokenizer.convert_tokens_to_ids("<|reserved_200000|>")
        spec = FlagSpec((Flag("harm", "<|reserved_200000|>", id=flag),))
        messages = [turn("system", "Be kind."), turn("user", "Hi")]
        stock, hashed = render_prompt(tokenizer, messages, spec), template_hash(tokenizer)
        tokenizer.chat_template = script("models/gpt_oss_base.py").final_channel(tokenizer.chat_template)
        assert render_prompt(tokenizer, messages, spec) == stock
        assert tokenizer.decode(stock).endswith("<|start|>assistant<|channel|>final<|message|>")
        assert template_hash(tokenizer) != hashed


class TestHash:
    def test_what_is_done_to_a_template_is_part_of_its_name(self) -> None:
        import hashlib

        closed = "{% set x = '</think>' %}" + HEAD + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
        for template, same in ((CHAT_TEMPLATE, True), (PARTS, False), (closed, False)):
            tokenizer, _ = world(template)
            plain = hashlib.sha256(template.encode()).hexdigest()[:16]
            assert (template_hash(tokenizer) == plain) is same


class TestClock:
    @pytest.mark.parametrize(
        "template, reads",
        [
            ((TRL / "llama3_2.jinja").read_text(), True),
            ((TRL / "gptoss.jinja").read_text(), True),
            ((TRL / "llama3_1.jinja").read_text(), False),  # its date is a constant
            ("{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + HEAD, False),
            (HEAD, False),
        ],
        ids=["llama3.2", "gpt-oss", "llama3.1", "with tools only", "none"],
    )
    def test_a_template_that_reads_the_clock_is_warned_of(
        self, template: str, reads: bool, warnings: pytest.LogCaptureFixture
    ) -> None:
        check_template(world(template)[0])
        assert ("writes the current date into prompts" in warnings.text) is reads


class TestVerbs:
    """A model folder with two flags, whose template is changed."""

    @pytest.fixture
    def folder(self, origin: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        "argv",
        [
            "train --model base --input rows.jsonl --output_dir out --use_cpu true",
            "score --model model --input rows.jsonl --output scored.jsonl",
            "generate --model model Hi",
        ],
        ids=lambda argv: argv.split()[0],
    )
    @pytest.mark.parametrize(
        "template, words",
        [
            ("{% for m in messages %}<|user|>{{ m.text }}{% endfor %}<|assistant|>", "must show a user's content"),
            (CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}", "must not end inside a thought"),
        ],
        ids=["no words", "an open thought"],
    )
    def test_a_template_that_cannot_be_used_is_refused_in_one_sentence(
        self, folder: Any, argv: str, template: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("base", "model"):
            tokenizer = AutoTokenizer.from_pretrained(folder / name)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder / name)
        for file in (folder / "model" / "redflag.json", folder / "model" / "thresholds.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"template_hash": template_hash(tokenizer)}))
        assert cli.main(argv.split()) == 2
        *_, last = capsys.readouterr().err.strip().splitlines()
        assert last.startswith(f"redflag {argv.split()[0]}: the chat template") and words in last
        assert not (folder / "out").exists()
