"""Ratings, rankings and annotation files, as what a reward model is trained on."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax.config.run import OptimizerConfig
from rlhf_jax.config.supervised import RewardConfig
from rlhf_jax.data.annotation import write_annotation_file
from rlhf_jax.data.judgements import RatingScale
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models import save_pretrained
from rlhf_jax.models.tiny import byte_tokenizer, tiny_gpt2
from rlhf_jax.recipes import reward_model
from rlhf_jax.recipes.reward_model import read_feedback
from rlhf_jax.run.log_files import read_metrics

ANSWERS = (" awful", " dull", " fine", " superb")  # from worst to best
PROMPTS = [f"The {a}{b}:" for a in "ABCD" for b in "mnop"]
LABELS = ("bad", "so-so", "good", "very good")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("feedback") / "model"
    save_pretrained(path, *tiny_gpt2("lm"), tokenizer=byte_tokenizer())
    return str(path)


@pytest.fixture
def configured(model, tmp_path):
    """A configuration of a run on these rows, or on this file."""

    def make(rows, **options):
        path = rows
        if isinstance(rows, list):
            path = tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
        settings = {
            "data": str(path),
            "model": model,
            "run_dir": str(path) + ".run",
            "feedback": "judgements",
            "eval_fraction": 0.25,
            "eval_every": 100,
            "max_tokens": 32,
            "batch_size": 4,
            "steps": 3,
            "quiet": True,
        }
        return RewardConfig(**(settings | options))

    return make


def texts(feedback, config):
    """The rows of the first epoch: prompt and answers, with margins or grades."""
    tokenization = Tokenization.load(config.model)

    def read(sequences):
        rows = zip(sequences.tokens, sequences.mask, strict=True)
        return [tokenization.tokenizer.decode(t[m]) for t, m in rows]

    for step in range(feedback.batches.steps_per_epoch):
        batch = feedback.batches[step]
        if config.loss == "bradley-terry":
            columns = read(batch.chosen), read(batch.rejected), batch.margin.tolist()
            yield from zip(*columns, strict=True)
        else:
            for answers, grades, mask in zip(
                batch.answers.tokens, batch.grades, batch.mask, strict=True
            ):
                shown = [tokenization.tokenizer.decode(a) for a in answers[mask]]
                yield tuple(shown), grades[mask].tolist()


def read(config):
    config.validate()
    feedback = read_feedback(config, Tokenization.load(config.model))
    return feedback, list(texts(feedback, config))


def two_answers(i):
    """Two answers to prompt i, of which the better one stands first or last."""
    return [i % 3, i % 3 + 1] if i % 2 else [i % 3 + 1, i % 3]


def as_pair(i, prompt):
    low, high = sorted(two_answers(i))
    return {"prompt": prompt, "chosen": ANSWERS[high], "rejected": ANSWERS[low]}


def as_ranking(i, prompt):
    first, second = two_answers(i)
    answers = [ANSWERS[first], ANSWERS[second]]
    ranking = [1, 2] if first > second else [2, 1]
    return {"prompt": prompt, "responses": answers, "ranking": ranking}


def as_ratings(i, prompt):
    answers = [ANSWERS[j] for j in two_answers(i)]
    ratings = [LABELS[j] for j in two_answers(i)]
    return {"prompt": prompt, "responses": answers, "ratings": ratings}


def rows_of(form):
    return [form(i, prompt) for i, prompt in enumerate(PROMPTS)]


def test_every_form_gives_the_same_pairs(configured):
    pairs, want = read(configured(rows_of(as_pair), feedback="pairs"))
    assert len(want) == 12 and pairs.held_out.margin.shape == (4,)
    scale = RatingScale(labels=LABELS)
    for rows, options in (
        (rows_of(as_ranking), {}),
        (rows_of(as_ratings), {"scale": scale}),
    ):
        feedback, found = read(configured(rows, **options))
        assert found == want
        jax.tree.map(np.testing.assert_array_equal, feedback.held_out, pairs.held_out)


def test_margins_grow_with_the_difference_of_the_grades(configured):
    rows = [
        {"prompt": prompt, "responses": [" a", " b", " c"], "ratings": [1, 5, 3.5]}
        for prompt in PROMPTS[:2]
    ]
    config = configured(rows, margin_step=0.5, eval_fraction=0.5, batch_size=1)
    _, found = read(config)
    margins = {
        (a[-2:], b[-2:]): margin
        for a, b, margin in (
            [x[0].split("<")[0], x[1].split("<")[0], x[2]] for x in found
        )
    }
    assert margins == {(" b", " a"): 2.0, (" b", " c"): 0.75, (" c", " a"): 1.25}


def fill(path, order):
    """Rates every answer of an annotation file as good as it is."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        for letter in "ABCD":
            row[f"rating {letter}"] = LABELS[order.index(row[f"answer {letter}"])]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("loss", ["bradley-terry", "plackett-luce"])
def test_annotations_are_the_ratings_they_hold(configured, tmp_path, loss):
    path = tmp_path / "answers.csv"
    scale = RatingScale(labels=LABELS)
    given = [ANSWERS[:] for _ in PROMPTS]
    write_annotation_file(path, PROMPTS, given, kind="rating", scale=scale)
    fill(path, ANSWERS)
    _, found = read(configured(path, feedback="annotations", loss=loss))
    ratings = [
        {"prompt": prompt, "responses": ANSWERS, "ratings": LABELS}
        for prompt in PROMPTS
    ]
    _, want = read(configured(ratings, scale=scale, loss=loss))
    assert found == want
    assert len(found) == 12 * (6 if loss == "bradley-terry" else 1)


def contradicting():
    rows = rows_of(as_ranking)
    flipped = rows[0] | {"ranking": rows[0]["ranking"][::-1]}
    return [*rows, flipped, rows[1], rows[1]]


def test_findings_are_printed(configured, capsys):
    config = configured(contradicting(), on_contradiction="drop", quiet=False)
    read(config)
    lines = capsys.readouterr().out.splitlines()
    file = config.data
    assert lines[0].startswith(
        f"{file}: 2 × judgement repeated, first {file}:18, as at {file}:2"
    )
    assert lines[1].startswith(f"{file}: 2 × contradicted by another judgement")
    assert f"{file}:1:" in lines[1] and f"{file}:17" in lines[1]
    # Of 16 prompts with a pair each, that of the first is gone.
    assert "11 training pairs and 4 held-out pairs" in lines[-1]


def test_contradictions_stop_the_run_unless_it_is_said_what_to_do(configured):
    config = configured(contradicting())
    with pytest.raises(ValueError, match=r"\.jsonl:1.*on_contradiction") as stopped:
        read(config)
    assert "\n" not in str(stopped.value)


def test_rankings_with_ties_are_counted(configured, capsys):
    ties = [[1, 2, 2] if i < 10 else [1, 2, 3] for i in range(16)]
    rows = [
        {"prompt": prompt, "responses": ANSWERS[:3], "ranking": ranking}
        for prompt, ranking in zip(PROMPTS, ties, strict=True)
    ]
    held_out = configured(rows_of(as_ranking)).data
    options = {"loss": "plackett-luce", "eval_data": held_out, "quiet": False}
    _, found = read(configured(rows, **options))
    assert [grades for _, grades in found] == [
        [2.0, 1.0, 0.0]
    ] * 4  # one batch, of 6 that are left
    assert "10 of 16 training rankings dropped" in capsys.readouterr().out
    _, found = read(configured(rows, **(options | {"loss": "pairwise-ranking"})))
    assert sum(grades == [1.0, 0.0, 0.0] for _, grades in found) == 10
    with pytest.raises(ValueError, match=r"each of the 10 .*pairwise-ranking"):
        read(configured(rows[:10], **options))


def trained(config):
    metrics = read_metrics(reward_model.run(config).metrics)
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in metrics
    ]


def test_plackett_luce_of_two_answers_is_bradley_terry(configured):
    options = {"steps": 4, "center_coef": 0.1, "eval_every": 2}
    pairs = trained(configured(rows_of(as_pair), feedback="pairs", **options))
    rankings = rows_of(as_ranking)
    ranked = trained(configured(rankings, loss="plackett-luce", **options))
    assert len(pairs) == 5 and {"train/loss", "eval/accuracy"} <= pairs[-1].keys()
    for row, want in zip(ranked, pairs, strict=True):
        assert row == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "order"),  # of the same model, which can have one of them right by chance
    [("plackett-luce", [3, 2, 1, 0]), ("pairwise-ranking", [0, 3, 1, 2])],
)
def test_a_known_order_is_learnt(configured, loss, order):
    rng = np.random.default_rng(3)
    rows = []
    for prompt in PROMPTS:  # of 2 to 4 answers, in an order that says nothing
        shown = rng.permutation(4)[: rng.integers(2, 5)].tolist()
        places = sorted(shown, key=order.index)
        ranking = [places.index(i) + 1 for i in shown]
        answers = [ANSWERS[i] for i in shown]
        rows.append({"prompt": prompt, "responses": answers, "ranking": ranking})
    config = configured(rows, loss=loss, steps=40, microbatches=2)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=3e-3))
    metrics = trained(config)
    assert metrics[-1]["eval/accuracy"] > 0.9
    # A scorer that knows nothing pays log 2 for a pair, and for the order of a batch of
    # 2 to 4 answers the mean of log K!, above 1.2 (log 3! is 1.8).
    assert (metrics[1]["train/loss"] > 1.2) == (loss == "plackett-luce")
