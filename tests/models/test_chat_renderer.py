"""Templates give the same text in their own process, which they cannot hold up."""

import os
import signal
from pathlib import Path

import pytest
from chat_tokenizers import chatml, gemma, phi

from rlhf_jax.models import chat_renderer, render_chat
from rlhf_jax.models.chat_renderer import render_template

CHAT = [
    {"role": "user", "content": "Hi \U0001f600 {{ x }}\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "and\u2028bye"},
]


@pytest.mark.parametrize("make", [chatml, gemma, phi])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(make, prompt):
    tokenizer = make()
    theirs = tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=prompt
    )
    assert render_chat(tokenizer, CHAT, add_generation_prompt=prompt) == theirs


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos }}{% generation %}a{% endgeneration %}", "<s>a"),
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{{ dict(a=1) }}{{ dict.fromkeys(['b']) }}", "{'a': 1}{'b': None}"),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "2"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "01"),
        ("{{ strftime_now('%%') }}{{ 'a b' | wordwrap(1) }}", "%a\nb"),
        ("  {% if bos %}\n  x\n  {% endif %}", "  x\n"),
    ],
)  # fmt: skip
def test_what_templates_are_written_for(source, text):
    assert render_template(source, {"bos": "<s>"}) == {"text": text}


def test_a_process_that_is_gone_is_replaced():
    assert render_template("{{ a }}", {"a": 1}) == {"text": "1"}
    process = chat_renderer._RENDERER._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert "ended its process" in render_template("{{ a }}", {"a": 2})["error"]
    assert render_template("{{ a }}", {"a": 3}) == {"text": "3"}


def test_an_interrupted_job_does_not_answer_the_next(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    assert render_template("{{ a }}", {"a": 1}) == {"text": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(chat_renderer.json, "loads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_template("{{ a }}", {"a": 2})
    assert render_template("{{ a }}", {"a": 3}) == {"text": "3"}


def test_no_file_is_open_to_a_template():
    """Whatever escapes the sandbox has no file, and can open none."""
    render_template("", {})
    process = chat_renderer._RENDERER._process
    assert process is not None
    if os.path.isdir("/proc/self/fd"):
        assert sorted(os.listdir(f"/proc/{process.pid}/fd")) == ["0", "1", "2"]
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert "Max open files            3" in limits
        assert "Max address space         1073741824" in limits
