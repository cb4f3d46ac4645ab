"""Files and options that attack whoever reads them are refused in one line each."""

import functools
import json
import time
import unicodedata

import pytest
from files.hostile_fields import (
    ADAPTER,
    ADAPTERS,
    CONFIGS,
    GENERATION,
    INDEXES,
    NO_JSON,
)
from files.hostile_rows import GZIPPED, OPTIONS, ROWS, TEMPLATES, YAML

from rlhf_jax import cli
from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.data.text_data import read_examples
from rlhf_jax.models import load_tokenizer
from rlhf_jax.models.chat import render_chat, set_chat_template
from rlhf_jax.models.families import read_config
from rlhf_jax.models.hf.generation_config import read_eos_ids
from rlhf_jax.models.hf.peft_config import read_peft_config
from rlhf_jax.models.hf.safetensors_files import open_tensors
from rlhf_jax.models.tiny import byte_tokenizer

BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068"


def refused(call):
    """The message, which must be one short printable line, soon."""
    begin = time.process_time()
    with pytest.raises(ValueError) as caught:
        call()
    assert time.process_time() - begin < 10
    message = str(caught.value)
    controls = [x for x in message if unicodedata.category(x) in ("Cc", "Cs", "Zl")]
    assert message and not controls and not set(message) & set(BIDIRECTIONAL)
    assert len(message) <= 400, message
    return message


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode("utf-8")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_config(tmp_path, name):
    file = written(tmp_path / "config.json", CONFIGS[name])
    assert str(tmp_path) in refused(lambda: read_config(file.parent))


@pytest.mark.parametrize("name", GENERATION)
def test_generation_config(tmp_path, name):
    file = written(tmp_path / "generation_config.json", GENERATION[name])
    assert str(file) in refused(lambda: read_eos_ids(tmp_path))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_config(tmp_path, name):
    file = written(tmp_path / "adapter_config.json", ADAPTERS[name])
    assert str(file) in refused(lambda: read_peft_config(tmp_path))


def test_the_adapter_that_the_others_change_is_read(tmp_path):
    written(tmp_path / "adapter_config.json", json.dumps(ADAPTER))
    assert read_peft_config(tmp_path).scale("q_proj", 2) == 2.0


@pytest.mark.parametrize("name", INDEXES)
def test_index(tmp_path, name):
    written(tmp_path / "model.safetensors.index.json", INDEXES[name])

    def read():
        with open_tensors(tmp_path):
            pass

    assert str(tmp_path) in refused(read)


@pytest.mark.parametrize("name", ROWS)
def test_rows(tmp_path, name):
    file = written(tmp_path / "a.jsonl", ROWS[name])
    render = functools.partial(render_chat, None, add_generation_prompt=False)
    message = refused(lambda: read_examples(file, render_chat=lambda m, _: render(m)))
    assert message.startswith(str(file))


@pytest.mark.parametrize("name", GZIPPED)
def test_compressed_rows(tmp_path, name):
    file = written(tmp_path / "a.jsonl.gz", GZIPPED[name])
    if name in ("blank lines", "alike rows"):  # bombs; at 1,000 characters a byte
        assert file.stat().st_size < 100_000
    assert refused(lambda: read_examples(file)).startswith(str(file))


@pytest.mark.parametrize("name", YAML)
def test_options_in_a_file(tmp_path, name, capsys):
    file = written(tmp_path / "a.yaml", YAML[name])

    def parse():
        cli.parse(SFTConfig, ["--config", str(file)], prog="rlhf-jax sft")

    try:
        assert str(file) in refused(parse)
    except SystemExit as stopped:  # the parser of flags has said it
        assert stopped.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, tmp_path):
    known = ["--data", "a.txt", "--run-dir", str(tmp_path)]
    config = cli.parse(SFTConfig, [*known, *OPTIONS[name]], prog="rlhf-jax sft")
    option = OPTIONS[name][-2].removeprefix("--")
    assert option in refused(config.validate) or name in ("heads 1e9", "all large")


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(tmp_path, name):
    file = written(tmp_path / "a.jinja", TEMPLATES[name])
    tokenizer = byte_tokenizer()
    message = refused(lambda: set_chat_template(tokenizer, file, name="chat-template"))
    assert message.startswith("chat-template")


TOKENIZER_FILES = {
    "tokenizer.json": NO_JSON.keys() - {"5 MB", "a long text", "41 digits", "1e999"},
    "tokenizer_config.json": NO_JSON.keys() - {"1e999"},
    "special_tokens_map.json": {"deep lists", "key twice", "a list", "latin-1"},
}


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    assert load_tokenizer(directory).eos_token_id is not None
    return directory


@pytest.mark.parametrize(
    ("file", "name"), [(f, n) for f, ns in TOKENIZER_FILES.items() for n in sorted(ns)]
)
def test_tokenizer(tokenizer_directory, file, name):
    path = tokenizer_directory / file
    before = path.read_bytes() if path.exists() else None
    written(path, NO_JSON[name])
    try:
        assert str(tokenizer_directory) in refused(
            lambda: load_tokenizer(tokenizer_directory)
        )
    finally:
        path.unlink() if before is None else path.write_bytes(before)


FIELDS = {
    "vocab_file": "/etc/passwd",
    "merges_file": "../merges.txt",
    "gguf_file": "x.gguf",
    "init_inputs": ["/etc/passwd"],
    "eos_token": 5,
    "eos_token ": None,
    "added_tokens_decoder": {"x": 1},
    "model_max_length": "long",
    "tokenizer_class": 5,
    "tokenizer_object": 5,
    "extra_special_tokens": 5,
    "chat_template": 5,
    "padding_side": "up",
}
HARMLESS = {
    "eos_token ",
    "padding_side",
    "model_max_length",
    "chat_template",
    "tokenizer_class",
}


@pytest.mark.parametrize("name", FIELDS)
def test_field_of_a_tokenizer(tokenizer_directory, name):
    """Refused, or without effect; but no other error."""
    path = tokenizer_directory / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {name: FIELDS[name]}))
    try:
        message = refused(lambda: load_tokenizer(tokenizer_directory))
        assert str(tokenizer_directory) in message
    except pytest.fail.Exception:
        assert name in HARMLESS
    finally:
        path.write_text(before)
