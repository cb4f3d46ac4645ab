"""The four stages through adapters: what is trained, what is shared, what is left."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from safetensors.numpy import load_file

from rlhf_jax import cli
from rlhf_jax.config.adapters import LoraConfig
from rlhf_jax.config.run import (
    FreshModelConfig,
    MeshConfig,
    OptimizerConfig,
)
from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.learner import init_train_state
from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import grpo, ppo, reward_model, sft
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.recipes.optimizers import make_ppo_optimizers
from rlhf_jax.recipes.policy_models import load_four_models
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.run.interrupt import Interrupted
from rlhf_jax.run.log_files import read_metrics
from rlhf_jax.run.session import Session

FAST = OptimizerConfig(learning_rate=0.03, schedule="constant", warmup_fraction=0.0)
LORA = LoraConfig(rank=4, alpha=8)


def leaves(path, head="lm"):
    return load_pretrained(Path(path), head=head)[1]


def vector(path, head="lm"):
    return np.asarray(ravel_pytree(leaves(path, head))[0])


def without_time(run):
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_metrics(run.metrics)
    ]


@pytest.fixture(scope="module")
def sft_config(stages, tmp_path_factory) -> SFTConfig:
    return dataclasses.replace(
        stages.sft,
        run_dir=str(tmp_path_factory.mktemp("lora") / "sft"),
        model=stages.ppo.policy,
        fresh=FreshModelConfig(),
        optimizer=FAST,
        microbatches=2,
        lora=dataclasses.replace(LORA, dropout=0.1),
    )


@pytest.fixture(scope="module")
def sft_run(sft_config):
    return sft.run(sft_config)


@pytest.fixture(scope="module")
def reward_run(stages, tmp_path_factory):
    config = dataclasses.replace(
        stages.reward,
        run_dir=str(tmp_path_factory.mktemp("lora") / "reward"),
        optimizer=FAST,
        lora=LORA,
    )
    return reward_model.run(config)


@pytest.fixture(scope="module")
def ppo_config(stages, tmp_path_factory):
    return dataclasses.replace(
        stages.ppo,
        run_dir=str(tmp_path_factory.mktemp("lora") / "ppo"),
        lora=LORA,
        actor_optimizer=FAST,
    )


@pytest.fixture(scope="module")
def ppo_run(ppo_config):
    return ppo.run(ppo_config)


# ---- what the runs leave ----


def test_sft_learns_and_changes_only_matrices(sft_config, sft_run):
    rows = read_metrics(sft_run.metrics)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    before, after = leaves(sft_config.model), leaves(sft_run.model)

    def check(path, old, new):
        is_kernel = path[-1].key == "kernel"
        assert (np.abs(old - new).max() > 1e-4) == is_kernel, path

    jax.tree_util.tree_map_with_path(check, before, after)


def test_an_adapter_and_its_base_are_the_model(sft_config, sft_run, tmp_path):
    fields = json.loads((sft_run.adapter / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == sft_config.model
    assert (fields["r"], fields["lora_alpha"]) == (4, 8)
    output = tmp_path / "merged"
    cli.main(["merge", "--adapter", str(sft_run.adapter), "--output", str(output)])
    np.testing.assert_array_equal(vector(output), vector(sft_run.model))
    assert sorted(x.name for x in output.iterdir()) == sorted(
        x.name for x in sft_run.model.iterdir()
    )


def test_an_adapter_is_read_where_a_model_is(sft_run, capsys):
    def answer(model):
        flags = ["--temperature", "0", "--prompt", "Review of the film The Sea:"]
        flags += ["--max-new-tokens", "5"]
        cli.main(["generate", "--model", str(model), *flags])
        return capsys.readouterr().out

    assert answer(sft_run.adapter) == answer(sft_run.model)


def test_reward_model_trains_its_score_vector_too(stages, reward_run):
    assert "score" in leaves(reward_run.model, "reward")
    stored = load_file(reward_run.adapter / "adapter_model.safetensors")
    (score,) = (x for name, x in stored.items() if "score" in name)
    trained = leaves(reward_run.model, "reward")["score"]
    np.testing.assert_array_equal(score[0], trained)
    embedding = leaves(reward_run.model, "reward")["token_embedding"]
    base = leaves(stages.reward.model)["token_embedding"]
    np.testing.assert_array_equal(embedding, base)


def test_checkpoints_hold_what_is_trained_alone(stages, ppo_run):
    def size(run_dir):
        found = (Path(run_dir) / "checkpoints" / "4").rglob("*")
        return sum(file.stat().st_size for file in found if file.is_file())

    full = leaves(stages.ppo.policy)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(full))
    # Adapters of rank 4 on a width of 32 are a third of the matrices, and actor and
    # critic have moments; a single copy of the base would be above this.
    names = (Path(ppo_run.path) / "checkpoints" / "4" / "meta" / "metadata").read_text()
    assert "token_embedding" not in names and "lora_a" in names
    assert size(ppo_run.path) < 6 * whole


# ---- policy optimisation ----


def test_first_minibatch_is_on_policy_and_kl_starts_at_0(ppo_run):
    rows = read_metrics(ppo_run.metrics)
    assert abs(rows[1]["kl/sequence"]) < 1e-4  # twelve tokens of float32 rounding
    assert abs(rows[-1]["kl/sequence"]) > 1e-3  # estimated by k1: of either sign
    for row in rows[1:]:
        assert row["policy/first_clip_fraction"] == 0.0
        assert row["policy/first_approx_kl"] < 1e-9


def grown(names):
    return sorted({name for name in names if names.count(name) > 1})


def test_nothing_compiles_twice(ppo_config, tmp_path, monkeypatch):
    config = dataclasses.replace(ppo_config, run_dir=str(tmp_path / "run"))
    compiled, log = [], Session.log
    counts = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    def count(self, step, metrics, *, shown):
        log(self, step, metrics, shown=shown)
        counts.append(len(compiled))

    monkeypatch.setattr(Session, "log", count)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        ppo.run(config)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # Steps 0 and 1 compile what there is; steps 2 and 4 evaluate, 3 does not.
    assert counts[2] == counts[3] == counts[4]


def load(config):
    return load_four_models(config, Networks(config, make_mesh()))


def shared(left, right):
    """Which leaves of two trees are one array."""
    mine = {id(leaf) for leaf in jax.tree.leaves(left)}
    return [id(leaf) in mine for leaf in jax.tree.leaves(right)]


def test_reference_and_critic_share_the_frozen_arrays(ppo_config):
    models, params = load(ppo_config)
    assert all(shared(models.frozen.actor, models.reference))
    assert all(shared(models.reward, models.frozen.critic))
    whole = models.actor(params.actor)
    assert all(shared(whole, models.reference))
    frozen = (models.frozen, models.reference, models.reward)
    assert not any(shared(params, frozen))
    assert set(params.critic) == {"layers", "score"}
    optimizers, _ = make_ppo_optimizers(ppo_config)
    state = init_train_state(jax.random.key(0), params, optimizers, kl_coef=0.0)
    assert not any(shared(state, frozen))


def test_a_critic_on_the_policys_own_base(ppo_config):
    config = dataclasses.replace(ppo_config, critic=ppo_config.policy)
    models, params = load(config)
    # All but the output matrix, which is that of the embedding here.
    assert all(shared(models.frozen.actor, models.frozen.critic))
    differ = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        {n: x["lora_a"] for n, x in params.actor["layers"].items()},
        {n: x["lora_a"] for n, x in params.critic["layers"].items()},
    )
    assert all(differ.values())


def test_a_reference_of_its_own(ppo_config, sft_run):
    config = dataclasses.replace(ppo_config, reference=str(sft_run.model))
    models, _ = load(config)
    assert not any(shared(models.frozen.actor, models.reference))


@pytest.mark.parametrize("critic", ["shared", "own"])
def test_ppo_in_8_bits_with_either_critic(ppo_config, tmp_path, critic):
    config = dataclasses.replace(
        ppo_config,
        run_dir=str(tmp_path / "run"),
        updates=1,
        critic_trunk=critic,
        lora=dataclasses.replace(LORA, base_dtype="int8"),
    )
    models, _ = load(config)
    assert models.frozen.actor["layers"]["up"]["kernel"].dtype == jnp.int8
    assert models.reward["layers"]["up"]["kernel"].dtype == jnp.int8
    run = ppo.run(config)
    row = read_metrics(run.metrics)[1]
    assert row["policy/first_clip_fraction"] == 0.0 and abs(row["kl/sequence"]) < 1e-4
    # Merged into the weights of the file, not into their 8 bits.
    kernels = [leaves(p)["layers"]["up"]["kernel"] for p in (run.model, config.policy)]
    moved = np.asarray(kernels[0] - kernels[1])
    singular = np.linalg.svd(moved[0], compute_uv=False)
    assert singular[0] > 1e-3
    assert singular[4] < 1e-5  # of rank 4


def test_grpo(grpo_config, tmp_path):
    config = dataclasses.replace(
        grpo_config,
        run_dir=str(tmp_path / "run"),
        lora=dataclasses.replace(LORA, merge=False),
        refresh_every=2,
    )
    run = grpo.run(config)
    assert read_metrics(run.metrics)[-1]["optim/actor_grad_norm"] > 0
    assert run.adapter.exists() and not run.model.exists()


# ---- going on ----


def interrupted(monkeypatch, run, config, step):
    log = Session.log

    def log_then_interrupt(self, number, metrics, *, shown):
        log(self, number, metrics, shown=shown)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", log_then_interrupt)
        with pytest.raises(Interrupted):
            run(config)
    return run(dataclasses.replace(config, resume=True))


def assert_same_run(first, second):
    assert without_time(first) == without_time(second)
    names = ("adapter/adapter_model.safetensors", "model/model.safetensors")
    for name in names:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_interrupted_ppo_goes_on_bit_for_bit(
    ppo_config, ppo_run, tmp_path, monkeypatch
):
    config = dataclasses.replace(ppo_config, run_dir=str(tmp_path / "run"))
    assert_same_run(interrupted(monkeypatch, ppo.run, config, 2), ppo_run)


def test_interrupted_sft_goes_on_with_its_dropout(
    sft_config, sft_run, tmp_path, monkeypatch
):
    config = dataclasses.replace(sft_config, run_dir=str(tmp_path / "run"))
    assert_same_run(interrupted(monkeypatch, sft.run, config, 2), sft_run)


def test_training_an_adapter_on(ppo_config, sft_run, tmp_path):
    """On the policy that is given; the base that the adapter names may be gone."""
    adapter = tmp_path / "adapter"
    shutil.copytree(sft_run.adapter, adapter)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    lora = LoraConfig(adapter=str(adapter))
    config = dataclasses.replace(
        ppo_config, run_dir=str(tmp_path / "run"), lora=lora, updates=1
    )
    run = ppo.run(config)
    # The reference is the policy's start: base and adapter.
    assert abs(read_metrics(run.metrics)[1]["kl/sequence"]) < 1e-4
    old, new = (
        load_file(path / "adapter_model.safetensors")
        for path in (sft_run.adapter, run.adapter)
    )
    assert old.keys() == new.keys()
    moved = [np.abs(old[name] - new[name]).max() for name in old]
    assert 0 < max(moved) < 0.5
    np.testing.assert_allclose(
        vector(sft_run.model).std(), vector(run.model).std(), rtol=0.2
    )


# ---- options ----

FLIPS = {
    "rank": 2,
    "alpha": 4.0,
    "rslora": True,
    "targets": ("query",),
    "dropout": 0.5,
    "base_dtype": "int8",
}


def test_every_option_changes_what_is_learned(sft_config, tmp_path):
    def trained(**changes):
        lora = dataclasses.replace(LORA, **changes)
        name = "-".join(changes) or "plain"
        config = dataclasses.replace(
            sft_config, run_dir=str(tmp_path / name), lora=lora, steps=2
        )
        return vector(sft.run(config).model)

    plain = trained()
    for option, value in FLIPS.items():
        assert np.abs(trained(**{option: value}) - plain).max() > 1e-5, option
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == set(FLIPS) | {"adapter", "merge"}  # with tests of their own


BAD = {
    "alpha without rank": (
        ["--lora.alpha", 8],
        "lora.alpha=8.0: has no effect without",
    ),
    "targets without rank": (
        ["--lora.targets", "up"],
        "lora.targets=('up',): has no effect",
    ),
    "negative rank": (["--lora.rank", -1], "lora.rank=-1: must be 0 or more"),
    "rank of an adapter": (
        ["--lora.rank", 8, "--lora.adapter", "x"],
        "lora.rank=8: comes with lora.adapter",
    ),
    "all dropped": (["--lora.rank", 8, "--lora.dropout", 1], "must be in [0, 1)"),
    "unknown layer": (
        ["--lora.rank", 8, "--lora.targets", "query", "gate"],
        "lora.targets='gate' matches no linear layer of this model; it has",
    ),
    "no adapter": (["--lora.adapter", "no-directory"], "adapter_config.json: no such"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name, refused, stages, tmp_path):
    flags, message = BAD[name]
    line = refused(
        *("sft", "--quiet", "--data", stages.sft.data, "--model", stages.ppo.policy),
        *("--run-dir", tmp_path / "run", "--max-tokens", 96, *flags),
    )
    assert message in line


def test_a_fresh_model_is_not_adapted(refused, stages, tmp_path):
    line = refused(
        *("sft", "--quiet", "--data", stages.sft.data, "--run-dir", tmp_path / "run"),
        *("--lora.rank", 2),
    )
    assert "lora.rank=2: requires a pretrained model" in line


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_dropout_of_a_policy_is_refused_with_the_reason(command, refused, tmp_path):
    line = refused(
        *(command, "--policy", "x", "--data", "x", "--reward-model", "x"),
        *("--run-dir", tmp_path / "run", "--lora.rank", 2, "--lora.dropout", 0.1),
    )
    assert (
        "lora.dropout=0.1: must be 0 for" in line
        and "is not 1 at the first step" in line
    )


def test_an_adapter_of_an_adapter_is_refused(sft_run, sft_config):
    config = dataclasses.replace(sft_config, model=str(sft_run.adapter))
    with pytest.raises(ValueError, match=r"an adapter on an adapter cannot be saved"):
        Networks(config, make_mesh()).trained(str(sft_run.adapter), "lm")


def test_devices_change_nothing_but_rounding(sft_config, sft_run, tmp_path):
    config = dataclasses.replace(
        sft_config, run_dir=str(tmp_path / "run"), mesh=MeshConfig(data=2, fsdp=2)
    )
    spread = sft.run(config)
    for one, many in zip(without_time(sft_run), without_time(spread), strict=True):
        assert one.keys() == many.keys()
        # Adam divides by gradients that are nearly 0, and multiplies rounding.
        np.testing.assert_allclose(
            list(one.values()), list(many.values()), rtol=2e-3, atol=1e-4
        )
    networks = Networks(config, make_mesh(data=2, fsdp=2))
    network, trained = networks.trained(sft_config.model, "lm")
    state, _ = networks.place({"params": trained})
    a = state["params"]["layers"]["up"]["lora_a"]
    assert a.addressable_shards[0].data.shape == (2, 16, 4)  # half of the inputs
    base = network.frozen["layers"]["up"]["kernel"]
    assert base.addressable_shards[0].data.nbytes == base.nbytes // 2
