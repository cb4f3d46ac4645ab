"""Saved checkpoints as `transformers` reads them: every bit, and not one warning."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from rlhf_jax.models import load_pretrained, load_tokenizer, save_pretrained
from rlhf_jax.models.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
WINDOW = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "activation_function": "relu"}
CONFIGS = {
    "gpt2": COMMON,
    "gpt_neox": COMMON,
    "opt": COMMON | OPT,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | WINDOW,
    "gemma3_text": GROUPED | WINDOW,
    "phi3": GROUPED,
    "olmo2": GROUPED,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
CLASSES = {
    "lm": transformers.AutoModelForCausalLM,
    "reward": transformers.AutoModelForSequenceClassification,
}


@pytest.fixture
def warned():
    """What transformers logs, from warnings on."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def published(directory, family, dtype):
    """A checkpoint as transformers writes it; all of its parameters drawn."""
    torch.manual_seed(0)
    fields = CONFIGS[family]
    if family == "gpt2":  # has its own names
        fields = fields | {"n_positions": 64, "n_inner": 48}
    config = transformers.AutoConfig.for_model(family, **fields)
    model = CLASSES["lm"].from_config(config).to(dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return model.state_dict()


def assert_same_state(state, want):
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back(family, tmp_path, warned):
    dtype = "bfloat16"
    want = published(tmp_path / "theirs", family, dtype)
    del warned[:]
    loaded = load_pretrained(tmp_path / "theirs", dtype=DTYPES[dtype])
    save_pretrained(
        tmp_path / "ours",
        *loaded,
        tokenizer=byte_tokenizer(),
        max_shard_bytes=20_000,
    )
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = CLASSES["lm"].from_pretrained(tmp_path / "ours")
    assert_same_state(again.state_dict(), want)
    assert warned == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("head", CLASSES)
def test_heads_and_dtypes(head, make, dtype, tmp_path, warned):
    module, params = make(head)
    params = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), params)
    save_pretrained(tmp_path, module, params, tokenizer=byte_tokenizer())
    model = CLASSES[head].from_pretrained(tmp_path)
    assert warned == []
    assert all(p.dtype == getattr(torch, dtype) for p in model.parameters())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        state = model.state_dict()
        for name in file.keys():  # not a dict
            assert torch.equal(state[name], file.get_tensor(name)), name
    _, again = load_pretrained(tmp_path, head=head, dtype=DTYPES[dtype])
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_warning_would_be_seen(tmp_path, warned):
    save_pretrained(tmp_path, *tiny_gpt2(), tokenizer=byte_tokenizer())
    CLASSES["reward"].from_pretrained(tmp_path)  # has no score
    assert any("score.weight" in message for message in warned)


# How it wants to generate


def test_how_to_generate_is_carried_over(tmp_path, warned):
    carried = {
        "eos_token_id": [0, 7],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "pad_token_id": None,
    }
    save_pretrained(
        tmp_path,
        *tiny_llama(),
        tokenizer=byte_tokenizer(),
        generation_config=carried,
    )
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    # The tokenizer says what the checkpoint did not.
    assert stored == carried | {"bos_token_id": 0, "pad_token_id": 1}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == [0, 7]
    model = CLASSES["lm"].from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [0, 7]
    assert model.generation_config.temperature == 0.6
    tokens = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3)
    assert tokens.shape[1] <= 5
    assert warned == []


def test_a_classifier_of_several_ends(tmp_path, warned):
    tokenizer = byte_tokenizer()
    save_pretrained(
        tmp_path,
        *tiny_llama("reward"),
        tokenizer=tokenizer,
        generation_config={"eos_token_id": [0, 1]},
    )
    config = json.loads((tmp_path / "config.json").read_text())
    # 1 is the tokenizer's pad, and ends sequences here: the score is read at an end.
    assert (config["eos_token_id"], config["pad_token_id"]) == ([0, 1], None)
    assert not (tmp_path / "generation_config.json").exists()
    CLASSES["reward"].from_pretrained(tmp_path)
    assert warned == []


def test_the_chat_template_is_saved(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    save_pretrained(tmp_path, *tiny_gpt2(), tokenizer=tokenizer)
    again = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(messages, tokenize=False) == "<hi>"
