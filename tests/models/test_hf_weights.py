"""Checkpoints as files: what is stored, what is refused, what survives a crash."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import load_pretrained, save_pretrained, with_head
from rlhf_jax.models.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

FILE = "model.safetensors"


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    dtypes = jax.tree.map(lambda x: x.dtype, ours)
    assert dtypes == jax.tree.map(lambda x: x.dtype, theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def edit(directory, change):
    """Rewrites the tensors of a checkpoint."""
    tensors = load_file(directory / FILE)
    change(tensors)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(tensors, directory / FILE)


@pytest.mark.parametrize("head", ["lm", "value", "reward"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_round_trip(make, head, tmp_path):
    module, params = make(head)
    save_pretrained(tmp_path / "runs" / "model", module, params)
    again, loaded = load_pretrained(tmp_path / "runs" / "model", head=head)
    assert again == module
    assert_same(loaded, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_round_trip(dtype, tmp_path):
    module, params = tiny_llama()
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    save_pretrained(tmp_path, module, params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype.__name__
    again, loaded = load_pretrained(tmp_path, dtype=dtype)
    assert (again.dtype, again.param_dtype) == (dtype, dtype)
    assert_same(loaded, params)
    _, wider = load_pretrained(tmp_path)  # exact: float32 holds both
    assert_same(wider, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_gpt2_tensors_are_stored_as_published_ones_are(tmp_path):
    module, params = tiny_gpt2("reward")
    save_pretrained(tmp_path, module, params)
    with safe_open(tmp_path / FILE, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    stored = load_file(tmp_path / FILE)
    layers = params["layers"]
    fused = stored["transformer.h.1.attn.c_attn.weight"]  # [in, 3 · out], never turned
    np.testing.assert_array_equal(fused[:, :32], layers["query"]["kernel"][1])
    np.testing.assert_array_equal(fused[:, 32:64], layers["key"]["kernel"][1])
    np.testing.assert_array_equal(fused[:, 64:], layers["value"]["kernel"][1])
    bias = stored["transformer.h.0.attn.c_attn.bias"]
    np.testing.assert_array_equal(bias[32:64], layers["key"]["bias"][0])
    up = stored["transformer.h.0.mlp.c_fc.weight"]
    np.testing.assert_array_equal(up, layers["up"]["kernel"][0])
    assert stored["score.weight"].shape == (1, 32)
    assert "lm_head.weight" not in stored


def test_llama_tensors_are_stored_transposed(tmp_path):
    module, params = tiny_llama()
    save_pretrained(tmp_path, module, params)
    stored = load_file(tmp_path / FILE)
    # Turning makes them non-contiguous, which safetensors 0.8.0 would store scrambled.
    gate = stored["model.layers.1.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(gate, params["layers"]["gate"]["kernel"][1].T)
    head = stored["lm_head.weight"]
    np.testing.assert_array_equal(head, params["output_embedding"].T)


def test_parameters_may_be_views_of_numpy_arrays(tmp_path):
    module, params = tiny_llama()
    turned = jax.tree.map(lambda x: np.asfortranarray(np.asarray(x)), params)
    assert not turned["token_embedding"].flags.c_contiguous
    save_pretrained(tmp_path, module, turned)
    assert_same(load_pretrained(tmp_path)[1], params)


def test_shards(tmp_path):
    module, params = tiny_llama()
    save_pretrained(tmp_path, module, params, max_shard_bytes=30_000)
    # The embedding and the head are larger than that, and alone: 258 · 32 · 4 bytes.
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    total = 0
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 30_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == shard for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total
    assert_same(load_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_loading_onto_a_mesh(make, tmp_path):
    module, params = make("reward")
    save_pretrained(tmp_path, module, params)
    mesh = jax.make_mesh(
        (2, 4, 1), ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )  # fmt: skip
    _, loaded = load_pretrained(tmp_path, head="reward", mesh=mesh)
    assert_same(loaded, params)
    kernel = loaded["layers"]["down"]["kernel"]  # [2, 128 or 64, 32], split on 128
    _, rows, columns = kernel.shape
    shards = {shard.data.shape for shard in kernel.addressable_shards}
    assert shards == {(2, rows // 4, columns)}
    key = loaded["layers"]["key"]["kernel"]  # a part of GPT-2's fused tensor
    assert len({str(shard.index) for shard in key.addressable_shards}) == 4

    save_pretrained(tmp_path / "again", module, loaded)  # gathers
    assert_same(load_pretrained(tmp_path / "again", head="reward")[1], params)


def test_fresh_head_on_a_mesh_lies_where_a_stored_one_would(tmp_path):
    save_pretrained(tmp_path, *tiny_llama())
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    key = jax.random.key(0)
    module, params = load_pretrained(tmp_path, head="reward", mesh=mesh, key=key)
    save_pretrained(tmp_path, module, params)
    _, again = load_pretrained(tmp_path, head="reward", mesh=mesh)
    assert params["score"].sharding == again["score"].sharding


# Heads


def test_language_model_to_reward_model_to_critic(tmp_path):
    module, params = tiny_llama()
    save_pretrained(tmp_path / "sft", module, params)
    with pytest.raises(ValueError, match=r"has no score\.weight.*pass key="):
        load_pretrained(tmp_path / "sft", head="reward")
    reward = load_pretrained(tmp_path / "sft", head="reward", key=jax.random.key(1))
    assert_same(
        reward[1], with_head(module, params, "reward", key=jax.random.key(1))[1]
    )
    save_pretrained(tmp_path / "reward", *reward)
    critic, critic_params = load_pretrained(tmp_path / "reward", head="value")
    assert critic.head == "value"
    assert_same(critic_params, reward[1])


def test_classifier_as_language_model(tmp_path):
    save_pretrained(tmp_path / "untied", *tiny_llama("reward"))
    with pytest.raises(ValueError, match=r"no lm_head\.weight .*head='reward'"):
        load_pretrained(tmp_path / "untied")
    module, params = tiny_gpt2("reward")
    save_pretrained(tmp_path / "tied", module, params)
    _, loaded = load_pretrained(tmp_path / "tied")
    assert_same(loaded, {k: v for k, v in params.items() if k != "score"})


def test_unknown_head(tmp_path):
    with pytest.raises(ValueError, match="head='critic' must be one of"):
        load_pretrained(tmp_path, head="critic")


# Tensors that are not what the configuration says


def drop(name):
    return lambda tensors: tensors.pop(name)


def cut(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


def add(name, dtype=np.float32):
    return lambda tensors: tensors.update({name: np.ones(3, dtype)})


def make_integer(name):
    return lambda tensors: tensors.update({name: tensors[name].astype(np.int32)})


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(QUERY), rf"tensor {QUERY} of shape \(32, 32\) is missing"),
        (
            cut(QUERY),
            rf"{FILE}: tensor {QUERY} has shape \(31, 32\); .* says \(32, 32\)",
        ),
        (
            add("model.layers.0.self_attn.q_proj.bias"),
            rf"{FILE}: tensor \S+q_proj.bias of shape \(3,\) does not belong to",
        ),
        (make_integer(QUERY), rf"{FILE}: tensor {QUERY} is of dtype I32"),
        (
            lambda tensors: (cut(QUERY)(tensors), drop("model.norm.weight")(tensors)),
            r"\(31, 32\).* \(and 1 more\)",
        ),
    ],
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    save_pretrained(tmp_path, *tiny_llama())
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_classifier_of_two_labels_is_refused(tmp_path):
    save_pretrained(tmp_path, *tiny_gpt2("reward"))
    edit(tmp_path, lambda t: t.update({"score.weight": np.ones((2, 32), np.float32)}))
    with pytest.raises(
        ValueError, match=r"score.weight has shape \(2, 32\).*\(1, 32\)"
    ):
        load_pretrained(tmp_path, head="reward")


def test_constants_of_old_files_are_skipped(tmp_path):
    for name, make, buffer in [
        ("gpt2", tiny_gpt2, "transformer.h.0.attn.bias"),
        ("llama", tiny_llama, "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ]:
        module, params = make()
        save_pretrained(tmp_path / name, module, params)
        edit(tmp_path / name, add(buffer))
        assert_same(load_pretrained(tmp_path / name)[1], params)


def test_tied_output_matrix_stored_again_must_be_the_same(tmp_path):
    module, params = tiny_gpt2()
    save_pretrained(tmp_path, module, params)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"]}))
    assert_same(load_pretrained(tmp_path)[1], params)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer"):
        load_pretrained(tmp_path)


def test_missing_and_damaged_files(tmp_path):
    save_pretrained(tmp_path, *tiny_gpt2(), max_shard_bytes=30_000)
    shard = tmp_path / sorted(p.name for p in tmp_path.glob("model-*"))[1]
    shard.write_bytes(b"not a header")
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        load_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: no such file"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickle .* convert it to model\.safetensors"):
        load_pretrained(tmp_path)


# Saving


def test_parameters_of_another_module_are_not_saved(tmp_path):
    module, params = tiny_llama()
    small, _ = tiny_llama(vocab_size=40)
    for owner, given, message in [
        (
            module.clone(head="reward"),
            params,
            "have output_embedding, which .*'reward'",
        ),
        (module, {"params": params}, r"lack final_norm/scale of shape \(32,\)"),
        (small, params, r"have output_embedding of shape \(32, 258\); .*\(32, 40\)"),
    ]:
        with pytest.raises(ValueError, match=f"params {message}"):
            save_pretrained(tmp_path / "model", owner, given)
    assert not (tmp_path / "model").exists()


def test_tokenizer_gives_the_token_ids(tmp_path):
    tokenizer = byte_tokenizer()
    save_pretrained(tmp_path, *tiny_gpt2(), tokenizer=tokenizer)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == ids
    assert ids.items() <= json.loads((tmp_path / "config.json").read_text()).items()
    assert (tmp_path / "tokenizer.json").is_file()


def test_score_position_is_left_open_where_pad_is_eos(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    save_pretrained(tmp_path, *tiny_gpt2("reward"), tokenizer=tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, None)
    assert not (tmp_path / "generation_config.json").exists()


def test_a_model_is_replaced_whole_and_other_files_stay(tmp_path):
    path = tmp_path / "model"
    tokenizer = byte_tokenizer()
    save_pretrained(path, *tiny_llama(), tokenizer=tokenizer, max_shard_bytes=30_000)
    (path / "notes").mkdir()
    (path / "notes" / "mine.txt").write_text("kept")
    module, params = tiny_gpt2("value")
    save_pretrained(path, module, params)
    assert sorted(entry.name for entry in path.iterdir()) == [
        "config.json", FILE, "notes", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (path / "notes" / "mine.txt").read_text() == "kept"
    assert_same(load_pretrained(path, head="value")[1], params)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


class BrokenTokenizer:
    bos_token_id = eos_token_id = pad_token_id = 0

    def save_pretrained(self, path):
        raise OSError("disk full")


def test_a_failed_save_leaves_the_old_model(tmp_path):
    path = tmp_path / "model"
    module, params = tiny_gpt2()
    save_pretrained(path, module, params)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(path, *tiny_llama(), tokenizer=BrokenTokenizer())
    assert_same(load_pretrained(path)[1], params)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("swapped", [False, True])
def test_leftovers_of_a_killed_save_are_cleaned_up(swapped, tmp_path):
    path = tmp_path / "model"
    module, params = tiny_gpt2()
    save_pretrained(path, module, params)
    (path / "mine.txt").write_text("kept")
    path.rename(tmp_path / ".model.replaced")  # killed right after this rename …
    if swapped:  # … or after the next one
        save_pretrained(tmp_path / "new", module, params)
        (tmp_path / "new").rename(path)
    (tmp_path / ".model.saving").mkdir()
    # Even if the next save fails too, the old model is back.
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(path, *tiny_llama(), tokenizer=BrokenTokenizer())
    assert_same(load_pretrained(path)[1], params)
    save_pretrained(path, module, params)
    assert (path / "mine.txt").read_text() == "kept"
    assert_same(load_pretrained(path)[1], params)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match="model is a file"):
        save_pretrained(tmp_path / "model", *tiny_gpt2())


def test_bfloat16_is_read_without_help(tmp_path):
    module, params = tiny_gpt2()
    save_pretrained(tmp_path, module, params)

    def narrow(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(ml_dtypes.bfloat16)

    edit(tmp_path, narrow)
    _, loaded = load_pretrained(tmp_path)
    want = np.asarray(params["layers"]["up"]["kernel"]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        loaded["layers"]["up"]["kernel"], want.astype(np.float32)
    )
