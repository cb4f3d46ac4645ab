"""Files of every form become examples, pairs and prompts, or one clear error."""

import gzip
import json

import pytest

from rlhf_jax.data.text_data import (
    Columns,
    Example,
    PreferencePair,
    read_examples,
    read_pairs,
    read_prompts,
)

READERS = [read_examples, read_pairs, read_prompts]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


GOOD = {
    "prompt": "p",
    "completion": "c",
    "text": "t",
    "chosen": "so it is",
    "rejected": "so it was",
    "messages": [user("q"), assistant("a")],
}


def render_chat(messages, add_generation_prompt):
    """<user>hi</> and a line break for each message, as ChatML does."""
    text = "".join(f"<{m['role']}>{m['content']}</>\n" for m in messages)
    return text + ("<assistant>" if add_generation_prompt else "")


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def write(path, rows):
    return (write_parquet if path.suffix == ".parquet" else write_jsonl)(path, rows)


def message_of(read, *args, **options):
    """The message of the error, which must be one line."""
    with pytest.raises(ValueError) as caught:
        read(*args, **options)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(params=["a.jsonl", "a.jsonl.gz", "a.parquet"])
def rows_file(request, tmp_path):
    return tmp_path / request.param


# Forms.


def test_prompt_and_completion_of_every_kind_of_file(rows_file):
    write(rows_file, [{"prompt": f"é{i}?", "completion": f" {i}\n"} for i in range(5)])
    read = read_examples(rows_file)
    assert read.rows == [Example(f"é{i}?", f" {i}\n") for i in range(5)]
    assert read.dropped == {}
    assert read_prompts(rows_file).rows == ["é0?", "é1?", "é2?", "é3?", "é4?"]


def test_response_is_another_name_of_completion(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    assert read_examples(str(path)).rows == [Example("p", "r")]


def test_columns_of_other_names(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "text": "t"}])
    columns = Columns(prompt="question", completion="answer")
    assert read_examples(path, columns=columns).rows == [Example("q", "a")]
    assert read_prompts(path, columns=Columns(prompt="question")).rows == ["q"]


def test_plain_text_column(rows_file):
    write(rows_file, [{"text": "one"}, {"text": "two\n"}])
    assert read_examples(rows_file).rows == [Example("", "one"), Example("", "two\n")]
    assert read_prompts(rows_file).rows == ["one", "two\n"]


def test_text_file_is_one_text_or_a_prompt_per_line(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffone\r\n\n two é".encode())
    assert read_examples(path).rows == [Example("", "one\n\n two é")]
    assert read_prompts(path).rows == ["one", " two é"]


def test_chat_messages(rows_file):
    write(
        rows_file,
        [
            {"messages": [user("hi"), assistant("hello")]},
            {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        ],
    )
    read = read_examples(rows_file, render_chat=render_chat)
    assert read.rows == [
        Example("<user>hi</>\n<assistant>", "hello</>"),
        Example("<user>a</>\n<assistant>b</>\n<user>c</>\n<assistant>", "d</>"),
    ]
    prompts = read_prompts(rows_file, render_chat=render_chat).rows
    assert prompts == [example.prompt for example in read.rows]


def test_chat_without_an_answer_yet_is_a_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [user("hi")]}])
    prompts = read_prompts(path, render_chat=render_chat).rows
    assert prompts == ["<user>hi</>\n<assistant>"]
    assert '["user"]' in message_of(read_examples, path, render_chat=render_chat)


def test_prompt_as_messages_with_answers_as_messages_or_text(tmp_path):
    prompt = [user("1+1?")]
    path = write(
        tmp_path / "a.jsonl",
        [
            {"prompt": prompt, "completion": [assistant("2")]},
            {"prompt": prompt, "completion": "2"},
        ],
    )
    text = "<user>1+1?</>\n<assistant>"
    read = read_examples(path, render_chat=render_chat)
    assert read.rows == [Example(text, "2</>"), Example(text, "2")]
    assert read_prompts(path, render_chat=render_chat).rows == [text, text]


def test_pairs_with_a_prompt(rows_file):
    write(rows_file, [{"prompt": "p", "chosen": " a", "rejected": ""}])
    assert read_pairs(rows_file).rows == [PreferencePair("p", " a", "")]
    assert read_examples(rows_file).rows == [Example("p", " a")]
    assert read_prompts(rows_file).rows == ["p"]


def test_pairs_of_messages(tmp_path):
    row = {"prompt": [user("q")], "chosen": [assistant("a")]}
    path = write(tmp_path / "a.jsonl", [row | {"rejected": [assistant("b")]}])
    expected = PreferencePair("<user>q</>\n<assistant>", "a</>", "b</>")
    assert read_pairs(path, render_chat=render_chat).rows == [expected]


@pytest.mark.parametrize("prompt", [{}, {"prompt": "q"}])
def test_pairs_of_whole_conversations(rows_file, prompt):
    question = user("q")
    row = {"chosen": [question, assistant("a")], "rejected": [question, assistant("b")]}
    write(rows_file, [prompt | row])
    expected = PreferencePair("<user>q</>\n<assistant>", "a</>", "b</>")
    assert read_pairs(rows_file, render_chat=render_chat).rows == [expected]
    assert read_prompts(rows_file, render_chat=render_chat).rows == [expected.prompt]


def test_pairs_of_whole_dialogues(rows_file):
    begin = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    write(rows_file, [{"chosen": begin + " I see", "rejected": begin + " I do not"}])
    assert read_pairs(rows_file).rows == [PreferencePair(begin, " I see", " I do not")]
    assert read_examples(rows_file).rows == [Example(begin, " I see")]
    assert read_prompts(rows_file).rows == [begin]


# Errors.


@pytest.mark.parametrize("read", [read_examples, read_prompts])
def test_missing_text_file(tmp_path, read):
    assert "no such file" in message_of(read, tmp_path / "a.txt")


def test_empty_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" \n\n")
    assert "a.txt: empty text" in message_of(read_examples, path)
    assert "a.txt: the file has no line with text" in message_of(read_prompts, path)
    path.write_text("x")
    assert "no preferences" in message_of(read_pairs, path)


@pytest.mark.parametrize("read", READERS)
def test_row_of_no_known_form(tmp_path, read):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    message = message_of(read, path)
    assert f'{path}:1: the row has the columns "question", "answer"' in message


def test_column_that_the_user_names_must_exist(tmp_path):
    # Without the check the rows would be read as plain text.
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "text": "t"}])
    columns = Columns(prompt="question", completion="anwser")
    message = message_of(read_examples, path, columns=columns)
    assert f'{path}:1: no column "anwser"; this row has "question", "answer"' in message


@pytest.mark.parametrize(
    ("first", "second", "missing", "read"),
    [
        ("prompt completion", "prompt", "completion", read_examples),
        ("prompt completion", "completion", "prompt", read_examples),
        ("text", "prompt", "text", read_prompts),
        ("prompt chosen rejected", "prompt chosen", "rejected", read_pairs),
        ("messages", "text", "messages", read_examples),
    ],
)
def test_later_row_without_the_column(tmp_path, first, second, missing, read):
    rows = [{column: GOOD[column] for column in row.split()} for row in (first, second)]
    path = write(tmp_path / "a.jsonl", rows)
    message = message_of(read, path, render_chat=render_chat)
    has = ", ".join(f'"{column}"' for column in second.split())
    assert message == f'{path}:2: no column "{missing}"; this row has {has}'


def test_later_pair_without_its_prompt_is_not_split(tmp_path):
    pair = {"chosen": "say a", "rejected": "say b"}
    path = write(tmp_path / "a.jsonl", [pair | {"prompt": "p"}, pair])
    assert ':2: no column "prompt"' in message_of(read_pairs, path)


@pytest.mark.parametrize("value", [3, None, True, {"a": 1}])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_value_that_is_not_text(tmp_path, column, value):
    row = {"prompt": "p", "completion": "c"}
    path = write(tmp_path / "a.jsonl", [row, row | {column: value}])
    message = message_of(read_examples, path)
    expected = f'{path}:2: column "{column}" is {json.dumps(value)}, not text'
    assert message == expected


def test_long_values_are_shortened(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": ["x\n" * 5000]}])
    message = message_of(read_examples, path)
    assert message.endswith("..., not text") and len(message) < 300


@pytest.mark.parametrize(
    "messages",
    [[], "hi", ["hi"], [{"role": "user"}], [{"role": "user", "content": None}]],
)
def test_malformed_messages(tmp_path, messages):
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    message = message_of(read_examples, path, render_chat=render_chat)
    assert f'{path}:1: column "messages" ' in message and "message" in message[60:]


@pytest.mark.parametrize("messages", [[assistant("a")], [user("q"), user("q")]])
def test_messages_without_prompt_or_answer(tmp_path, messages):
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    message = message_of(read_examples, path, render_chat=render_chat)
    assert 'must be "assistant"' in message
    path = write(tmp_path / "b.jsonl", [{"messages": [assistant("a")]}])
    assert "nothing before it" in message_of(
        read_prompts, path, render_chat=render_chat
    )


def test_messages_need_a_template(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [user("q"), assistant("a")]}])
    for read in (read_examples, read_prompts):
        assert f"{path}:1: chat messages need render_chat" in message_of(read, path)


def test_template_that_rewrites_the_prompt(tmp_path):
    def render(messages, add_generation_prompt):
        return f"{len(messages)}:" + render_chat(messages, add_generation_prompt)

    path = write(tmp_path / "a.jsonl", [{"messages": [user("q"), assistant("a")]}])
    message = message_of(read_examples, path, render_chat=render)
    assert f"{path}:1: the chat template changes earlier text when message 2" in message


def test_text_prompt_with_a_message_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": [user("c")]}])
    message = message_of(read_examples, path, render_chat=render_chat)
    assert "give both as text or both as messages" in message


# Rows that teach nothing.


BLANK = [
    ({"prompt": " \n", "completion": "c"}, "empty prompt", read_examples),
    ({"prompt": "p", "completion": " "}, "empty completion", read_examples),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt", read_pairs),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt", read_prompts),
    (
        {"prompt": "p", "chosen": " ", "rejected": "b"},
        "empty completion",
        read_examples,
    ),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "equals rejected", read_pairs),
    ({"text": "\t"}, "empty text", read_examples),
    ({"text": "\t"}, "empty text", read_prompts),
    ({"chosen": "so a", "rejected": "so a"}, "equals rejected", read_pairs),
    ({"chosen": "a", "rejected": "b"}, "no common prefix", read_pairs),
    ({"chosen": "a", "rejected": "b"}, "no common prefix", read_prompts),
    ({"chosen": " a", "rejected": " b"}, "no common prefix", read_pairs),
    (
        {"messages": [user("q"), assistant(" ")]},
        "empty completion",
        read_examples,
    ),
    ({"messages": [user(" ")]}, "empty prompt", read_prompts),
    (
        {
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("r"), assistant("a")],
        },
        "no common prefix",
        read_pairs,
    ),
    (
        {
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("a")],
        },
        "equals rejected",
        read_pairs,
    ),
]


@pytest.mark.parametrize(("row", "reason", "read"), BLANK)
def test_unusable_rows_fail_or_are_dropped_and_counted(tmp_path, row, reason, read):
    good = {column: GOOD[column] for column in row}
    if isinstance(row.get("chosen"), list):
        chosen, rejected = [user("q"), assistant("a")], [user("q"), assistant("b")]
        good = {"chosen": chosen, "rejected": rejected}
    path = write(tmp_path / "a.jsonl", [good, row, good, row])
    message = message_of(read, path, render_chat=render_chat)
    assert message.startswith(f"{path}:2: ") and reason in message
    assert "2 of 4 rows are unusable" in message and 'on_unusable="drop"' in message

    left = read(path, render_chat=render_chat, on_unusable="drop")
    assert len(left.rows) == 2 and list(left.dropped.values()) == [2]
    assert reason in next(iter(left.dropped))

    write(path, [row])
    message = message_of(read, path, render_chat=render_chat, on_unusable="drop")
    assert "1 of 1 rows are unusable" in message


def test_equal_answers_are_still_a_demonstration_and_a_prompt(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "a"}
    path = write(tmp_path / "a.jsonl", [row])
    assert read_examples(path).rows == [Example("p", "a")]
    assert read_prompts(path).rows == ["p"]


def test_each_reason_is_counted(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [row, row | {"prompt": " "}, row | {"rejected": "a"}, row | {"chosen": "b"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert read_pairs(path, on_unusable="drop").dropped == {
        "empty prompt": 1,
        "chosen equals rejected": 2,
    }
    message = message_of(read_pairs, path)
    assert "(1 × empty prompt, 2 × chosen equals rejected)" in message


def test_unknown_choice(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "t"}])
    message = message_of(read_examples, path, on_unusable="skip")
    assert message == 'on_unusable="skip": give "fail" or "drop"'
