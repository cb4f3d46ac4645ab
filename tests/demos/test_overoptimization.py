"""`rlhf-jax overoptimization` in small: every file, kept stages, bad input."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.config.demos import OveroptimizationConfig
from rlhf_jax.config.run import FreshModelConfig
from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.demos import quickstart
from rlhf_jax.demos.overoptimization import command as overoptimization
from rlhf_jax.demos.overoptimization.best_of_n_curve import best_of_n_curves
from rlhf_jax.demos.overoptimization.inputs import NEEDED, enter_directory
from rlhf_jax.models import save_pretrained, train_tokenizer
from rlhf_jax.recipes import ppo, sft
from rlhf_jax.recipes.networks import Networks, fresh_shape
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.tasks import reviews


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


SMALL = {
    "pairs": 64,
    "models": 2,
    "reward_steps": 1,
    "betas": (0.0,),
    "ensembles": ("worst",),
    "updates": 2,
    "batch_size": 16,
    "eval_every": 1,
    "eval_prompts": 16,
    "best_of_prompts": 8,
    "best_of_samples": 16,
    "quiet": True,
}


def write_model(run_dir):
    """An SFT model that has learnt nothing, with a tokenizer that knows reviews."""
    rows = reviews.make_demonstrations(0, 300)
    texts = [row.prompt + row.response for row in rows]
    tokenizer = train_tokenizer(texts, vocab_size=768)
    shape = FreshModelConfig(
        family="llama", width=32, num_layers=1, num_heads=2, max_positions=96
    )
    config = SFTConfig(run_dir=str(run_dir), data="none", fresh=shape)
    network, params = Networks(config, make_mesh()).fresh(
        fresh_shape(shape, vocab_size=len(tokenizer)), jax.random.key(0)
    )
    run = RunDirectory(Path(run_dir))
    run.path.mkdir(parents=True)
    save_pretrained(run.model, network.module, params, tokenizer=tokenizer)
    return run


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(quickstart, "NUM_DEMONSTRATIONS", 4)
    monkeypatch.setattr(quickstart, "NUM_GRAMMAR_PAIRS", 150)
    monkeypatch.setattr(quickstart, "NUM_SAMPLED_PAIRS", 8)
    monkeypatch.setattr(quickstart, "NUM_PROMPTS", 64)
    monkeypatch.setattr(quickstart, "NUM_HELD_OUT", 32)


@pytest.fixture
def never_begun(monkeypatch):
    def refuse(config, root):
        raise AssertionError(f"{root}: work began")

    monkeypatch.setattr(overoptimization, "_source", refuse)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The models and rows of a small quickstart, and a configuration that uses them."""
    root = tmp_path_factory.mktemp("overoptimization")
    source = root / "quickstart"
    write_model(source / "sft")
    for name, count, split in (("", 150, "train"), ("_held_out", 64, "heldout")):
        pairs = map(dataclasses.asdict, reviews.make_preferences(1, count, split))
        write_rows(source / f"pairs{name}.jsonl", pairs)
        prompts = [{"prompt": p} for p in reviews.make_prompts(2, 64, split)]
        write_rows(source / f"prompts{name}.jsonl", prompts)
    return OveroptimizationConfig(
        run_dir=str(root / "run"), quickstart=str(source), **SMALL
    )


@pytest.fixture(scope="module")
def summary(config):
    return overoptimization.run(config)


def test_every_method_has_a_curve_and_the_files_are_there(config, summary, tmp_path):
    names = [curve["name"] for curve in summary["curves"]]
    assert names == [
        "PPO, β = 0",
        "PPO, β = 0, worst",
        "best of n, single",
        "best of n, worst",
    ]
    for curve in summary["curves"]:
        is_ppo = curve["method"] == "ppo"
        assert curve["at"] == ([0, 1, 2] if is_ppo else [1, 2, 4, 8])
        assert curve["kl"][0] == pytest.approx(0.0, abs=1e-3)
        assert np.isfinite([curve["proxy"], curve["true"], curve["kl"]]).all()
    root = Path(config.run_dir)
    assert json.loads((root / "overoptimization.json").read_text("utf-8")) == summary
    with (root / "overoptimization.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 + 2 * 4
    assert float(rows[1]["true"]) == summary["curves"][0]["true"][1]
    assert (root / "overoptimization.png").read_bytes()[:4] == b"\x89PNG"
    assert "| PPO, β = 0, worst |" in (root / "report.md").read_text("utf-8")


def test_runs_start_at_the_same_answers(summary):
    curves = {curve["name"]: curve for curve in summary["curves"]}
    single, worst = curves["PPO, β = 0"], curves["PPO, β = 0, worst"]
    assert single["true"][0] == worst["true"][0]
    assert single["others"][0] == worst["others"][0]
    # The worst of two is at most either, on the very same answers.
    assert worst["proxy"][0] <= min(single["proxy"][0], single["others"][0]) + 1e-5


def test_what_is_there_is_kept(config, summary, monkeypatch):
    def refuse(config):
        raise AssertionError(f"{config.run_dir} ran again")

    monkeypatch.setattr(ppo, "run", refuse)
    assert overoptimization.run(config) == summary


def test_without_a_quickstart_its_parts_are_made(
    config, few_rows, tmp_path, monkeypatch
):
    class Enough(Exception):
        """All that this test is about is there."""

    def stop(reward_config):
        raise Enough(reward_config.model)

    monkeypatch.setattr(sft, "run", lambda config: write_model(config.run_dir))
    monkeypatch.setattr(overoptimization.reward_stage, "run", stop)
    alone = dataclasses.replace(config, run_dir=str(tmp_path), quickstart=None)
    with pytest.raises(Enough, match="quickstart/sft/model"):
        overoptimization.run(alone)
    made = tmp_path / "quickstart"
    assert all((made / name).exists() for name in NEEDED)
    assert len((tmp_path / "pairs-0.jsonl").read_text("utf-8").splitlines()) == 64


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pairs", 128),
        ("ensemble_pairs", "same"),
        ("models", 3),
        ("reward_steps", 2),
        ("eval_every", 2),
        ("updates", 3),
        ("best_of_samples", 32),
        ("ensemble_penalty", 0.5),
        ("seed", 1),
    ],
)
def test_other_options_in_the_same_directory_are_refused(
    tmp_path, never_begun, option, value
):
    first = OveroptimizationConfig(run_dir=str(tmp_path / "run"), **SMALL)
    enter_directory(first, tmp_path / "run")
    kept = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = dataclasses.replace(first, **{option: value})
    was, flag = vars(first)[option], option.replace("_", "-")
    message = f"was started with {flag}={was!r}, not {value!r}; give that to resume"
    with pytest.raises(ValueError, match=message):
        overoptimization.run(other)
    found = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert found == kept


def test_further_runs_in_the_same_directory_are_welcome(tmp_path):
    first = OveroptimizationConfig(run_dir=str(tmp_path), **SMALL)
    enter_directory(first, tmp_path)
    marker = (tmp_path / "options.json").read_bytes()
    more = {"betas": (0.0, 0.1), "ensembles": (), "ensemble_beta": 0.1, "patience": 9}
    enter_directory(dataclasses.replace(first, **more, quiet=False), tmp_path)
    assert (tmp_path / "options.json").read_bytes() == marker


def test_a_directory_with_something_else_is_refused(tmp_path, never_begun):
    (tmp_path / "thesis.tex").write_text("")
    other = OveroptimizationConfig(run_dir=str(tmp_path), **SMALL)
    with pytest.raises(ValueError, match="is not empty; choose another --run-dir"):
        overoptimization.run(other)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_best_of_n_by_hand():
    # Two models of two prompts with four answers. The second says nothing.
    scores = np.zeros((2, 2, 4), np.float32)
    scores[0] = [[0.5, 1.5, 2.5, 3.5], [3.5, 2.5, 1.5, 0.5]]
    true = np.array([[1.0, 2.0, 3.0, -6.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    single, worst = best_of_n_curves(scores, true, ensembles=["worst"], penalty=1.0)
    assert single.at == [1, 2]
    # Of the six pairs, the fourth answer wins three, the third two, the second one.
    first = (3 * -6 + 2 * 3 + 1 * 2) / 6
    np.testing.assert_allclose(single.true, [0.0, first / 2], atol=1e-6)
    np.testing.assert_allclose(single.true_error, [0.0, abs(first) / 2], atol=1e-6)
    np.testing.assert_allclose(worst.proxy, [0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(worst.true, [0.0, 0.0], atol=1e-6)  # all are equal
    np.testing.assert_allclose(single.kl, [0.0, np.log(2) - 0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": ()}, r"betas=\(\): use one or more"),
        ({"betas": (0.1, 0.1)}, "betas=.*distinct"),
        ({"ensemble_beta": 0.2}, r"ensemble-beta=0\.2: must be one of betas"),
        ({"models": 1}, "models=1: must be at least 2"),
        ({"best_of_samples": 3}, "best-of-samples=3: must be at least 4"),
        ({"best_of_prompts": 1}, "best-of-prompts=1: must be at least 2"),
        ({"ensembles": ("worst", "worst")}, "ensembles=.*: list each kind once"),
        ({"quickstart": "nowhere"}, "quickstart='nowhere': it has no sft/model"),
        ({"pairs": 63}, "pairs=63: must be at least 64"),
        ({"pairs": 10_001}, r"pairs=10001: 2 × 10001 are more than the 20000"),
        ({"pairs": 20_001, "ensemble_pairs": "same"}, "1 × 20001 are more than"),
        ({"eval_prompts": 1_025}, "eval-prompts=1025: must be at most 1024"),
        ({"batch_size": 62}, "batch-size=62: must be a multiple of 4"),
    ],
)
def test_bad_input_is_one_line(tmp_path, never_begun, options, message):
    root = tmp_path / "new"
    wrong = OveroptimizationConfig(run_dir=str(root), **{**SMALL, **options})
    with pytest.raises(ValueError, match=message) as error:
        overoptimization.run(wrong)
    assert "\n" not in str(error.value)
    assert not root.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 64}, r"pairs=64: 2 × 64 are more than the 127 of quickstart="),
        ({"ensemble_pairs": "same", "eval_prompts": 21}, "=21: must be at most 20,"),
    ],
)
def test_a_quickstart_with_too_few_rows_is_refused(
    tmp_path, never_begun, options, message
):
    source = tmp_path / "quickstart"
    for name in NEEDED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    (source / "pairs.jsonl").write_text("{}\n" * 127)
    (source / "prompts_held_out.jsonl").write_text("{}\n" * 20)
    root = tmp_path / "new"
    wrong = OveroptimizationConfig(
        run_dir=str(root), quickstart=str(source), **{**SMALL, **options}
    )
    with pytest.raises(ValueError, match=message):
        overoptimization.run(wrong)
    assert not root.exists()
