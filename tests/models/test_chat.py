"""Chat templates from files, and what is wrong with some of them."""

import pytest
from chat_tokenizers import CHATML, GEMMA, MISTRAL, chatml, gemma, phi

from rlhf_jax.models import load_tokenizer, render_chat
from rlhf_jax.models.chat import (
    check_spells_none,
    set_chat_template,
    special_token_pattern,
)
from rlhf_jax.models.tiny import byte_tokenizer
from rlhf_jax.models.tokenizer import token_texts

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            CHATML,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
        ),
        (MISTRAL, "[INST] Hi[/INST] Hello<|endoftext|>"),
    ],
)
def test_a_template_from_a_file_is_saved_with_the_tokenizer(tmp_path, template, text):
    (tmp_path / "x.jinja").write_text(template, "utf-8")
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    set_chat_template(tokenizer, tmp_path / "x.jinja", name="chat-template")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.chat_template == template
    assert render_chat(again, CHAT, add_generation_prompt=False) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "the chat template is broken in line 1: "),
        ("a\n{{ m. }}", "the chat template is broken in line 2: "),
        ("", "drops the content of the user message"),
        ("{{ messages[0].content }}", "drops the content of the assistant message"),
        ("{{ messages[7].content }}", "rejects the roles user: "),
        ("{{ messages[0].content + 1 }}", "rejects the roles user: "),
        ("{{ raise_exception('no\nno') }}", "rejects the roles user: no no"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "the prompt changes when the response is added",
        ),
    ],
)
def test_bad_templates(tmp_path, template, message):
    path = tmp_path / "bad.jinja"
    path.write_text(template, "utf-8")
    with pytest.raises(ValueError) as caught:
        set_chat_template(byte_tokenizer(), path, name="chat-template")
    text = str(caught.value)
    assert text.startswith(f"chat-template='{path}': ") and message in text
    assert "\n" not in text


def test_unreadable_templates(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jinja: no such file"):
        set_chat_template(byte_tokenizer(), tmp_path / "no.jinja", name="t")
    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bad\.jinja: not UTF-8 text"):
        set_chat_template(byte_tokenizer(), tmp_path / "bad.jinja", name="t")


def test_a_template_that_refuses_system_messages():
    assert "System role not supported" in GEMMA
    messages = [{"role": "system", "content": "Be kind."}, *CHAT]
    with pytest.raises(ValueError) as caught:
        render_chat(gemma(), messages, add_generation_prompt=False)
    assert str(caught.value) == (
        "the chat template rejects the roles system, user, assistant: "
        "System role not supported"
    )


def test_special_tokens_are_found_whole():
    special = special_token_pattern(chatml())
    for text in ("<|im_end|>", "so<|im_end|>", "<|endoftext|>", "a <|pad|> b"):
        with pytest.raises(ValueError, match=r"contains the special token '<\|"):
            check_spells_none([{"role": "user", "content": text}], special)
    with pytest.raises(ValueError, match=r"'<\|im_start\|>'"):
        check_spells_none([{"role": "<|im_start|>", "content": "a"}], special)
    fine = "im_end <|im_end <|IM_END|> <|im_ start|>"
    check_spells_none([{"role": "user", "content": fine}], special)


@pytest.mark.parametrize("make", [byte_tokenizer, chatml, gemma])
@pytest.mark.parametrize("text", ["", "a", " Hello  there\n\n", "größe 日本 🤗!"])
def test_texts_of_tokens_make_up_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and texts[-1] == tokenizer.eos_token
    assert "".join(texts) == text + tokenizer.eos_token


def test_a_character_of_several_tokens_belongs_to_the_last():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aöb", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids) == ["a", "", "ö", "b"]
    assert token_texts(tokenizer, ids[:2]) == ["a", "\ufffd"]  # broken off


def test_bytes_that_follow_each_other_are_decoded_in_groups():
    tokenizer = phi()
    text = " Reykjavík 日本Hello"
    ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == text.strip()
