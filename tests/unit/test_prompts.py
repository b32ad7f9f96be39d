"""Prompt templates: released, the tokenizer's own chat template, a text; where sound and BOS stand; bad ones."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_models

from sdumc.errors import UserError
from sdumc.pretrained.llm import PROMPTS, RELEASED, SpeechLLM, around_sound, resolve_template
from sdumc.pretrained.speech import check_projector_prompt

CHAT = (
    "{{ bos_token }}{% for m in messages %}the {{ m.role }} : {{ m.content | trim }} </s> {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("llm")))


@pytest.fixture
def tokenizer(folder):
    tokenizer = tiny_models.llm_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def resolve(value, tokenizer, prompt=PROMPTS["short"]):
    return resolve_template(value, prompt, tokenizer, "llm")


def test_auto_is_the_chat_template_where_there_is_one(tokenizer):
    chat = "<s>the user : {sound}{prompt} </s> ASSISTANT :"
    assert resolve("chat", tokenizer) == resolve("auto", tokenizer) == chat
    assert resolve(chat, tokenizer) == chat  # what is recorded can be given again
    tokenizer.chat_template = None
    assert resolve("auto", tokenizer) == resolve("released", tokenizer) == RELEASED


def test_the_date_in_a_chat_template_does_not_change(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert resolve("chat", tokenizer) == "26 Jul 2024 {sound}{prompt}"


@pytest.mark.parametrize(
    ("value", "chat", "message"),
    [
        ("chat", None, "has no chat template"),
        ("chat", "{{ bos_token }} a system prompt only", "drops the prompt"),
        ("chat", "{{ raise_exception('a system turn is needed') }}", "a system turn is needed"),
        ("USER: ASSISTANT:", None, "a text with {prompt} once"),
        ("{prompt} {prompt}", None, "a text with {prompt} once"),
        ("{sound}{prompt}{sound}", None, "at most once"),
    ],
)
def test_bad_templates_are_refused_before_the_weights_are_read(value, chat, message, folder, tokenizer, monkeypatch):
    tokenizer.chat_template = chat
    monkeypatch.setattr("sdumc.pretrained.llm.load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr("sdumc.pretrained.llm.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=message) as caught:
        SpeechLLM(folder, template=value)
    assert "\n" not in str(caught.value)


def test_text_around_the_sound():
    assert around_sound(RELEASED, "go. ") == ("", "{bos}USER: go. \n ASSISTANT:")
    assert around_sound("Q: {prompt} A:", "go. ") == ("", "{bos}Q: go. A:")
    assert around_sound("{bos}Q: {sound} {prompt} A:", "go. ") == ("{bos}Q: ", " go. A:")


def test_layout_of_a_chat(folder, tokenizer, monkeypatch):
    monkeypatch.setattr("sdumc.pretrained.llm.load_tokenizer", lambda _: tokenizer)
    llm = SpeechLLM(folder, template="auto", layers=[-1])
    sound = torch.randn(3, llm.dim)
    with_sound, without = llm.contexts([sound, None])
    before = llm.embed([llm.bos_id, *tokenizer("the user :", add_special_tokens=False)["input_ids"]])
    assert torch.equal(with_sound[: len(before)], before)
    assert torch.equal(with_sound[len(before) : len(before) + 3], sound)
    assert torch.equal(torch.cat([with_sound[: len(before)], with_sound[len(before) + 3 :]]), without)
    ids = tokenizer("Transcribe speech to text. </s> ASSISTANT :", add_special_tokens=False)["input_ids"]
    assert llm.chat_ids == ids
    # Words behind it and a transcript are read alike.
    written = llm.transcribe([with_sound], max_new_tokens=8)[0]
    again = llm.encode([with_sound], [written.tokens])[0]
    torch.testing.assert_close(again[: len(written.states)], written.states, rtol=1e-4, atol=1e-4)


def test_a_projector_goes_with_its_template(tmp_path):
    check_projector_prompt(str(tmp_path), "go", "any")  # one from elsewhere says nothing
    (tmp_path / "config.yaml").write_text("prompt: go\n")
    check_projector_prompt(str(tmp_path), "go", RELEASED)  # before templates could be chosen
    with pytest.raises(UserError, match="with the prompt template 'released', not 'Q: "):
        check_projector_prompt(str(tmp_path), "go", "Q: {prompt}")
    (tmp_path / "config.yaml").write_text("prompt: go\nprompt_template: 'Q: {prompt}'\n")
    check_projector_prompt(str(tmp_path), "go", "Q: {prompt}")
    with pytest.raises(UserError, match="not 'released'"):
        check_projector_prompt(str(tmp_path), "go", RELEASED)
