"""A tokenizer with more tokens than its model has embeddings for."""

import pytest

from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models import save_pretrained
from rlhf_jax.models.tiny import byte_tokenizer, tiny_llama
from rlhf_jax.recipes.networks import check_fits

SIZES = {"needed": 8, "name": "the model", "why": "max-tokens"}


@pytest.fixture
def model(tmp_path):
    """Saves a model of 258 tokens with a given tokenizer; its shape and tokenizer."""

    def save(tokenizer):
        module, params = tiny_llama(vocab_size=258)
        save_pretrained(tmp_path, module, params, tokenizer=tokenizer)
        return module.config, Tokenization.load(tmp_path)

    return save


def test_a_special_token_beyond_is_no_matter_until_a_text_has_it(model):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    shape, tokenization = model(tokenizer)
    assert len(tokenization.tokenizer) == 259
    check_fits(shape, tokenization, **SIZES)
    assert tokenization.encoder.prompts(["ab"]) == [[66, 67]]  # "!", byte 33, is 2
    with pytest.raises(ValueError, match=r'"a<image>" has the token 258, .* only 258'):
        tokenization.encoder.prompts(["ab", "a<image>"])


def test_an_ordinary_token_beyond_is_refused(model):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["hello"])
    shape, tokenization = model(tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer has 259 tokens, .* for 258"):
        check_fits(shape, tokenization, **SIZES)


def test_an_end_of_answers_beyond_is_refused(model):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    shape, tokenization = model(tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer has 259 tokens, .* for 258"):
        check_fits(shape, tokenization, **SIZES)
