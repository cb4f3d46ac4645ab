"""Nothing that data, models, files or errors hold can control the terminal."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rlhf_jax import cli
from rlhf_jax.demos.showcase import print_table
from rlhf_jax.models.hf.hf_weights import save_pretrained
from rlhf_jax.models.tiny import byte_tokenizer, tiny_gpt2
from rlhf_jax.run import progress

PACKAGE = Path(cli.__file__).parent

# A color that nothing of ours uses, the clipboard, a bell, C1, a reversed text, and
# markup of rich.
HOSTILE = (
    "\x1b[51;73mA \x1b]52;c;cHdu\x07 \x07 \x9b2J \x9d8;; \x7f \u202eB\u202c \u2066C "
    "\u2028 [red]D[/red] [link=file:///e]E[/link] \r"
)
RAISES = """
def angry(prompts, responses, columns):
    raise ValueError("no score: " + {text!r})

"""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A directory whose name is hostile as well."""
    root = tmp_path_factory.mktemp("hostile") / "\x1b[51;73mdir \u202e [red]"
    root.mkdir()
    return root


@pytest.fixture(scope="module")
def commands(hostile):
    """Command lines that print what hostile files hold."""
    root = hostile
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<\x1b[51;73m\x9b\u202e>"})
    module, params = tiny_gpt2(vocab_size=len(tokenizer), max_positions=256)
    save_pretrained(root / "model", module, params, tokenizer=tokenizer)
    model = str(root / "model")

    def rows(name, *found):
        path = root / f"{name}\x07.jsonl"
        path.write_text("".join(json.dumps(x) + "\n" for x in found), "utf-8")
        return str(path)

    prompts = rows(
        "prompts", {"prompt": "a " + HOSTILE[:30]}, {"prompt": HOSTILE[30:60]}
    )
    sft = rows("sft", *[{"prompt": f"{n}", "completion": HOSTILE} for n in range(40)])
    pairs = rows("pairs", {"prompt": HOSTILE, "chosen": "a", "rejected": HOSTILE})
    broken = root / "broken\x1b[51;73m.jsonl"
    broken.write_text('{"' + HOSTILE.replace("\r", "") + '": ', "utf-8")
    (root / "angry.py").write_text(RAISES.format(text=HOSTILE), "utf-8")
    for name, values in {
        "type": {"steps": HOSTILE},
        "key": {HOSTILE: 1},
        "choice": {"overlong": HOSTILE},
    }.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(values), "utf-8")
    show = ["show-data", "--model", model, "--max-tokens", "256"]
    run = ["sft", "--run-dir", str(root / "run"), "--data", sft]
    asked = [
        "--model",
        model,
        "--max-new-tokens",
        "8",
        "--prompts",
        prompts,
        "--reward",
    ]
    return [
        [*show, "--data", sft],
        [*show, "--data", prompts, "--task", "prompts"],
        ["show-data", "--model", model, "--data", pairs, "--task", "reward"],
        ["generate", "--model", model, "--data", prompts, "--max-new-tokens", "20"],
        ["evaluate", *asked, f"{root}/angry.py:angry"],
        ["evaluate", *asked, f"{root}/angry.py:{HOSTILE}"],
        ["inspect", model, "--no-compile", "--stages", "sft", "--max-tokens", "9"],
        ["inspect", HOSTILE],
        ["presets", "--preset", HOSTILE],
        *([*run, "--config", f"{root}/{x}.yaml"] for x in ("type", "key", "choice")),
        [*run, "--config", HOSTILE],
        ["sft", "--run-dir", "r", "--data", str(broken)],
        ["sft", "--run-dir", "r", "--data", HOSTILE],
        ["sft", "--run-dir", "r", "--data", sft, "--stepz", HOSTILE],
        [HOSTILE],
    ]


def test_output_of_commands_has_no_controls(commands, capfd):
    for command in commands:
        with contextlib.suppress(SystemExit):
            cli.main(command)
        text = "".join(capfd.readouterr())
        assert not CONTROLS.search(text), (command, CONTROLS.search(text))
        assert "Traceback" not in text
        assert r"\x1b[51;73m" in text  # escaped, not lost


def test_colors_and_bars_of_a_terminal_are_ours(commands, hostile):
    # One process for all: it loads JAX once.
    program = (
        "import contextlib, json, logging, sys, warnings\nfrom rlhf_jax import cli\n"
        "for command in json.loads(sys.argv[1]):\n"
        "  with contextlib.suppress(SystemExit): cli.main(command)\n"
        "logging.error('by logging: %s', command[-1])\nwarnings.warn(command[-1])\n"
        "raise KeyError(command[-1])"
    )
    train = "--steps 1 --batch-size 8 --fresh.width 8 --fresh.num-layers 1".split()
    ran = [
        *(x for x in commands if x[0] == "show-data"),
        [
            "sft",
            "--run-dir",
            f"{hostile}/run",
            "--data",
            f"{hostile}/sft\x07.jsonl",
            *train,
        ],
        ["sft", "--run-dir", f"{hostile}/run", "--data", HOSTILE],
    ]
    text = in_a_terminal([sys.executable, "-c", program, json.dumps(ran)])
    assert "\x1b[3" in text  # it has colors
    assert "1/1" in text  # and the bar of a run
    assert "by logging: " in text
    assert "UserWarning" in text
    assert "KeyError" in text  # tracebacks too
    assert r"\x1b[51;73m" in text
    assert "\x1b[51;73m" not in text
    plain = re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\r", "", text)
    assert [plain[m.start() - 99 : m.end()] for m in CONTROLS.finditer(plain)] == []


def in_a_terminal(arguments):
    """What a program prints to a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    with subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        found = b""
        with contextlib.suppress(OSError):  # EIO: the program has ended
            while part := os.read(ours, 65536):
                found += part
        os.close(ours)
    assert process.returncode == 1
    return found.decode("utf-8")


def test_markup_is_text(capfd):
    progress.warn(HOSTILE)
    progress.heading(HOSTILE)
    progress.say(HOSTILE)
    print_table([{"[b]x[/b]": "[red]1" + HOSTILE[:3], "y": "2"}], notes=[HOSTILE])
    text = "".join(capfd.readouterr())
    assert not CONTROLS.search(text)
    assert text.count("[red]D[/red]") == 4
    assert "[b]x[/b]" in text
    assert "[red]1" in text


def test_a_bar_shows_names_as_they_are():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=300)
    with progress.progress(1, "[link=x]sft[/link]", console=console) as shown:
        shown.update(1, {HOSTILE: 1.0})
    assert "[link=x]sft[/link]" in file.getvalue()
    assert "[red]D[/red]" in file.getvalue()
    assert "\x1b[51;73m" not in file.getvalue()
    assert "\x1b]" not in file.getvalue()


PRINTING = {
    "cli.py",
    "run/progress.py",
    "run/terminal.py",
    "tools/show_data.py",
    "demos/showcase.py",
    # Pipes to the run, not the terminal.
    "models/chat_worker.py",
    "rewards/worker.py",
}


def test_few_files_print():
    prints = re.compile(r"\bprint\(|sys\.std(out|err)|\.print\(")
    files = {p.relative_to(PACKAGE).as_posix(): p for p in PACKAGE.rglob("*.py")}
    found = {n for n, p in files.items() if prints.search(p.read_text("utf-8"))}
    assert found == PRINTING
