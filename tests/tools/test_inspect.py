"""What a model is, and the memory of the stages: counted by hand, and as compiled."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import pytest

from rlhf_jax import cli
from rlhf_jax.algo.options import KLOptions
from rlhf_jax.config.adapters import LoraConfig
from rlhf_jax.config.inspection import InspectConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import MeshConfig
from rlhf_jax.models import save_pretrained
from rlhf_jax.models.hf.peft_files import write_adapter
from rlhf_jax.models.lora import LoraOptions, init_adapters
from rlhf_jax.models.tiny import byte_tokenizer, tiny_gpt2, tiny_llama
from rlhf_jax.recipes import ppo
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.tools import inspect_model
from rlhf_jax.tools.memory_plan import stage_memory

# tiny_llama: 258 tokens, width 32, 2 layers, 4 heads and 2 for keys, feed-forward 64.
EMBEDDING = OUTPUT = 258 * 32
LAYERS = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32)
TRUNK = EMBEDDING + LAYERS + 32
LM, REWARD = TRUNK + OUTPUT, TRUNK + 32


def saved(directory, *, template=None, head="lm", **options):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    save_pretrained(directory, *tiny_llama(head), tokenizer=tokenizer, **options)
    return str(directory)


def memory(stage, *, compiled=False, shape=None, **options):
    config = InspectConfig(model="x", stages=(stage,), **options)
    config.validate()
    return stage_memory(
        config.of_stage(stage),
        shape or tiny_llama()[0].config,
        make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp),
        stop_ids=(0,),
        pad_id=0,
        compile_programs=compiled,
        report=lambda text: None,
    )


# Counted


def test_parameters_optimizer_and_frozen_models():
    found = memory("ppo").resident
    assert found["trained parameters"] == 4 * (LM + REWARD)
    assert found["optimizer"] == 8 * (LM + REWARD) + 2 * 8  # moments, and two counters
    assert found["reference"] == 4 * LM
    assert found["reward model"] == 4 * REWARD
    found = memory("grpo", dtype="bfloat16").resident
    assert found["trained parameters"] == 4 * LM
    assert (found["reference"], found["reward model"]) == (2 * LM, 2 * REWARD)
    assert memory("sft").gradients == 4 * LM
    assert memory("reward").resident["trained parameters"] == 4 * REWARD
    assert "reference" not in memory("sft").resident


def test_each_device_has_its_part():
    found = memory("sft", mesh=MeshConfig(data=2, fsdp=4))
    # Everything has a dimension that 4 divides, but for two counters.
    assert found.resident["trained parameters"] == LM
    assert found.gradients == LM
    assert memory("sft", mesh=MeshConfig(data=8)).gradients == 4 * LM


def test_adapters_are_what_is_trained():
    lora = LoraConfig(rank=3, targets=("query", "down"))
    adapters = 2 * 3 * ((32 + 32) + (64 + 32))
    found = memory("ppo", lora=lora)
    assert found.resident["trained parameters"] == 4 * (2 * adapters + 32)
    # One base for policy and reference, one for reward model and critic.
    assert found.resident["frozen policy"] == 4 * LM
    assert found.resident["reward model"] == 4 * REWARD
    assert "reference" not in found.resident
    half = dataclasses.replace(lora, base_dtype="bfloat16")
    found = memory("sft", lora=half)
    assert found.resident["frozen model"] == 2 * LM
    assert found.gradients == 4 * adapters


def test_a_base_of_8_bits():
    lora = LoraConfig(rank=1, base_dtype="int8")
    frozen = memory("sft", lora=lora, dtype="bfloat16").resident["frozen model"]
    kernels = LAYERS - 2 * 2 * 32
    scales = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32)  # an output each, float32
    assert frozen == kernels + 4 * scales + 2 * (LM - kernels)


def test_keys_and_values():
    sizes = {"batch_size": 8, "max_prompt_tokens": 5, "max_new_tokens": 7}
    shape = {"minibatches": 1, "group_size": 4}
    # Of the last token nothing is kept: 11 columns, 2 layers, 2 heads of 8.
    cache = 2 * 2 * 8 * 2 * 11 * 8
    assert memory("grpo", **sizes, **shape).cache == 4 * cache
    bfloat16 = memory("grpo", **sizes, **shape, dtype="bfloat16")
    assert bfloat16.cache == 2 * cache
    spread = memory("grpo", **sizes, **shape, mesh=MeshConfig(data=2, fsdp=2))
    assert spread.cache == cache


# As compiled


SMALL = {
    "batch_size": 4,
    "minibatches": 1,
    "group_size": 2,
    "max_tokens": 24,
    "max_prompt_tokens": 16,
    "max_new_tokens": 8,
}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "grpo"])
def test_every_program_of_a_stage_is_planned(stage):
    found = memory(stage, compiled=True, **SMALL)
    names = [program.name for program in found.programs]
    if stage in ("sft", "reward"):
        assert names == ["update"]
    else:
        assert names == ["rollout", "reward model", "scoring", "update"]
        assert found.programs[0].parts["KV cache"] == found.cache
        assert found.programs[0].temporary > found.cache
    update = found.programs[-1]
    # The new state takes the place of the old: results are metrics only.
    assert update.results < 2000
    assert update.temporary > update.parts["gradients"] == found.gradients
    assert found.peak == found.always + max(p.total for p in found.programs)


def test_batches_are_counted():
    update = memory("sft", compiled=True, **SMALL).programs[0]
    assert update.batch == 4 * 24 * (4 + 1 + 1)  # token, mask and target mask
    halved = memory("sft", compiled=True, **SMALL, mesh=MeshConfig(fsdp=2))
    assert halved.programs[0].batch == update.batch / 2


def test_plans_tell_microbatches_and_rematerialisation_apart():
    wide = tiny_gpt2(max_positions=256)[0].config
    wide = dataclasses.replace(wide, num_layers=6)
    options = {"compiled": True, "shape": wide, "scan_layers": True}
    sizes = {"batch_size": 16, "max_tokens": 128}
    plain = memory("sft", **options, **sizes).programs[0].temporary
    parts = memory("sft", **options, **sizes, microbatches=4).programs[0].temporary
    again = memory("sft", **options, **sizes, remat=True).programs[0].temporary
    assert parts < 0.5 * plain
    assert again < 0.8 * plain


def test_adapters_are_planned():
    found = memory("grpo", compiled=True, **SMALL, lora=LoraConfig(rank=2))
    # Whole parameters share the frozen ones: an argument more are adapters only.
    adapters = found.gradients
    rollout = found.programs[0]
    assert rollout.batch == adapters + 4 * (16 + 1) * 4 + 8
    assert found.programs[-1].parts["gradients"] == adapters


# The command


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}!"


def test_printed(tmp_path, capsys):
    path = saved(
        tmp_path, template=TEMPLATE, generation_config={"eos_token_id": [0, 9]}
    )
    cli.main(["inspect", path, "--no-compile", "--max-tokens", "64", *SHORT])
    out = capsys.readouterr().out
    for line in [
        "family      llama, language model",
        "layers      2, width 32, feed-forward 64",
        "heads       4 of 8, 2 for keys and values",
        "vocabulary  258, output matrix own",
        f"parameters  {LM:,}",
        f"stored      {LM:,} F32 in 1 file",
        "special     bos '<|endoftext|>' = 0, eos '<|endoftext|>' = 0, pad '<|pad|>'",
        "stops at    0, 9",
        "  | <user>What is 2 + 2?<assistant>4<user>And 3 + 3?!",
        f"  trained parameters  {LM * 4 / 1e3:>7.1f} kB",
        "  peak",
    ]:
        assert line in out


SHORT = ["--max-prompt-tokens", "32", "--max-new-tokens", "16"]


def test_json(tmp_path, capsys):
    path = saved(tmp_path, head="reward")
    flags = ["--stages", "sft", "--batch-size", "2", "--max-tokens", "16", "--json"]
    cli.main(["inspect", path, *flags])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == "sft: compiling update …\n"
    assert found["model"]["head"] == "reward"
    assert found["model"]["parameters"] == REWARD
    assert found["model"]["stored"] == {"F32": REWARD}
    assert found["model"]["chat_template"] is False
    (stage,) = found["memory"]
    assert stage["resident"]["trained parameters"] == 4 * LM
    assert stage["peak"] > stage["always"] > 12 * LM
    assert found["devices"]["simulated"] is False


def test_an_adapter_is_shown_by_its_base(tmp_path, capsys):
    base = saved(tmp_path / "base")
    module, params = tiny_llama()
    options = LoraOptions(rank=2)
    adapters = init_adapters(jax.random.key(0), params, options)
    write_adapter(tmp_path / "adapter", module, adapters, options, base=base)
    flags = ["--no-compile", "--max-tokens", "64", *SHORT]
    cli.main(["inspect", str(tmp_path / "adapter"), *flags])
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith(f"base, base of the adapter {tmp_path / 'adapter'}")


def test_nothing_is_loaded(tmp_path, monkeypatch, capsys):
    path = saved(tmp_path)
    monkeypatch.setattr("rlhf_jax.models.hf.hf_weights.place_leaf", None)
    cli.main(["inspect", path, "--no-compile", "--max-tokens", "64", *SHORT])
    assert "peak" in capsys.readouterr().out


def test_a_configuration_alone(tmp_path, capsys):
    saved(tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    config = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "bare" / "config.json").write_text(config)
    flags = ["--no-compile", "--max-tokens", "64", *SHORT]
    cli.main(["inspect", str(tmp_path / "bare"), *flags])
    out = capsys.readouterr().out
    assert "no weights: " in out and "no tokenizer: " in out
    assert f"parameters  {LM:,}" in out and "stored" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "65"], "max-tokens of sft: 65 tokens, but .* at most 64"),
        (["--max-tokens", "64"], "max-prompt-tokens \\+ max-new-tokens of ppo: 112"),
        (["--batch-size", "5"], "batch-size=5: must be a multiple of 4"),
        (["--lora.adapter", "x"], "lora.adapter='x': is not loaded"),
        (["--mesh.fsdp", "0"], "mesh.fsdp=0"),
    ],
)
def test_what_cannot_work(flags, message, tmp_path, capsys):
    path = saved(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["inspect", path, "--no-compile", *flags])
    assert re.search(message, capsys.readouterr().err)


def test_more_devices_than_there_are(tmp_path):
    path = saved(tmp_path)
    flags = ["--stages", "sft", "--batch-size", "16", "--max-tokens", "16", "--json"]
    flags += ["--mesh.fsdp", "16"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.cli", "inspect", path, *flags],
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(done.stdout)
    assert found["devices"]["number"] == 16 and found["devices"]["simulated"]
    (stage,) = found["memory"]
    assert stage["resident"]["trained parameters"] == 4 * LM / 16


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic_trunk": "shared"},
        {"ensemble": ("another",), "critic_head_std": 0.0},
        {"kl": KLOptions(place="none"), "critic": "another"},
    ],
    ids=str,
)
def test_what_is_counted_is_what_a_run_holds(rank, changes, tmp_path, monkeypatch):
    """Against the arrays that the recipe itself makes, on one of four devices."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "policy")
    for name in ("judge", "another"):
        saved(tmp_path / name, head="reward")
    config = PPOConfig(
        run_dir="run",
        data="data",
        policy="policy",
        reward_model="judge",
        mesh=MeshConfig(data=2, fsdp=2),
        lora=LoraConfig(rank=rank),
        **changes,
    )
    mesh = make_mesh(data=2, fsdp=2)
    setup = ppo.setup(config, Networks(config, mesh), stop_ids=(0,), pad_id=0)
    state, models = setup.state, setup.models
    held = {}
    for leaf in jax.tree.leaves(
        (state, models.frozen, models.reference, models.reward)
    ):
        data = leaf if leaf.ndim == 0 else leaf.addressable_shards[0].data
        pointer = id(leaf) if leaf.ndim == 0 else data.unsafe_buffer_pointer()
        held[pointer] = data.size * leaf.dtype.itemsize
    counted = stage_memory(
        config,
        tiny_llama()[0].config,
        mesh,
        stop_ids=(0,),
        pad_id=0,
        compile_programs=False,
        report=lambda text: None,
    )
    assert counted.always == sum(held.values())


def test_bytes_are_readable():
    shown = [inspect_model.show(n) for n in (12, 34_567, 8.9e6, 1.234e9, 5.678e11)]
    assert shown == ["12 B", "34.6 kB", "8.90 MB", "1.23 GB", "568 GB"]


def test_a_shared_trunk_and_an_ensemble_are_planned():
    own, shared = memory("ppo"), memory("ppo", critic_trunk="shared")
    # The critic's own trunk is trained, with two moments; a head of 32 stays.
    assert own.always - shared.always == 3 * 4 * TRUNK
    three = memory("grpo", ensemble=2)
    assert three.resident["reward model"] == 3 * 4 * REWARD
    with pytest.raises(ValueError, match="ensemble=-1: must be 0 or more"):
        memory("ppo", ensemble=-1)
    with pytest.raises(ValueError, match="ensemble=1: has no effect without ppo or"):
        memory("sft", ensemble=1)
    with pytest.raises(ValueError, match=r"critic-trunk=.*without ppo"):
        memory("grpo", critic_trunk="shared")
