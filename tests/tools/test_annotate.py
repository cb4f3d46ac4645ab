"""Answers of a model out to people who judge them, and their judgements back."""

import csv
import json
from pathlib import Path

import pytest

from rlhf_jax import cli
from rlhf_jax.data.annotation import write_annotation_file
from rlhf_jax.data.judgements import RatingScale, read_judgements
from rlhf_jax.models import save_pretrained
from rlhf_jax.models.tiny import byte_tokenizer, tiny_gpt2
from rlhf_jax.tools import annotate

PROMPTS = ["The Sea:", "The Road:"]
ANSWERS = [[" a", " b", " c"], [" d", " e", " f"]]
SCALE = RatingScale(labels=("bad", "good", "very good"))


def rows_of(path):
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def json_rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def save(path, rows):
    with Path(path).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def filled(file, copy, ranking_of):
    """A copy of a file of rankings, as one person fills it in."""
    rows = rows_of(file)
    for row in rows:
        row["ranking"] = ranking_of(row)
    return save(copy, rows)


def alphabetical(row):
    letters = [x for x in "ABC" if row[f"answer {x}"]]
    return " > ".join(sorted(letters, key=lambda x: row[f"answer {x}"]))


def contrary(row):
    """The other way round; all equal, of the last prompt."""
    letters = alphabetical(row).split(" > ")
    if row["prompt"] == PROMPTS[-1]:
        return " = ".join(letters)
    return " > ".join(letters[::-1])


def test_samples_go_out(tmp_path, capsys):
    model = str(tmp_path / "model")
    save_pretrained(model, *tiny_gpt2("lm"), tokenizer=byte_tokenizer())
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    )
    flags = ["--model", model, "--data", str(tmp_path / "prompts.jsonl")]
    flags += ["--max-new-tokens", "6", "--output", str(tmp_path / "new" / "a.csv")]
    cli.main(["annotate", "write", "--samples", "3", *flags])
    rows = rows_of(tmp_path / "new" / "a.csv")
    assert [row["prompt"] for row in rows] == PROMPTS
    key = json.loads((tmp_path / "new" / "a.csv.key.json").read_text("utf-8"))
    answers = [task["answers"] for task in key["tasks"].values()]
    assert [len(set(some)) for some in answers] == [3, 3]
    assert "2 prompts to judge written to" in capsys.readouterr().out
    flags[-1] = str(tmp_path / "g.jsonl")
    cli.main(["generate", "--samples", "3", *flags])
    given = json_rows(tmp_path / "g.jsonl")
    for prompt, some in zip(PROMPTS, answers, strict=True):
        assert some == [r["response"] for r in given if r["prompt"] == prompt]


def test_rankings_of_two_people_come_back(tmp_path, capsys):
    file = tmp_path / "answers.csv"
    write_annotation_file(file, PROMPTS, ANSWERS, kind="ranking")
    anna = filled(file, tmp_path / "anna.csv", alphabetical)
    bert = filled(file, tmp_path / "bert.csv", contrary)
    output = tmp_path / "judgements.jsonl"
    key = str(file) + ".key.json"
    flags = ["--key", key, "--output", str(output)]
    cli.main(["annotate", "read", "--files", anna, bert, *flags])
    printed = capsys.readouterr().out
    # Three pairs of each prompt by Anna, three of the first by Bert, who contradicts.
    assert "4 judgments of 2 prompts: 9 pairs" in printed
    assert "6 × contradicted by another judgement, first " in printed
    assert "3 × equal grades, first " in printed
    rows = json_rows(output)
    assert [row["annotator"] for row in rows] == [anna, anna, bert, bert]
    assert [row["responses"] for row in rows] == ANSWERS + ANSWERS
    wanted = [[1, 2, 3], [1, 2, 3], [3, 2, 1], [1, 1, 1]]
    assert [row["ranking"] for row in rows] == wanted


def test_ratings_come_back_on_their_scale(tmp_path):
    file = tmp_path / "answers.csv"
    write_annotation_file(file, PROMPTS, ANSWERS, kind="rating", scale=SCALE)
    rows = rows_of(file)
    for row in rows:
        for letter in "ABC":
            index = " abc def".index(row[f"answer {letter}"][1]) % 4 - 1
            row[f"rating {letter}"] = SCALE.labels[index]
    save(file, rows)
    output = tmp_path / "judgements.jsonl"
    config = annotate.AnnotateReadConfig(files=(str(file),), output=str(output))
    found = annotate.read(config)
    assert len(found.pairs) == 6
    judgements = read_judgements(output, scale=SCALE).rows
    assert [j.prompt for j in judgements] == PROMPTS
    assert [j.grades for j in judgements] == [(0.0, 1.0, 2.0)] * 2
    assert [list(j.answers) for j in judgements] == ANSWERS


def test_what_is_not_filled_in_is_counted(tmp_path, capsys):
    file = tmp_path / "answers.csv"
    write_annotation_file(file, PROMPTS, ANSWERS)
    rows = rows_of(file)
    rows[0]["ranking"] = alphabetical(rows[0])
    save(file, rows)
    cli.main(["annotate", "read", "--files", str(file), "--on-unfilled", "drop"])
    printed = capsys.readouterr().out
    assert "1 rows dropped: not filled in" in printed
    assert "1 judgments of 1 prompts: 3 pairs" in printed


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; returns its one line of complaint."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--samples", "1"], "samples=1"),
        (["--samples", "27"], "samples=27"),
        (["--temperature", "0"], "temperature=0"),
        (["--scale.labels", "bad", "good"], "scale="),
        (["--output", "answers.xlsx"], "answers.xlsx"),
    ],
)
def test_wrong_options_of_writing(refused, flags, named):
    assert named in refused(
        "annotate", "write", "--model", "m", "--prompt", "p", *flags
    )


def test_a_file_that_may_be_filled_in_is_kept(refused, tmp_path):
    (tmp_path / "a.csv").write_text("precious")
    flags = ["--model", "m", "--prompt", "p", "--output", tmp_path / "a.csv"]
    assert "already exists" in refused("annotate", "write", *flags)
    assert (tmp_path / "a.csv").read_text() == "precious"


def test_wrong_input_of_reading(refused, tmp_path):
    read = ["annotate", "read", "--files"]
    assert "a.csv" in refused(*read, tmp_path / "a.csv")
    assert "output='x.csv'" in refused(*read, "a.csv", "--output", "x.csv")
    assert "overwrite" in refused(*read, "./a.jsonl", "--output", "a.jsonl")
    ranked, rated = tmp_path / "ranked.csv", tmp_path / "rated.csv"
    write_annotation_file(ranked, PROMPTS, ANSWERS)
    write_annotation_file(rated, PROMPTS, ANSWERS, kind="rating")
    message = refused(*read, ranked, rated)
    assert "rated.csv" in message and "kind or rating scale" in message
    assert "ranked.csv, row 2" in refused(*read, ranked)


def test_half_of_the_command(refused):
    assert "annotate write" in refused("annotate", "wriet")


def reward(*flags):
    required = ["--data", "d", "--model", "m", "--run-dir", "r"]
    return ["reward", *required, *flags]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--loss", "plackett-luce"], "loss='plackett-luce'"),
        (["--loss", "pairwise-ranking"], "loss='pairwise-ranking'"),
        (["--margin-step", "1"], "margin-step=1.0"),
        (["--on-contradiction", "drop"], "on-contradiction='drop'"),
        (["--on-unfilled", "drop"], "on-unfilled='drop'"),
        (["--scale.highest", "7"], "scale="),
        (["--feedback", "annotations", "--scale.highest", "7"], "scale="),
        (["--feedback", "annotations", "--unusable-pairs", "drop"], "unusable-pairs="),
        (["--feedback", "judgements", "--on-unfilled", "drop"], "on-unfilled="),
        (["--feedback", "judgements", "--margin-step", "-1"], "margin-step=-1.0"),
        (["--feedback", "judgements", "--margin-step", "inf"], "margin-step=inf"),
    ],
)
def test_wrong_options_of_reward(refused, flags, named):
    assert named in refused(*reward(*flags))


@pytest.mark.parametrize(
    "flags", [["--margin-step", "1"], ["--label-smoothing", "0.1"]]
)
def test_options_that_plackett_luce_does_not_have(refused, flags):
    ranked = ["--feedback", "judgements", "--loss", "plackett-luce"]
    assert f"{flags[0][2:]}=" in refused(*reward(*ranked, *flags))
