"""The command runs from nothing, goes on where it was stopped, and refuses nonsense."""

import dataclasses
import json
import re

import pytest

from rlhf_jax.config.demos import ArithmeticConfig
from rlhf_jax.demos import arithmetic
from rlhf_jax.demos.arithmetic import PROBLEMS, TEXTS, TEXTS_HELD_OUT, write_data
from rlhf_jax.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_jax.recipes import grpo
from rlhf_jax.run.interrupt import Interrupted
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.tasks.arithmetic_problems import is_correct

TINY = ArithmeticConfig(
    demonstrations=120,
    sft_steps=3,
    updates=2,
    batch_size=16,
    eval_problems=4,
    quiet=True,
)


def tiny(root, **changes):
    return dataclasses.replace(TINY, run_dir=str(root), **changes)


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def write(tmp_path):
    """Writes the files of a configuration; returns a reader of them."""

    def run(**changes):
        write_data(tiny(tmp_path, **changes), tmp_path)
        return lambda name: read(tmp_path / name)

    return run


# ---- files ----


@pytest.mark.parametrize("form", ["plain", "reasoning"])
def test_files_hold_problems_and_what_a_careless_pupil_wrote(write, form):
    rows = write(form=form, slips=0.3, demonstrations=2_000)
    demonstrations = rows(TEXTS)
    assert len(demonstrations) == 2_000
    solved = [is_correct(row["prompt"], row["completion"]) for row in demonstrations]
    # Two columns, each right with probability 0.7: 49 %, within 5 standard errors.
    assert sum(solved) / 2_000 == pytest.approx(0.49, abs=0.056)
    has_steps = [row["completion"].startswith("<think>") for row in demonstrations]
    assert all(has_steps) if form == "reasoning" else not any(has_steps)
    for row in demonstrations:
        assert is_correct(row["prompt"], row["answer"])


def test_problems_of_the_three_files_are_different_and_answered(write):
    rows = write()
    by_split = {split: rows(name) for split, name in PROBLEMS.items()}
    prompts = {split: {row["prompt"] for row in by_split[split]} for split in by_split}
    assert {split: len(found) for split, found in prompts.items()} == {
        "train": 4_000,
        "heldout": 1_965,  # 1,149 sums and 816 differences, as documented
        "harder": 2_385,
    }
    assert not prompts["train"] & (prompts["heldout"] | prompts["harder"])
    assert not prompts["heldout"] & prompts["harder"]
    for row in by_split["train"] + by_split["harder"]:
        assert set(row) == {"prompt", "answer"}
        assert is_correct(row["prompt"], row["answer"])
    shown = {row["prompt"] for row in rows(TEXTS)}
    assert not shown & (prompts["heldout"] | prompts["harder"])


def test_single_digits_have_no_harder_problems(write, tmp_path):
    rows = write(digits=1, operations="+")
    assert len(rows(PROBLEMS["train"])) == 76
    assert not (tmp_path / PROBLEMS["harder"]).exists()


def test_a_base_model_reads_no_tag_that_is_asked_for(write):
    rows = write(form="r1-zero", demonstrations=4_000)
    texts = [row["text"] for row in rows(TEXTS) + rows(TEXTS_HELD_OUT)]
    assert len(texts) == 4_256
    assert not [text for text in texts if "think" in text or "answer" in text]
    announced = [text for text in texts if text.startswith("<")]
    # Four documents in five, of which three in ten keep the form; 5 standard errors.
    assert len(announced) / len(texts) == pytest.approx(0.8, abs=0.031)
    kept = [text for text in announced if text.endswith(">")]
    assert len(kept) / len(announced) == pytest.approx(0.3, abs=0.040)
    whole = re.compile(r"<(\w+)></\1><(\w+)></\2>[0-9+=-]+<\1>.+</\1><\2>[0-9]+</\2>")
    assert all(whole.fullmatch(text) for text in kept)
    for split in ("train", "heldout", "harder"):
        for row in rows(PROBLEMS[split])[:20]:
            form, problem = row["prompt"][:32], row["prompt"][32:]
            assert form == "<think></think><answer></answer>"
            assert is_correct(problem, row["answer"])


def test_another_seed_has_other_files(write):
    first = write(seed=0)
    before = [first(name) for name in (TEXTS, *PROBLEMS.values())]
    second = write(seed=1)
    after = [second(name) for name in (TEXTS, *PROBLEMS.values())]
    again = write(seed=0)
    assert [again(name) for name in (TEXTS, *PROBLEMS.values())] == before
    assert all(x != y for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"digits": 3},
        {"operations": "*"},
        {"digits": 1, "operations": "+"},
        {"slips": 0.0},
    ],
    ids=str,
)
def test_every_digit_is_one_token(write, changes):
    rows = write(form="reasoning", demonstrations=7_000, **changes)
    texts = [row["prompt"] + row["completion"] for row in rows(TEXTS)]
    size = arithmetic.SCALES["reasoning"].vocab_size
    tokenizer = train_tokenizer(texts, vocab_size=size)
    digits = [token for token in tokenizer.get_vocab() if re.search("[0-9]", token)]
    assert sorted(digits) == list("0123456789")


# ---- runs ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole tiny run: its directory and its summary."""
    root = tmp_path_factory.mktemp("arithmetic") / "run"
    return root, arithmetic.run(tiny(root))


def test_from_nothing_to_a_table(finished):
    root, summary = finished
    before, after = summary["policies"]
    assert (before["policy"], after["policy"]) == ("SFT", "grpo")
    shares = ("pass@1", "pass@4", "greedy", "harder pass@1", "form kept", "stop rate")
    for row in (before, after):
        assert all(0 <= row[name] <= 1 for name in shares)
        assert 0 < row["length (tokens)"] <= 48
    assert json.loads((root / "summary.json").read_text("utf-8")) == summary
    report = (root / "grpo" / "report.html").read_text("utf-8")
    assert "pass@1" in report and "harder pass@1" in report
    evaluations = [
        row for row in read(root / "grpo" / "metrics.jsonl") if "eval/pass_at_4" in row
    ]
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    assert load_tokenizer(root / "grpo" / "model")


def test_again_does_nothing_twice(finished, monkeypatch):
    root, summary = finished
    written = [(path, path.stat().st_mtime_ns) for path in root.glob("*.jsonl")]
    metrics = (root / "grpo" / "metrics.jsonl").read_text("utf-8")
    again = arithmetic.run(tiny(root))
    assert again["policies"] == summary["policies"]
    assert written == [(path, path.stat().st_mtime_ns) for path in root.glob("*.jsonl")]
    assert (root / "grpo" / "metrics.jsonl").read_text("utf-8") == metrics


def test_other_options_in_the_same_directory_are_refused(finished):
    root, _ = finished
    with pytest.raises(ValueError, match=r"started with slips=0\.35, not 0\.1"):
        arithmetic.run(tiny(root, slips=0.1))


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("four years of work", "utf-8")
    with pytest.raises(ValueError, match="is not empty; choose another --run-dir"):
        arithmetic.run(tiny(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interruption_says_how_to_go_on(finished, tmp_path, monkeypatch):
    root, _ = finished

    def stop(config):
        raise Interrupted("grpo stopped after step 1 of 2; … is in x. Resume with: y")

    monkeypatch.setattr(
        arithmetic.sft, "run", lambda config: RunDirectory(root / "sft")
    )
    monkeypatch.setattr(grpo, "run", stop)
    with pytest.raises(Interrupted) as stopped:
        arithmetic.run(tiny(tmp_path / "run"))
    assert str(stopped.value).endswith("in x. Run the same command again to resume")


@pytest.mark.parametrize("form", ["plain", "reasoning", "r1-zero"])
def test_answers_in_form_are_rewarded_only_where_there_is_one(form, tmp_path):
    found = arithmetic.policy_config(tiny(tmp_path, form=form), tmp_path)
    names = [spec.rpartition(":")[2] for spec in found.reward]
    assert names == ["exact_answer", "reasoning_format"][: 1 if form == "plain" else 2]


@pytest.mark.parametrize("method", ["ppo", *arithmetic.GRPO_PRESETS])
def test_every_method_has_a_valid_configuration(method, tmp_path):
    found = arithmetic.policy_config(ArithmeticConfig(method=method), tmp_path)
    found.validate()
    is_ppo = type(found).__name__ == "PPOConfig"
    assert is_ppo == (method == "ppo")
    rate = vars(found)["actor_optimizer" if is_ppo else "optimizer"].learning_rate
    assert rate == arithmetic.SCALES["reasoning"].learning_rate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digits": 4}, "digits=4: must be 1 to 3"),
        ({"operations": "+/"}, "operations='\\+/': use one or more of"),
        ({"operations": ""}, "operations='': use one or more of"),
        ({"slips": 1.0}, r"slips=1.0: must be in \[0, 1\)"),
        ({"updates": 0}, "updates=0: must be at least 1"),
        ({"sft_steps": 0}, "sft-steps=0: must be at least 1"),
        ({"learning_rate": 0.0}, "learning-rate=0.0: must be above 0"),
        ({"batch_size": 12}, "batch-size=12: must be a multiple of group-size=8"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arithmetic.run(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
