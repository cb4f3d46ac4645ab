"""`nonfinite.py`: steps that are skipped, and the batches that are kept of them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.types import (
    Demonstrations,
    Experience,
    Preferences,
    Rankings,
    Sequences,
)
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.finite import NonFiniteError
from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import ppo, sft
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.recipes.prompt_batches import read_prompt_data
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.run.log_files import read_metrics
from rlhf_jax.run.nonfinite import Dump, dumped_steps, read_dump, write_dump
from rlhf_jax.run.run_directory import RunDirectory

# ---- dumps ----


def sequences(seed):
    tokens = np.random.default_rng(seed).integers(0, 9, (2, 3)).astype(np.int32)
    return Sequences(tokens=tokens, mask=tokens > 2)


def batch_of(kind):
    a, b = sequences(0), sequences(1)
    match kind:
        case "sft":
            return Demonstrations(tokens=a.tokens, mask=a.mask, target_mask=b.mask)
        case "pairs":
            return Preferences(chosen=a, rejected=b, margin=np.float32([1, np.inf]))
        case "rankings":
            return Rankings(answers=a, grades=np.float32([[1, 0]]), mask=b.mask)
        case _:
            zeros = np.zeros((2, 3), np.float32)
            return Experience(mask=a.mask, old_logprobs=zeros, advantages=zeros / 0)


@pytest.mark.parametrize("kind", ["sft", "pairs", "rankings", "experience"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_dump_is_read_as_it_was_written(tmp_path, kind):
    run = RunDirectory(tmp_path)
    dump = Dump(
        stage="reward",
        step=12,
        error="the loss is NaN",
        config={"seed": 3, "lora": {"targets": ["query"]}},
        batch=batch_of(kind),
        prompts=["one", "zwei ü"],
        vocab_size=9,
    )
    path = write_dump(run, dump)
    assert [x.name for x in path.parent.iterdir()] == ["step-12.npz"]
    assert dumped_steps(run) == [12]
    found = read_dump(run, 12)
    jax.tree.map(np.testing.assert_array_equal, found.batch, dump.batch)
    same = dataclasses.replace(found, batch=dump.batch)
    assert vars(same) == vars(dump)


def test_a_dump_that_is_missing_or_damaged_is_one_line(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match=r"^step=3: .*steps with one: none$"):
        read_dump(run, 3)
    run.nonfinite.mkdir()
    (run.nonfinite / "step-4.npz").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"steps with one: 4$"):
        read_dump(run, 3)
    with pytest.raises(ValueError, match=r"step-4\.npz is damaged"):
        read_dump(run, 4)


def test_a_dump_that_cannot_be_written_hides_no_error(stages, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf_jax.run.nonfinite.write_dump", full)
    rate = dataclasses.replace(stages.sft.optimizer, learning_rate=1e38)
    config = dataclasses.replace(
        stages.sft, run_dir=str(tmp_path / "run"), optimizer=rate
    )
    with pytest.raises(NonFiniteError, match=r"^step 2: .*No space left") as stopped:
        sft.run(config)
    assert "replay" not in str(stopped.value)


# ---- skipping ----


def poisonous(make, rows):
    """An objective that is NaN for a batch with one of these rows of tokens."""
    rows = jnp.asarray(rows)

    def make_poisonous(*args, **options):
        objective = make(*args, **options)

        def of_rows(params, batch, divisor):
            tokens = batch.tokens[:, None, : rows.shape[1]]
            found = jnp.all(tokens == rows[None], axis=2).any()
            add = lambda x: x + jnp.where(found, jnp.nan, 0.0)  # noqa: E731
            return jax.tree.map(add, objective(params, batch, divisor))

        return of_rows

    return make_poisonous


def rows_of(run_dir):
    return read_metrics(Path(run_dir) / "metrics.jsonl")


@pytest.fixture
def skipping(stages, tmp_path, monkeypatch):
    """`sft` of six steps; and a function that poisons the batches of some."""
    config = dataclasses.replace(
        stages.sft, run_dir=str(tmp_path / "run"), steps=6, on_nonfinite="skip"
    )
    _, data = sft.read_sft_data(config)

    def poison(*steps):
        bad = np.stack([data.batches[step - 1].tokens[0] for step in steps])
        make = poisonous(sft.imitation_objective, bad)
        monkeypatch.setattr(sft, "imitation_objective", make)

    return config, data, poison


def test_a_skipped_step_changes_nothing_but_its_number(skipping, capsys):
    config, data, poison = skipping
    poison(2)
    network = sft.setup(
        config,
        Networks(config, make_mesh()),
        sft.model_shape(config, sft.read_sft_data(config)[0]),
    )
    want = network.state
    for step in (1, 3, 4, 5, 6):  # not 2
        want, _ = network.update(want, data.batches[step - 1])
    want = jax.tree.map(np.array, want.params)

    sft.run(config)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert line.startswith("warning: step 2: loss is not finite")
    assert line.endswith("the step is skipped, number 1 of at most 10")
    got = load_pretrained(Path(config.run_dir) / "model")[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)

    rows = rows_of(config.run_dir)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["optim/skipped"] for row in rows] == [0, 0, 1, 1, 1, 1, 1]
    assert "train/loss" not in rows[2] and "eval/loss" in rows[2]
    # The schedule has seen one step less.
    assert rows[3]["optim/learning_rate"] == rows[2]["optim/learning_rate"]
    dump = read_dump(RunDirectory(Path(config.run_dir)), 2)
    np.testing.assert_array_equal(dump.batch.tokens, data.batches[1].tokens)

    # The count survives a resume.
    sft.run(dataclasses.replace(config, resume=True, resume_step=3))
    assert rows_of(config.run_dir)[-1]["optim/skipped"] == 1


def test_at_the_limit_the_run_stops(skipping):
    config, _, poison = skipping
    poison(2, 4)
    config = dataclasses.replace(config, max_skipped=1)
    with pytest.raises(NonFiniteError, match="max-skipped=1 is reached") as stopped:
        sft.run(config)
    assert str(stopped.value).startswith("step 4: ")
    assert rows_of(config.run_dir)[-1]["step"] == 3
    assert dumped_steps(RunDirectory(Path(config.run_dir))) == [2, 4]
    # The limit can be raised, and the run goes on with the batch after it.
    sft.run(dataclasses.replace(config, resume=True, max_skipped=2))
    assert [row["optim/skipped"] for row in rows_of(config.run_dir)][2:] == [
        1,
        1,
        2,
        2,
        2,
    ]


def test_ppo_skips_an_update(stages, tmp_path, monkeypatch):
    kl = dataclasses.replace(stages.ppo.kl, target=0.1)
    config = dataclasses.replace(
        stages.ppo, run_dir=str(tmp_path / "run"), on_nonfinite="skip", kl=kl
    )
    data = read_prompt_data(config, Tokenization.load(config.policy))
    batches = data.batches(batch_size=config.batch_size, seed=config.seed)
    bad = batches[1]
    make = poisonous(ppo.ppo_objective, bad.prompts.tokens[:1])
    monkeypatch.setattr(ppo, "ppo_objective", make)
    ppo.run(config)
    rows = rows_of(config.run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["optim/skipped"] for row in rows] == [0, 0, 1, 1, 1]
    # β is adapted in updates that count only; the rate of step 3 is that of step 2.
    assert rows[3]["kl/coef"] == rows[2]["kl/coef"] != rows[1]["kl/coef"]
    name = "optim/actor_learning_rate"
    assert rows[3][name] == rows[2][name] != rows[1][name]
    tokens = [row["rollout/tokens"] for row in rows[1:]]
    assert sorted(set(tokens)) == tokens  # those of the skipped step count
    dump = read_dump(RunDirectory(Path(config.run_dir)), 2)
    assert dump.prompts == bad.texts
    np.testing.assert_array_equal(
        dump.batch.tokens[:, : data.width], bad.prompts.tokens
    )


def test_options_of_skipping_need_each_other(refused, tmp_path):
    flags = ("--data", "d", "--run-dir", str(tmp_path / "r"))
    line = refused("sft", *flags, "--max-skipped", 3)
    assert "max-skipped=3: has no effect without on-nonfinite=skip" in line
    policy = ("--policy", "p", "--reward-model", "r", "--on-nonfinite", "skip")
    steps = ("--no-undo-updates", "--epochs", 2)
    line = refused("ppo", *flags, *policy, *steps)
    assert "on-nonfinite='skip': requires undo-updates" in line
