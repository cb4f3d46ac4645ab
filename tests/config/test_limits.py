"""Every number of every command has limits, told in one line before any work."""

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest

from rlhf_jax import cli
from rlhf_jax.config.demos import QuickstartConfig
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.limits import MOST
from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.config.tools import GenerateConfig
from rlhf_jax.demos.quickstart import stage_seed

POLICY = {"run_dir": "r", "data": "d", "policy": "p", "reward": ("a.py:b",)}
REQUIRED = {
    "sft": {"run_dir": "r", "data": "d"},
    "reward": {"run_dir": "r", "data": "d", "model": "m"},
    "ppo": POLICY,
    "grpo": POLICY,
    "generate": {"model": "m", "data": "d"},
    "annotate write": {"model": "m", "data": "d"},
    "evaluate": {"model": "m", "prompts": "p", "reward": ("a.py:b",)},
    "inspect": {"model": "m"},
    "show-data": {"model": "m", "data": "d"},
    "quickstart": {},
    "arithmetic": {},
    "overoptimization": {},
    "replay": {"run_dir": "r"},
}
WITHOUT_NUMBERS = {"annotate read", "merge", "presets"}


def numbers_of(config_type, prefix=""):
    """Path and declared type of every number, those of sections too."""
    found = {}
    for name, hint in get_type_hints(config_type).items():
        if dataclasses.is_dataclass(hint):
            found |= numbers_of(hint, f"{prefix}{name}.")
        elif {int, float} & {hint, *get_args(hint)}:
            found[f"{prefix}{name}"] = hint
    return found


NUMBERS = [
    (command, path, hint)
    for command in REQUIRED
    for path, hint in numbers_of(cli.COMMANDS[command].config).items()
]


def with_value(config, path, value):
    """The configuration with another value at a path such as `lora.rank`."""
    name, _, rest = path.partition(".")
    if rest:
        value = with_value(vars(config)[name], rest, value)
    return dataclasses.replace(config, **{name: value})


def complaint(command, path, hint, value):
    """What validation says of a value; empty if it accepts it."""
    in_tuple = "tuple" in str(hint)
    try:
        config = cli.COMMANDS[command].config(**REQUIRED[command])
        with_value(config, path, (value,) if in_tuple else value).validate()
    except ValueError as error:
        return str(error)
    return ""


def is_whole(hint):
    return int in (hint, *get_args(hint))


def test_every_command_is_here():
    assert set(cli.COMMANDS) == REQUIRED.keys() | WITHOUT_NUMBERS
    for command in WITHOUT_NUMBERS:
        assert not numbers_of(cli.COMMANDS[command].config)
    assert len(NUMBERS) > 200


REFUSED = (math.inf, -math.inf, math.nan, 1e308, 10**400, -(10**400), True, "")


@pytest.mark.parametrize(
    ("command", "path", "hint"), NUMBERS, ids=[f"{c} {p}" for c, p, _ in NUMBERS]
)
def test_extremes_are_refused_in_one_line(command, path, hint):
    values = [*REFUSED, *(0.5, 2**64, -(2**64)) * is_whole(hint)]
    if path.startswith("scale."):  # flags are floats
        values = [value for value in values if isinstance(value, float)]
    for value in values:
        told = complaint(command, path, hint, value)
        assert told, value
        assert path.replace("_", "-") in told or path.startswith("scale."), told
        assert "\n" not in told
        assert len(told) < 300
    for value in (0, -1, 2**63, 10**18, 10**6, 1e-300):
        told = complaint(command, path, hint, value)
        assert "\n" not in told
    if is_whole(hint):
        assert complaint(command, path, hint, -1)
        if not path.endswith("seed"):
            assert complaint(command, path, hint, 2**31)
            assert "at most" in complaint(command, path, hint, 10**18)


def test_limits_are_those_of_options():
    names = {path.rpartition(".")[2] for _, path, _ in NUMBERS}
    assert MOST.keys() <= names


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("batch_size", 1_048_576),
        ("max_new_tokens", 1_048_576),
        ("lora.rank", 16_384),
        ("mesh.fsdp", 4096),
        ("reward_processes", 1024),
        ("checkpoint_every", 2_147_483_647),
    ],
)
def test_the_limit_is_told(path, most):
    flag = path.replace("_", "-")
    told = complaint("grpo", path, int, most + 1)
    assert told.split(",")[0] == f"{flag}={most + 1}: must be at most {most}"
    told = complaint("grpo", path, int, most)
    assert "must be at most" not in told


@pytest.mark.parametrize(
    ("command", "most"),
    [("sft", 2**64 - 1), ("ppo", 2**64 - 1), ("arithmetic", 2**57 - 1)],
)
def test_seeds_are_not_negative_and_have_64_bits(command, most):
    for seed in (0, 2**32, most):
        assert complaint(command, "seed", int, seed) == ""
    for seed in (-1, most + 1):
        assert complaint(command, "seed", int, seed) == (
            f"seed={seed}: must be a whole number from 0 to {most}"
        )


def test_demo_seeds_leave_room_for_those_of_their_runs():
    like = QuickstartConfig(seed=2**57 - 1)
    assert stage_seed(like, 3) + 2**14 < 2**64


@pytest.mark.parametrize("value", [1e-50, 1e-300, -1e-40])
def test_what_float32_rounds_to_zero_is_refused(value):
    told = complaint("sft", "optimizer.eps", float, value)
    assert told.startswith(f"optimizer.eps={value}: is 0 in float32")


def test_a_batch_is_counted_in_int32():
    config = SFTConfig(run_dir="r", data="d", batch_size=2**20, max_tokens=2**11)
    with pytest.raises(
        ValueError, match=r"^batch-size=1048576: gives batches of 2147483648 "
    ):
        config.validate()
    dataclasses.replace(config, max_tokens=2**11 - 1).validate()


def test_steps_are_counted_in_int32():
    config = GRPOConfig(**POLICY, updates=2**30, epochs=1, minibatches=2)
    with pytest.raises(ValueError, match=r"^updates=1073741824: times epochs 1 times "):
        config.validate()
    dataclasses.replace(config, updates=2**30 - 1).validate()


def test_none_stays_none_and_whole_numbers_are_numbers():
    GenerateConfig(model="m", prompt=("p",), top_k=None, temperature=1).validate()
    told = complaint("sft", "steps", int, None)
    assert told == "steps=None: must be a whole number"
