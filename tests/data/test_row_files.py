"""Rows of files and where they are, or one line that says what is wrong."""

import gzip

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data.row_files import read_lines, read_rows


def message_of(path, read=read_rows):
    """The message of the error, which must be one line that begins with the path."""
    with pytest.raises(ValueError) as caught:
        list(read(path))
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def read(path):
    return [(row.where, row.values) for row in read_rows(path)]


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL.GZ"])
def test_lines_and_their_numbers(tmp_path, name):
    content = '\ufeff\n{"a": 1}\r\n  \n{"b": "é\u2028"}'.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert read(path) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"b": "é\u2028"})]
    assert read(str(path)) == read(path)


def test_rows_of_parquet_and_their_numbers(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"a": i, "b": [{"c": str(i)}]} for i in range(5)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert read(path) == [(f"{path}, row {i + 1}", row) for i, row in enumerate(rows)]


def test_rows_of_a_parquet_file_larger_than_one_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"a": list(range(70_000))})  # pyarrow reads 65,536 at a time
    pyarrow.parquet.write_table(table, path)
    rows = read(path)
    assert rows[-1] == (f"{path}, row 70000", {"a": 69_999}) and len(rows) == 70_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_missing_file_and_folder(tmp_path, name):
    path = tmp_path / name
    assert message_of(path) == ": no such file"
    path.mkdir()
    assert message_of(path) == ": is a folder, not a file"


@pytest.mark.parametrize("name", ["a.json", "a", "a.gz", "a.csv"])
def test_unknown_extension(tmp_path, name):
    (tmp_path / name).write_text('{"text": "t"}')
    assert ".jsonl, .jsonl.gz, .parquet, .txt" in message_of(tmp_path / name)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_file_without_rows(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    assert message_of(tmp_path / "a.jsonl") == ": the file has no rows"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    assert message_of(tmp_path / "a.jsonl.gz") == ": the file has no rows"


def test_parquet_file_without_rows(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert message_of(tmp_path / "a.parquet") == ": the file has no rows"


def test_damaged_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "t"}\n' * 2000)
    for damaged in (whole[:-20], whole[:20] + b"\x00" * 20 + whole[40:], b"no gzip"):
        path.write_bytes(damaged)
        assert message_of(path).startswith(": corrupt gzip file after line ")


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text('{"text": "t"}')
    assert message_of(path).startswith(": corrupt parquet file after row 0 (")


@pytest.mark.parametrize("reader", [read_rows, read_lines])
def test_text_of_another_encoding(tmp_path, reader):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é"}'.encode("latin-1"))
    assert message_of(path, reader).startswith(
        ": not UTF-8 text somewhere after line 0"
    )


@pytest.mark.parametrize("line", ["{'text': 1}", '{"text": "t"', "nonsense"])
def test_broken_json(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "t"}}\n{line}\n')
    assert message_of(path).startswith(":2: not valid JSON (")


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "3", "null"])
def test_row_that_is_no_object(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "t"}}\n\n{line}\n')
    assert message_of(path).startswith(f":3: {line} is not an object")
