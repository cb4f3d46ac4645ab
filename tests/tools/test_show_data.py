"""What `show-data` prints, with colours and without, is what a stage would train."""

import json

import numpy as np
import pytest
from chat_tokenizers import CHATML, GEMMA, chatml, gemma
from rich.console import Console

from rlhf_jax import cli
from rlhf_jax.config.inspection import ShowDataConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.recipes import sft as sft_data
from rlhf_jax.tools import show_data
from rlhf_jax.tools.show_data import TokenRow, show, token_text

TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "It is\nso."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "so"},
]


@pytest.fixture
def model(tmp_path):
    chatml().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def printed(capsys, **options):
    lines = show_data.run(ShowDataConfig(**options))
    return capsys.readouterr().out, lines


def test_conversations_between_marks(model, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": TALK[2:]})
    text, _ = printed(capsys, data=data, model=model, train_on="all-answers", limit=1)
    assert text == (
        "⟦trained on⟧   context   ↵ line break\n"
        "\n"
        "── 1 of 2 · 37 tokens, 10 trained on\n"
        "<|im_start|>user↵\n"
        "Hello there<|im_end|>↵\n"
        "<|im_start|>assistant↵\n"
        "⟦It is↵\n"
        "so.<|im_end|>⟧↵\n"
        "<|im_start|>user↵\n"
        "What is it?<|im_end|>↵\n"
        "<|im_start|>assistant↵\n"
        "⟦so<|im_end|>⟧\n"
        "\n"
        "2 sequences of at most 37 tokens; too long: 0 dropped, 0 truncated\n"
        "54 tokens, 13 trained on (24.1%)\n"
    )


def test_what_is_shown_is_what_sft_trains(model, tmp_path, capsys):
    rows = [{"messages": TALK}, {"messages": TALK[2:]}, {"messages": TALK[:2]}]
    data = write(tmp_path / "a.jsonl", *rows)
    config = ShowDataConfig(
        data=data, model=model, train_on="all-answers", max_tokens=30, limit=9,
        overlong="truncate",
    )  # fmt: skip
    lines = show_data.run(config)
    stage = config.sft_config()
    tokenization = sft_data.load_tokenization(stage)
    examples = sft_data.read_data(stage, data, tokenization)
    encoded = sft_data.encode_data(stage, tokenization, examples)
    learnt = sum(int(row.learnt.sum()) for row in encoded.rows)
    assert f" {learnt} trained on " in lines[1]
    assert "0 dropped, 1 truncated" in lines[0]
    text = capsys.readouterr().out
    assert text.count("── ") == 3 and f"{learnt} trained on" in text


def test_the_first_token_of_a_text_is_not_learnt(model, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", {"text": "Hello there"})
    text, lines = printed(capsys, data=data, model=model)
    assert "\nHello⟦ there<|im_end|>⟧\n" in text and "2 trained on" in lines[1]


def test_pairs(model, tmp_path, capsys):
    pair = {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[3:]}
    data = write(tmp_path / "a.jsonl", pair)
    text, lines = printed(capsys, data=data, model=model, task="reward")
    begin = "<|im_start|>user↵\nHello there<|im_end|>↵\n<|im_start|>assistant↵\n"
    score = "▸ the score is read at the last token\n"
    assert f"{begin}⟦It is↵\nso.<|im_end|>⟧\n{score}" in text
    assert f"{begin}⟦so<|im_end|>⟧\n{score}" in text
    assert "1 of 1, chosen" in text and "1 of 1, rejected" in text
    assert lines[0].startswith("1 pairs of at most 19 tokens; ")


def test_prompts(model, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", {"question": TALK[:1], "text": "x"})
    text, lines = printed(
        capsys, data=data, model=model, task="prompts", prompt_column="question"
    )
    assert "⟦" not in text.split("\n", 1)[1]
    assert "<|im_start|>assistant↵\n▸ the policy continues from here\n" in text
    assert lines == [
        "1 prompts of at most 12 tokens; too long: 0 dropped, 0 truncated",
        "12 tokens",
    ]


def test_rows_left_out_are_counted(model, tmp_path, capsys):
    forged = {"messages": [{"role": "user", "content": "<|im_end|>"}, TALK[1]]}
    data = write(tmp_path / "a.jsonl", forged, {"messages": TALK})
    text, _ = printed(capsys, data=data, model=model, unusable="drop")
    assert "1 rows dropped: a chat message contains the special token" in text
    assert "── 1 of 1 " in text


def test_a_template_from_a_file(tmp_path, capsys):
    gemma().save_pretrained(tmp_path / "model")
    (tmp_path / "x.jinja").write_text(CHATML)
    data = write(tmp_path / "a.jsonl", {"messages": TALK[:2]})
    options = {"data": data, "model": str(tmp_path / "model")}
    text, _ = printed(capsys, **options, chat_template=str(tmp_path / "x.jinja"))
    assert "<|im_start|>user" in text and "<bos><|im_start|>" in text
    assert "<start_of_turn>model↵" in printed(capsys, **options)[0]
    assert GEMMA != CHATML


def test_colours_say_the_same(model):
    tokenization = Tokenization.load(model)
    (ids,) = tokenization.encoder.prompts(["Hello there<|im_end|>\nso.<|im_end|>"])
    learnt = [False] * (len(ids) - 2) + [True] * 2
    row = TokenRow(
        title="a", tokens=ids_array(ids), learnt=ids_array(learnt).astype(bool)
    )
    text = token_text(row, tokenization, colour=True)
    assert text.plain == "Hello there<|im_end|>↵\nso.<|im_end|>"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["Hello"] == "dim" and " on #" in styles["."]
    assert "bold" in styles["<|im_end|>"] and " on #" in styles["<|im_end|>"]


def ids_array(values):
    return np.asarray(values, np.int32)


@pytest.mark.parametrize(("no_color", "marks"), [(False, 0), (True, 2)])
def test_marks_stand_in_for_colours(model, no_color, marks):
    tokenization = Tokenization.load(model)
    tokens = ids_array(tokenization.encoder.prompts(["Hello there"])[0])
    row = TokenRow(title="a", tokens=tokens, learnt=tokens >= 0)
    console = Console(
        record=True, force_terminal=True, no_color=no_color, color_system="truecolor"
    )
    with console.capture() as captured:
        show(console, [row], tokenization, learnt="trained on")
    assert captured.get().count("⟦") == marks
    assert ("\x1b[38" in captured.get() or "48;2;" in captured.get()) != no_color


def test_page(model, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", {"messages": TALK})
    html = tmp_path / "new" / "page.html"
    printed(capsys, data=data, model=model, html=str(html))
    text = html.read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>") and "too long: 0 dropped" in text
    assert "&lt;|im_end|&gt;" in text and "background-color" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "reward", "--train-on", "all-answers"], "train-on"),
        (["--task", "prompts", "--chat-template", "x"], "chat-template"),
        (["--task", "reward", "--prompt-column", "q"], "prompt-column"),
        (["--limit", "0"], "limit"),
        (["--chat-template", "no.jinja"], "no.jinja"),
    ],
)
def test_options_that_cannot_work(model, tmp_path, complaint, flags, message):
    data = write(tmp_path / "a.jsonl", {"messages": TALK})
    assert message in complaint("show-data", "--data", data, "--model", model, *flags)


def test_command(model, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", {"messages": TALK})
    cli.main(["show-data", "--data", data, "--model", model])
    assert "⟦so<|im_end|>⟧" in capsys.readouterr().out
