"""The table of presets: in the docs as the code has it, and a file that reads back."""

from pathlib import Path

import pytest

from rlhf_jax import cli
from rlhf_jax.config.grpo import GRPOConfig, GRPOMethod
from rlhf_jax.config.grpo_presets import GRPO_PRESETS
from rlhf_jax.config.ppo import PPOConfig, PPOMethod
from rlhf_jax.config.ppo_presets import PPO_PRESETS
from rlhf_jax.tools.preset_table import flat, table

DOCS = Path(__file__).parents[2] / "docs" / "presets.md"


def test_the_docs_have_the_table_of_the_code():
    _, ppo, _, grpo, _ = DOCS.read_text("utf-8").split("<!-- table -->\n")
    assert ppo.strip() == table("ppo")
    assert grpo.strip() == table("grpo")


def test_a_row_for_every_option_and_a_column_for_every_preset():
    rows = table("grpo").splitlines()
    assert rows[0].count("|") == len(GRPO_PRESETS) + 3
    assert len(rows) == 2 + len(flat(GRPOMethod()))
    rows = table("ppo").splitlines()
    assert rows[0].count("|") == len(PPO_PRESETS) + 3
    assert len(rows) == 2 + len(flat(PPOMethod()))
    clip = next(row for row in rows if row.startswith("| `value-loss.clip-eps`"))
    assert clip == (
        "| `value-loss.clip-eps` | 0.2 | 0.2 | 0.2 | 0.2 | **0.5** | **0.5** | 0.2 |"
    )


@pytest.mark.parametrize("name", PPO_PRESETS)
def test_a_preset_is_the_same_by_flag_by_file_and_by_key(name, tmp_path, capsys):
    cli.main(["presets", "--preset", name])
    as_file = tmp_path / "method.yaml"
    as_file.write_text(capsys.readouterr().out, "utf-8")
    as_key = tmp_path / "key.yaml"
    as_key.write_text(f"preset: {name}\n")
    rest = ["--policy", "a", "--reward-model", "b", "--data", "c", "--run-dir", "d"]
    for flags in (["--preset", name], ["--config", as_file], ["--config", as_key]):
        config = cli.parse(PPOConfig, [*map(str, flags), *rest], prog="x")
        assert {key: vars(config)[key] for key in vars(PPOMethod())} == vars(
            PPO_PRESETS[name]()
        )
        config.validate()


@pytest.mark.parametrize("name", GRPO_PRESETS)
def test_a_preset_of_grpo_is_the_same_by_flag_and_by_file(name, tmp_path, capsys):
    cli.main(["presets", "--preset", name])
    as_file = tmp_path / "method.yaml"
    as_file.write_text(capsys.readouterr().out, "utf-8")
    rest = ["--policy", "a", "--reward", "r.py:f", "--data", "c", "--run-dir", "d"]
    for flags in (["--preset", name], ["--config", as_file]):
        config = cli.parse(GRPOConfig, [*map(str, flags), *rest], prog="x")
        assert {key: vars(config)[key] for key in vars(GRPOMethod())} == vars(
            GRPO_PRESETS[name]()
        )
        config.validate()


def test_flags_go_before_the_preset():
    rest = ["--policy", "a", "--reward-model", "b", "--data", "c", "--run-dir", "d"]
    flags = ["--advantages.lam", "0.9", "--preset=trl", *rest]
    config = cli.parse(PPOConfig, flags, prog="x")
    assert config.advantages.lam == 0.9
    assert config.advantages.ddof == 1


def test_an_unknown_preset_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ppo", "--preset", "trl2"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "preset='trl2'" in line and "nplus_tldr" in line


def test_a_preset_of_the_other_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["presets", "--command", "grpo", "--preset", "trl"])
    assert "preset='trl': expected one of grpo, dr_grpo" in capsys.readouterr().err
