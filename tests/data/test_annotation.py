"""Files go out to a person and come back as judgements of the right answers."""

import csv
import json

import pytest

from rlhf_jax.data.annotation import (
    key_path,
    read_annotation_file,
    write_annotation_file,
)
from rlhf_jax.data.judgements import RatingScale

PROMPTS = ["How are you?", "Wie geht's?", "=1+1\nis what?"]
RESPONSES = [
    ["fine, thanks", 'he said "fine"', "-5 °C"],
    ["gut;\tdanke", "naja\r\nes geht"],
    ["=2", "@two", "+2"],
]
BEST = ["fine, thanks", "gut;\tdanke", "@two"]
WORDS = RatingScale(labels=("bad", "good", "very good"))


@pytest.fixture(params=["a.csv", "a.jsonl"])
def path(request, tmp_path):
    return tmp_path / request.param


def rows_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def save(path, rows, delimiter=","):
    """As a spreadsheet or an editor would."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
        return
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def shown_as(row, text):
    """The letter under which the person sees an answer."""
    (letter,) = [
        name.removeprefix("answer ")
        for name, value in row.items()
        if name.startswith("answer ") and value.removeprefix("'") == text
    ]
    return letter


def fill_rankings(path):
    """The best alone in front, the others tied."""
    rows = rows_of(path)
    for row, answers, best in zip(rows, RESPONSES, BEST, strict=True):
        others = [shown_as(row, answer) for answer in answers if answer != best]
        row["ranking"] = f" {shown_as(row, best).lower()} > {'= '.join(others)}"
    return rows


def message_of(path, **options):
    """The message of the error, which must be one line that begins with the path."""
    with pytest.raises(ValueError) as caught:
        read_annotation_file(path, **options)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def where(path, number):
    """`number` counts the rows with answers from 1."""
    return f", row {number + 1}: " if path.suffix == ".csv" else f":{number}: "


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_rankings_go_round(path, delimiter):
    assert write_annotation_file(path, PROMPTS, RESPONSES, seed=3) == 3
    rows = fill_rankings(path)
    for row in rows:
        row["comment"] = "hard; to, say"
    save(path, rows[::-1], delimiter)
    found = read_annotation_file(path)
    assert found.dropped == {} and len(found.rows) == 3
    for judgement, prompt, answers, best in zip(
        found.rows[::-1], PROMPTS, RESPONSES, BEST, strict=True
    ):
        assert judgement.prompt == prompt
        assert judgement.answers == tuple(answers)
        assert judgement.grades == tuple(float(answer == best) for answer in answers)
        assert judgement.annotator == str(path)
    assert found.rows[0].places[0] == f"{path}{where(path, 1)[:-2]}"


def test_ratings_go_round(path):
    write_annotation_file(path, PROMPTS, RESPONSES, kind="rating", scale=WORDS, seed=1)
    rows = rows_of(path)
    said = ("bad", "good", "Very good")
    for row, answers in zip(rows, RESPONSES, strict=True):
        for answer, rating in zip(answers, said, strict=False):
            row[f"rating {shown_as(row, answer)}"] = rating
    save(path, rows)
    found = read_annotation_file(path, annotator="ann").rows
    assert [j.grades for j in found] == [(0.0, 1.0, 2.0), (0.0, 1.0), (0.0, 1.0, 2.0)]
    assert [j.answers for j in found] == [tuple(answers) for answers in RESPONSES]
    assert {j.annotator for j in found} == {"ann"}


def test_what_the_person_sees(path):
    write_annotation_file(path, PROMPTS, RESPONSES)
    first, second, third = rows_of(path)
    assert list(first) == [
        "id", "prompt", "answer A", "answer B", "answer C", "instructions", "ranking"
    ]  # fmt: skip
    assert (first["id"], first["prompt"], first["ranking"]) == ("1", PROMPTS[0], "")
    assert "B > A = C" in first["instructions"]
    assert second["answer C"] == ""
    if path.suffix == ".csv":  # a spreadsheet would run these
        assert third["prompt"] == "'=1+1\nis what?"
        cells = {third[f"answer {letter}"] for letter in "ABC"}
        assert cells == {"'=2", "'@two", "'+2"}
        assert path.read_bytes().startswith(b"\xef\xbb\xbf")


def test_what_the_person_who_rates_sees(path):
    write_annotation_file(path, ["p"], [["x"]], kind="rating", scale=WORDS)
    (row,) = rows_of(path)
    assert list(row) == ["id", "prompt", "answer A", "rating A", "instructions"]
    assert '"bad", "good", "very good"' in row["instructions"]


def test_answers_are_shuffled_by_the_seed(tmp_path):
    def orders(seed, name):
        path = tmp_path / name
        write_annotation_file(path, ["p"] * 200, [["x", "y", "z"]] * 200, seed=seed)
        return ["".join(r[f"answer {c}"] for c in "ABC") for r in rows_of(path)]

    first = orders(0, "0.jsonl")
    assert orders(0, "again.csv") == first != orders(1, "1.jsonl")
    # Each of the 6 orders is expected 33 times with a deviation of 5.3.
    assert set(first) == {"xyz", "xzy", "yxz", "yzx", "zxy", "zyx"}
    assert all(10 < first.count(order) < 60 for order in set(first))


def test_equal_answers_are_shown_once(path):
    written = write_annotation_file(
        path, ["p", "q"], [["same", "same"], ["x", "y", "x"]]
    )
    (row,) = rows_of(path)
    assert written == 1 and row["prompt"] == "q" and "answer C" not in row


def test_a_file_that_came_back_by_another_name(path):
    write_annotation_file(path, PROMPTS, RESPONSES)
    back = path.with_name(f"ann{path.suffix}")
    save(back, fill_rankings(path))
    assert message_of(back).endswith(".key.json: no such file")
    found = read_annotation_file(back, key=key_path(path))
    assert len(found.rows) == 3 and found.rows[0].annotator == str(back)


def test_rows_not_filled_in(path):
    write_annotation_file(path, PROMPTS, RESPONSES)
    nothing = message_of(path)
    assert nothing.startswith(f'{where(path, 1)}column "ranking" is empty; 3 of 3')
    assert 'on_unfilled="drop"' not in nothing
    rows = fill_rankings(path)
    rows[1]["ranking"] = " "
    save(path, rows[:2])
    message = message_of(path)
    assert message.startswith(f'{where(path, 2)}column "ranking" is empty; 2 of 3')
    assert "such as B > A = C" in message and 'on_unfilled="drop"' in message
    found = read_annotation_file(path, on_unfilled="drop")
    assert [j.prompt for j in found.rows] == PROMPTS[:1]
    assert found.dropped == {"not filled in": 2}
    save(path, [row for row in rows if row["id"] != "2"])
    assert message_of(path).startswith(': no row has the id "2"; 1 of 3')


def test_one_rating_not_filled_in(path):
    write_annotation_file(path, ["p"], [["x", "y"]], kind="rating")
    (row,) = rows_of(path)
    save(path, [{**row, "rating A": "4"}])
    assert message_of(path).startswith(f'{where(path, 1)}column "rating B" is empty')


@pytest.mark.parametrize(
    "ranking", ["A", "A > A = B", "A > B > C > D", "A, B, C", "A > > B = C", "1", 3]
)
def test_wrong_rankings(path, ranking):
    write_annotation_file(path, PROMPTS, RESPONSES)
    rows = fill_rankings(path)
    rows[2]["ranking"] = ranking
    save(path, rows)
    shown = f'"{ranking}"' if path.suffix == ".csv" else json.dumps(ranking)
    assert message_of(path) == (
        f'{where(path, 3)}column "ranking" is {shown}; write each of A, B, C once, '
        "from best to worst, such as C > B > A, with = for a tie"
    )


@pytest.mark.parametrize(
    ("scale", "rating", "right"),
    [
        (WORDS, "great", 'one of "bad", "good", "very good"'),
        (None, "6", "a number from 1 to 5"),
        (None, "good", "a number from 1 to 5"),
    ],
)
def test_wrong_ratings(path, scale, rating, right):
    write_annotation_file(path, ["p"], [["x", "y"]], kind="rating", scale=scale)
    (row,) = rows_of(path)
    good = "good" if scale else "4"
    save(path, [{**row, "rating A": good, "rating B": rating}])
    assert message_of(path) == (
        f'{where(path, 1)}column "rating B": "{rating}" is not {right}'
    )


def test_rows_that_do_not_belong(path):
    write_annotation_file(path, PROMPTS, RESPONSES)
    rows = fill_rankings(path)
    save(path, [*rows, rows[0]])
    assert message_of(path).startswith(f'{where(path, 4)}column "id" is "1", as at ')
    save(path, [rows[0], {**rows[1], "id": "7"}])
    assert message_of(path).startswith(
        f'{where(path, 2)}column "id" is "7", which is not in the key'
    )
    without = [{k: v for k, v in row.items() if k != "ranking"} for row in rows]
    save(path, without)
    assert message_of(path).startswith(f'{where(path, 1)}no column "ranking"')


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "ranking"}'])
def test_damaged_key(path, text):
    write_annotation_file(path, PROMPTS, RESPONSES)
    key_path(path).write_text(text)
    assert message_of(path).startswith(".key.json: not the key of an annotation file")


def test_wrong_input_to_writing(tmp_path):
    def refusal(name="a.csv", prompts=("p",), responses=(("x", "y"),), **options):
        with pytest.raises(ValueError) as caught:
            write_annotation_file(tmp_path / name, prompts, responses, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "must end in .csv or .jsonl" in refusal("a.xlsx")
    assert refusal(kind="order") == 'kind="order": give "ranking" or "rating"'
    assert refusal(seed=-1) == "seed=-1: at least 0"
    assert "2 prompts and 1 lists" in refusal(prompts=("p", "q"))
    assert "has 27 responses; give at most 26" in refusal(responses=(["x"] * 27,))
    assert "has 40000 characters" in refusal(responses=(("x" * 40_000, "y"),))
    assert "no prompt has 2 different responses" in refusal(responses=(("x", "x"),))
    assert list(tmp_path.iterdir()) == []
    write_annotation_file(tmp_path / "a.csv", ["p"], [["x", "y"]])
    before = (tmp_path / "a.csv").read_bytes()
    assert "already exists and may be filled in" in refusal()
    assert (tmp_path / "a.csv").read_bytes() == before
    with pytest.raises(ValueError, match=r'on_unfilled="keep": give "fail" or "drop"'):
        read_annotation_file(tmp_path / "a.csv", on_unfilled="keep")


def test_a_header_that_is_too_long_is_one_line(tmp_path):
    path = tmp_path / "a.csv"
    write_annotation_file(path, PROMPTS, RESPONSES)
    path.write_text("x" * 200_000 + "\n1\n")  # the module csv takes 131,072
    with pytest.raises(ValueError, match=r"a\.csv: not a CSV file"):
        read_annotation_file(path)
