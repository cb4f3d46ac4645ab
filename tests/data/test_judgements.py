"""Files of ratings and rankings become judgements, or one clear error."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data.judgements import (
    Judgement,
    JudgementColumns,
    RatingScale,
    grades_of_ranking,
    read_judgements,
)

WORDS = RatingScale(labels=("bad", "good", "very good"))


@pytest.fixture(params=["a.jsonl", "a.parquet"])
def path(request, tmp_path):
    return tmp_path / request.param


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def place(path, number):
    return f"{path}, row {number}" if path.suffix == ".parquet" else f"{path}:{number}"


def message_of(path, rows, **options):
    """The message of the error, which must be one line."""
    with pytest.raises(ValueError) as caught:
        read_judgements(write(path, rows), **options)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    return str(caught.value)


def test_rated_answers(path):
    rows = [
        {"prompt": "p", "response": "x", "rating": "very good", "annotator": "ann"},
        {"prompt": "p", "response": "", "rating": " Bad ", "annotator": None},
    ]
    found = read_judgements(write(path, rows), scale=WORDS)
    assert found.rows == [
        Judgement(
            prompt="p",
            answers=("x",),
            grades=(2.0,),
            places=(place(path, 1),),
            annotator="ann",
        ),
        Judgement(prompt="p", answers=("",), grades=(0.0,), places=(place(path, 2),)),
    ]
    assert found.dropped == {}


def test_lists_of_ratings(path):
    rows = [{"prompt": "p", "responses": ["x", "y", "z"], "ratings": [1, 4.5, 5]}]
    (found,) = read_judgements(write(path, rows)).rows
    assert (found.answers, found.grades) == (("x", "y", "z"), (1.0, 4.5, 5.0))
    assert found.places == (place(path, 1),) * 3


def test_rankings(path):
    # Places, not an order of indices: y is the best, then x and z alike, w the worst.
    rows = [{"prompt": "p", "responses": ["x", "y", "z", "w"], "ranking": [2, 1, 2, 4]}]
    (found,) = read_judgements(write(path, rows)).rows
    assert found.answers == ("x", "y", "z", "w")
    assert found.grades == (1.0, 2.0, 1.0, 0.0)


def test_chat_messages(tmp_path):
    def render(messages, add_generation_prompt):
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")

    prompt = [{"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": "a"}]
    rows = [{"prompt": prompt, "responses": [answer, "text"], "ranking": [1, 2]}]
    path = write(tmp_path / "a.jsonl", rows)
    (found,) = read_judgements(path, render_chat=render).rows
    assert found.prompt == "<user>q\n<assistant>"
    assert found.answers == ("a", "text")
    assert "chat messages need render_chat" in message_of(path, rows)


def test_columns_of_other_names(path):
    rows = [{"question": "p", "answers": ["x", "y"], "stars": [2, 3], "by": 7}]
    columns = JudgementColumns(
        prompt="question", responses="answers", ratings="stars", annotator="by"
    )
    (found,) = read_judgements(write(path, rows), columns=columns).rows
    assert (found.prompt, found.annotator) == ("p", "7")
    wrong = message_of(path, rows, columns=JudgementColumns(annotator="who"))
    assert wrong.startswith(f'{place(path, 1)}: no column "who"; this row has')


def test_blank_prompts(path):
    good = {"prompt": "p", "response": "x", "rating": 3}
    blank = {"prompt": " ", "response": "x", "rating": 3}
    assert message_of(path, [good, blank]).startswith(f"{place(path, 2)}: empty prompt")
    found = read_judgements(write(path, [good, blank]), on_unusable="drop")
    assert len(found.rows) == 1 and found.dropped == {"empty prompt": 1}
    only = message_of(path, [blank], on_unusable="drop")
    assert only == f"{path}: no row is usable: 1 × empty prompt"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"rating": 6}, 'column "rating": 6 is not a number from 1 to 5'),
        ({"rating": 0.5}, 'column "rating": 0.5 is not a number from 1 to 5'),
        ({"rating": True}, 'column "rating": true is not a number'),
        ({"rating": None}, 'column "rating": null is not a number'),
        ({"rating": "good"}, 'column "rating": "good" is not a number from 1 to 5'),
        ({"rating": float("nan")}, 'column "rating": NaN is not a number from 1 to 5'),
        ({"response": 3}, 'column "response" is 3, not text'),
        ({"annotator": " "}, 'column "annotator" is " "; give a name'),
        ({"annotator": ["a"]}, 'column "annotator" is ["a"]; give a name'),
    ],
)
def test_wrong_ratings(tmp_path, row, problem):
    good = {"prompt": "p", "response": "x", "rating": "3"}
    path = tmp_path / "a.jsonl"
    assert message_of(path, [good, {**good, **row}]).startswith(f"{path}:2: {problem}")


def test_unknown_labels(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "response": "x", "rating": "great"}]
    assert message_of(path, rows, scale=WORDS) == (
        f'{path}:1: column "rating": "great" is not one of "bad", "good", "very good"'
    )
    rows = [{"prompt": "p", "response": "x", "rating": 3.0}]
    assert "3.0 is not one of" in message_of(path, rows, scale=WORDS)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"ranking": [1, 2, 3]}, "has 3 entries for the 2 in column"),
        ({"ranking": 1}, "is 1, not a list with one entry per response"),
        ({"ranking": [], "responses": []}, "is [], not a list with one entry"),
        ({"responses": "x"}, 'is "x", not a list'),
        ({"ranking": [0, 1]}, "[0, 1] does not give the rank of each response"),
        ({"ranking": [2, 2]}, "[2, 2] does not give"),
        ({"ranking": [1, 3]}, "from 1 for the best to at most 2"),
        ({"ranking": [1, 1.5]}, "[1, 1.5] does not give"),
        ({"ranking": [True, 2]}, "[true, 2] does not give"),
        ({"ranking": ["1", "2"]}, '["1", "2"] does not give'),
        ({"ranking": [1, None]}, "[1, null] does not give"),
    ],
)
def test_wrong_rankings(tmp_path, row, problem):
    good = {"prompt": "p", "responses": ["x", "y"], "ranking": [1.0, 2.0]}
    path = tmp_path / "a.jsonl"
    message = message_of(path, [good, {**good, **row}])
    assert message.startswith(f'{path}:2: column "') and problem in message


def test_unknown_forms(path):
    for row in (
        {"prompt": "p", "response": "x"},
        {"response": "x", "rating": 3},
        {"prompt": "p", "responses": ["x", "y"], "ranking": [1, 2], "ratings": [3, 2]},
    ):
        message = message_of(path, [row])
        assert message.startswith(f"{place(path, 1)}: the row has the columns ")
        assert '"responses" and "ranking"' in message
    rows = [
        {"prompt": "p", "response": "x", "rating": 3},
        {"prompt": "p", "response": "x", "score": 3},
    ]
    if path.suffix == ".jsonl":  # of parquet all rows have the same columns
        assert message_of(path, rows).startswith(f'{path}:2: no column "rating"')


def test_wrong_options(tmp_path):
    rows = [{"prompt": "p", "response": "x", "rating": 3}]
    message = message_of(tmp_path / "a.jsonl", rows, on_unusable="keep")
    assert message == 'on_unusable="keep": give "fail" or "drop"'
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a \.txt file has no judgements"):
        read_judgements(tmp_path / "a.txt")
    for labels in (("good",), ("good", "Good "), ("", "good")):
        with pytest.raises(ValueError, match="at least two different labels"):
            RatingScale(labels=labels)
    with pytest.raises(ValueError, match="highest rating must be above the lowest"):
        RatingScale(lowest=5, highest=5)


def test_scale_of_other_numbers():
    scale = RatingScale(lowest=-2, highest=2)
    assert [scale.grade(x) for x in (-2, "0.5", 2.0)] == [-2.0, 0.5, 2.0]
    assert RatingScale(labels=("1", "2")).grade(2) == 1.0
    with pytest.raises(ValueError, match="a number from -2 to 2"):
        scale.grade(3)


def test_grades_of_places_without_gaps():
    assert grades_of_ranking([1, 1, 3]) == grades_of_ranking([1, 1, 2]) == (1, 1, 0)
