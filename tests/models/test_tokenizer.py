import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.models import load_tokenizer, render_chat, train_tokenizer
from rlhf_jax.models.tiny import byte_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "über-große Bäume"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_added_or_tidied(tokenizer):
    text = " a , b .  don't\r\n\t日本 🤗 e\u0301 \x00 "
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token == "<|endoftext|>" == tokenizer.bos_token
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id]
    padded = tokenizer(["the", "the cat sat"], padding=True)
    assert padded["attention_mask"][0][0] == 0  # on the left


def test_merges_are_learned_and_deterministic(tokenizer):
    assert len(tokenizer.encode(" the cat")) < len(b" the cat")
    again = train_tokenizer(TEXTS, vocab_size=300)
    assert again.get_vocab() == tokenizer.get_vocab()
    backend = again.backend_tokenizer.to_str()
    assert backend == tokenizer.backend_tokenizer.to_str()


def test_saved_and_read_by_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    again.save_pretrained(tmp_path / "again")
    for path in tmp_path.glob("*.json"):  # a load leaves no trace
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.encode(" the, Bäume") == tokenizer.encode(" the, Bäume")
    ids = ("eos_token_id", "pad_token_id", "bos_token_id", "padding_side")
    for name in ids:
        assert getattr(again, name) == getattr(tokenizer, name)


def test_byte_tokenizer_has_one_token_per_byte():
    tokenizer = byte_tokenizer()
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        258,
        0,
        1,
    )
    assert len(tokenizer.encode("größe")) == len("größe".encode())


def test_vocabulary_without_room_for_the_bytes():
    with pytest.raises(ValueError, match=r"vocab_size=257 .* at least 258"):
        train_tokenizer(TEXTS, vocab_size=257)


def without(directory, *fields):
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in fields}))


def test_eos_is_needed_and_stands_in_for_pad(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    without(tmp_path, "pad_token")
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id
    without(tmp_path, "eos_token")
    with pytest.raises(ValueError, match="has no EOS token"):
        load_tokenizer(tmp_path)


def test_directories_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="is not a directory, and the Hugging Face"):
        load_tokenizer("nobody/has-this")
    with pytest.raises(ValueError, match="nothing-here is not a directory"):
        load_tokenizer(tmp_path / "nothing-here")
    with pytest.raises(ValueError, match="has no tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def test_chat_without_a_template(tokenizer):
    text = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye"
    assert render_chat(tokenizer, CHAT, add_generation_prompt=False) == text
    prompt = render_chat(tokenizer, CHAT, add_generation_prompt=True)
    assert prompt == text + "\n\nAssistant:"
    system = [{"role": "system", "content": "Be kind."}, *CHAT]
    assert render_chat(tokenizer, system, add_generation_prompt=False) == (
        "Be kind." + text
    )


def test_chat_with_a_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = render_chat(tokenizer, CHAT[:1], add_generation_prompt=True)
    assert text == "<user>Hi<|endoftext|><assistant>"


def test_conversations_that_make_no_sense(tokenizer):
    with pytest.raises(ValueError, match="messages is empty"):
        render_chat(tokenizer, [], add_generation_prompt=True)
    for messages in (
        [{"role": "tool", "content": "1"}],
        [*CHAT, {"role": "system", "content": "late"}],
    ):
        role = messages[-1]["role"]
        with pytest.raises(ValueError, match=rf"messages\[\d\] has role='{role}'"):
            render_chat(tokenizer, messages, add_generation_prompt=False)
