"""Prompts with the columns that reward functions get."""

import gzip
import json

import pytest

from rlhf_jax.data.text_data import Columns, PromptRow, read_prompt_rows

PROBLEMS = [
    {"prompt": "1+1=", "answer": "2", "level": 1},
    {"prompt": "2+2=", "answer": "4", "level": 2},
    {"prompt": "1+1=", "answer": "two", "level": 1},
]


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(params=["a.jsonl", "a.jsonl.gz", "a.parquet"])
def write(request, tmp_path):
    """Writes rows to a file of one of the kinds."""
    path = tmp_path / request.param
    write_rows = write_parquet if path.suffix == ".parquet" else write_jsonl
    return lambda rows: write_rows(path, rows)


def place(path, row):
    """How messages name a row, from 1."""
    return f"{path}, row {row}" if path.suffix == ".parquet" else f"{path}:{row}"


def message_of(*args, **options):
    """The message of the error, which must be one line."""
    with pytest.raises(ValueError) as caught:
        read_prompt_rows(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_all_other_columns_are_kept_in_order(write):
    found = read_prompt_rows(write(PROBLEMS))
    assert found.rows == [
        PromptRow("1+1=", {"answer": "2", "level": 1}),
        PromptRow("2+2=", {"answer": "4", "level": 2}),
        PromptRow("1+1=", {"answer": "two", "level": 1}),
    ]
    assert found.dropped == {}


def test_named_columns_are_kept_and_no_others(write):
    path = write(PROBLEMS)
    rows = read_prompt_rows(path, keep=["level"]).rows
    assert [row.columns for row in rows] == [{"level": 1}, {"level": 2}, {"level": 1}]
    rows = read_prompt_rows(path, keep=()).rows
    assert [row.columns for row in rows] == [{}, {}, {}]
    # The prompt itself, where it is asked for.
    rows = read_prompt_rows(path, keep=["prompt"]).rows
    assert rows[1].columns == {"prompt": "2+2="}


def test_values_keep_their_kind(write):
    values = {"numbers": [3, 4], "target": 7.5, "tests": {"in": "a"}, "easy": True}
    rows = read_prompt_rows(write([{"prompt": "p", **values}])).rows
    assert rows == [PromptRow("p", values)]


def test_the_prompt_under_another_name(write):
    path = write([{"question": "1+1=", "prompt": "not this", "answer": "2"}])
    rows = read_prompt_rows(path, columns=Columns(prompt="question")).rows
    assert rows == [PromptRow("1+1=", {"prompt": "not this", "answer": "2"})]


def test_chat_messages_are_the_prompt_and_no_column(tmp_path):
    messages = [{"role": "user", "content": "1+1?"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, "answer": "2"}])
    rows = read_prompt_rows(
        path, render_chat=lambda chat, _: f"<{chat[0]['content']}>"
    ).rows
    assert rows == [PromptRow("<1+1?>", {"answer": "2"})]


def test_a_completion_is_a_column_like_any_other(write):
    rows = read_prompt_rows(write([{"prompt": "p", "completion": "c"}])).rows
    assert rows == [PromptRow("p", {"completion": "c"})]


def test_a_text_file_has_prompts_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n two é\n", encoding="utf-8")
    rows = read_prompt_rows(path).rows
    assert rows == [PromptRow("one", {}), PromptRow(" two é", {})]
    assert read_prompt_rows(path, keep=()).rows == rows
    message = message_of(path, keep=["answer"])
    assert str(path) in message and '"answer"' in message and ".jsonl" in message


def test_a_row_without_a_column_that_the_first_has(tmp_path):
    rows = [PROBLEMS[0], {"prompt": "2+2=", "level": 2}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    message = message_of(path)
    assert f"{path}:2" in message and '"answer"' in message
    assert '"prompt", "level"' in message  # what there is
    kept = read_prompt_rows(path, keep=["level"]).rows
    assert [row.columns for row in kept] == [{"level": 1}, {"level": 2}]


def test_a_column_that_no_row_has(write):
    path = write(PROBLEMS)
    message = message_of(path, keep=["solution"])
    assert place(path, 1) in message
    assert '"solution"' in message and '"answer"' in message


def test_null_is_no_value(write):
    path = write([*PROBLEMS, {"prompt": "3+3=", "answer": None, "level": 3}])
    message = message_of(path)
    assert place(path, 4) in message and '"answer"' in message and "null" in message
    assert len(read_prompt_rows(path, keep=["level"]).rows) == 4


def test_a_column_that_is_null_in_the_first_row_is_left_out(write):
    rows = [{"prompt": "p", "note": None, "answer": "2"}]
    rows += [{"prompt": "q", "note": "hard", "answer": "3"}]
    found = read_prompt_rows(write(rows)).rows
    assert [row.columns for row in found] == [{"answer": "2"}, {"answer": "3"}]
    assert '"note"' in message_of(write(rows), keep=["note"])


def test_columns_that_later_rows_have_besides(tmp_path):
    rows = [{"prompt": "p", "answer": "2"}, {"prompt": "q", "answer": "3", "level": 1}]
    found = read_prompt_rows(write_jsonl(tmp_path / "a.jsonl", rows)).rows
    assert [row.columns for row in found] == [{"answer": "2"}, {"answer": "3"}]


def test_blank_prompts_are_dropped_with_their_columns(write):
    path = write([PROBLEMS[0], {"prompt": " ", "answer": "?", "level": 0}, PROBLEMS[1]])
    assert place(path, 2) in message_of(path)
    found = read_prompt_rows(path, on_unusable="drop")
    assert [row.columns["answer"] for row in found.rows] == ["2", "4"]
    assert sum(found.dropped.values()) == 1
