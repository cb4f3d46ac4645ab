"""The PyTorch classes of `transformers`: padding on either side, and files both ways.

`test_family_parity.py` has the outputs of every family.
"""

import numpy as np
import pytest

from rlhf_jax.models import load_pretrained, save_pretrained
from rlhf_jax.models.rope import Llama3RopeScaling
from rlhf_jax.models.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # whole modules, float32

# Head size 8 and base 10,000 give wavelengths of 6, 63, 628 and 6283 tokens; lengths 64
# / 4 and 64 / 1 are the bounds, so that one is kept, one blended and two stretched.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_SCALING = Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
)


def gpt2(**options):
    return transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, num_labels=1, **options,
    )  # fmt: skip


def llama(**options):
    return transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, num_labels=1, **options,
    )  # fmt: skip


CONFIGS = {
    "gpt2": lambda: gpt2(),
    "llama3-rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
}


def random_model(auto_class, name):
    """Every parameter drawn, also those that start at 0 or 1."""
    torch.manual_seed(0)
    model = auto_class.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def torch_forward(model, tokens, mask):
    mask = torch.tensor(mask.copy())
    # Left to itself the forward pass counts positions from the padding on.
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=mask.long(),
            position_ids=positions,
            output_hidden_states=True,
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_their_checkpoint(name, tmp_path, run, batch):
    theirs = random_model(transformers.AutoModelForCausalLM, name)
    theirs.save_pretrained(tmp_path)
    module, params = load_pretrained(tmp_path)
    tokens, mask = batch
    for side in (mask, mask[:, ::-1]):
        ours = run(module, params, tokens, side)
        want = torch_forward(theirs, tokens, side).logits.numpy()
        np.testing.assert_allclose(ours[side], want[side], **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_values_of_their_classifier(name, tmp_path, run, batch):
    theirs = random_model(transformers.AutoModelForSequenceClassification, name)
    theirs.save_pretrained(tmp_path)
    tokens, mask = batch
    for side in (mask, mask[:, ::-1]):
        padded = np.where(side, tokens, 1)  # their score sits before the last pad id
        want = torch_forward(theirs, padded, side)
        scores = run(*load_pretrained(tmp_path, head="reward"), padded, side)
        np.testing.assert_allclose(scores, want.logits[:, 0].numpy(), **TOLERANCE)
        every = theirs.score(want.hidden_states[-1])[..., 0].detach().numpy()
        values = run(*load_pretrained(tmp_path, head="value"), padded, side)
        np.testing.assert_allclose(values[side], every[side], **TOLERANCE)


OURS = {
    "gpt2": lambda head: tiny_gpt2(head, vocab_size=40),
    "llama": lambda head: tiny_llama(head, vocab_size=40),
    "llama3-tied": lambda head: tiny_llama(
        head, vocab_size=40, tie_embeddings=True, rope_scaling=LLAMA3_SCALING
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_they_read_our_language_model(name, tmp_path, run, batch):
    module, params = OURS[name]("lm")
    save_pretrained(tmp_path, module, params, max_shard_bytes=20_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    tokens, mask = batch
    want = torch_forward(theirs.eval(), tokens, mask).logits.numpy()
    ours = run(module, params, tokens, mask)
    np.testing.assert_allclose(ours[mask], want[mask], **TOLERANCE)


@pytest.mark.parametrize("name", OURS)
def test_they_read_our_reward_model(name, tmp_path, run, batch):
    module, params = OURS[name]("reward")
    tokenizer = byte_tokenizer()
    save_pretrained(tmp_path, module, params, tokenizer=tokenizer)
    auto = transformers.AutoModelForSequenceClassification
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == 1  # the byte tokenizer's
    tokens, mask = batch
    tokens = np.where(mask, tokens, 1)
    want = torch_forward(theirs.eval(), tokens, mask).logits[:, 0].numpy()
    np.testing.assert_allclose(run(module, params, tokens, mask), want, **TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_their_half_precision_shards(dtype, tmp_path):
    theirs = random_model(transformers.AutoModelForCausalLM, "llama3-rope")
    theirs.to(dtype=getattr(torch, dtype)).save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    _, params = load_pretrained(tmp_path)
    want = theirs.model.layers[1].self_attn.q_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(params["layers"]["query"]["kernel"][1], want.T)


@pytest.mark.parametrize("tied", [True, False])
def test_their_trunk_alone_has_no_prefix(tied, tmp_path):
    theirs = transformers.GPT2Model(gpt2(tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path)
    if tied:
        _, params = load_pretrained(tmp_path)
        embedding = theirs.wte.weight.detach().numpy()
        np.testing.assert_array_equal(params["token_embedding"], embedding)
    else:
        with pytest.raises(ValueError, match=r"has no lm_head\.weight"):
            load_pretrained(tmp_path)
