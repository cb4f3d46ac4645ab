"""What the bounded readers accept, up to their limits, and where they stop."""

import gzip
import time

import pytest

from rlhf_jax.files import bounded_lines
from rlhf_jax.files.bounded_json import parse_json, read_object
from rlhf_jax.files.bounded_lines import read_lines
from rlhf_jax.files.bounded_yaml import parse_yaml
from rlhf_jax.files.printable import one_line, shown
from rlhf_jax.files.regular_file import read_bytes, read_text
from rlhf_jax.files.typed_fields import flag, integer, number, section, text


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ('{"a": [1, -2.5, true, null, "\\u00e9"]}', {"a": [1, -2.5, True, None, "é"]}),
        ("9" * 40, int("9" * 40)),
        ('"\\ud83d\\ude00"', "😀"),
        (r'"\\ud800"', r"\ud800"),  # a backslash, then letters
        ('"[[[{{{,,,"', "[[[{{{,,,"),
        ('"' + '\\"' * 200 + "[" * 200 + '"', '"' * 200 + "[" * 200),
        ('{"a": 1, "b": {"a": 2}}', {"a": 1, "b": {"a": 2}}),
    ],
)
def test_json_is_read(source, value):
    assert parse_json(source, "x") == value


def test_json_up_to_its_depth_and_number_of_values():
    value = parse_json("[" * 100 + "]" * 100, "x")
    for _ in range(99):
        (value,) = value
    assert value == []
    with pytest.raises(ValueError, match=r"^x: not valid JSON \(nested more than 100"):
        parse_json("[" * 101 + "]" * 101, "x")
    assert len(parse_json("[" + "1," * 8 + "1]", "x", most_values=9)) == 9
    with pytest.raises(ValueError, match=r"more than 9 values"):
        parse_json("[" + "1," * 9 + "1]", "x", most_values=9)


def test_json_that_python_writes_where_it_may():
    assert parse_json('{"a": Infinity}', "x", finite=False) == {"a": float("inf")}
    assert parse_json('"\\ud800"', "x", encodable=False) == "\ud800"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('{\n"a": 1,\n}', "line 3, column 1"),
        ("[1, ]", "column 5"),
        ('{"a": 1, "a": 1}', 'the key "a" occurs twice in one object'),
        ('"\\ude00\\ud83d"', r"\\ude00 is half a character"),
    ],
)
def test_json_that_is_refused_says_why(source, message):
    with pytest.raises(ValueError, match=message):
        parse_json(source, "x")


def test_yaml_is_read():
    source = "a: 1\nb: [x, 2.5]\nc: {d: yes, e: null}\nf: 2026-01-31\ng: .inf\n'1': x"
    assert parse_yaml(source, "x") == {
        **{"a": 1, "b": ["x", 2.5], "c": {"d": True, "e": None}},
        **{"f": "2026-01-31", "g": float("inf"), "1": "x"},
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a: 1\na: 2", r'x, line 2: invalid YAML: the key "a" occurs twice'),
        ("a: &b [1]\nc: *b", r"x, line 2: invalid YAML: \*b is an alias; write"),
        ("1: a", "this key is no text; quote it"),
    ],
)
def test_yaml_that_is_refused_says_where(source, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(source, "x")


def test_a_file_as_large_as_it_may_be(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, most_bytes=5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_bytes(path, most_bytes=4)
    path.write_bytes(b"good\nb\xe9d")
    with pytest.raises(ValueError, match="not UTF-8 text in line 2"):
        read_text(path, most_bytes=100)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"must contain one JSON object, not \[\]"):
        read_object(path)


def test_lines_as_long_as_they_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_lines, "MOST_CHARACTERS", 5)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff1234\nabcde".encode())
    assert list(read_lines(path)) == [(1, "1234\n"), (2, "abcde")]
    path.write_text("1234\nabcdef")
    with pytest.raises(ValueError, match=r"a\.txt:2: the line is longer than 5"):
        list(read_lines(path))


def test_a_compressed_file_that_expands_as_data_do(tmp_path):
    path = tmp_path / "a.txt.gz"
    words = "".join(f"{i * 7919 % 10007} words\n" for i in range(500_000))
    path.write_bytes(gzip.compress(words.encode(), 1))
    begin = time.process_time()
    assert sum(1 for _ in read_lines(path)) == 500_000  # 6 MB, beyond what is free
    assert time.process_time() - begin < 10


def test_fields_of_their_type_and_range():
    fields = {"i": 3, "x": 0.5, "b": False, "t": "a", "s": {"a": 1}, "n": None}
    assert integer(fields, "i", most=3) == 3 and integer(fields, "n", 7) == 7
    assert number(fields, "x") == 0.5 and number(fields, "i") == 3.0
    assert flag(fields, "b", default=True) is False and text(fields, "t") == "a"
    assert section(fields, "s") == {"a": 1} and section(fields, "n") == {}
    for call, message in (
        (lambda: integer(fields, "i", most=2), "i is 3: give an integer from 1 to 2"),
        (lambda: integer(fields, "b"), "b is false: give an integer from 1 to 2,147"),
        (lambda: number(fields, "t"), 't is "a": give a number from 1e-30 to 1e'),
        (lambda: number(fields, "none"), "none is null: give a number"),
        (lambda: flag(fields, "i", default=True), "i is 3: give true or false"),
        (lambda: text(fields, "s"), 's is {"a": 1}: give a text'),
        (lambda: section(fields, "t"), 't is "a": give an object or null'),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_values_are_shown_on_a_short_line():
    assert shown("a\n\u202e\x9b") == r'"a\n\u202e\x9b"'
    assert shown("x" * 100) == '"' + "x" * 76 + "..."
    assert one_line(ValueError("a\n  b\x1b")) == r"a b\x1b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
