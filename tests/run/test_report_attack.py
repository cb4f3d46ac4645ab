"""Text in a page cannot become part of it: no tag, no script, no request."""

import contextlib
import html.parser
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models.tiny import byte_tokenizer
from rlhf_jax.run.log_files import MetricsWriter, SamplesWriter
from rlhf_jax.run.report import CONTENT_POLICY, write_report
from rlhf_jax.run.run_directory import open_run
from rlhf_jax.tools.show_data import TokenRow, page

PAYLOADS = (
    "<script>document.title='PWNED';fetch('URL')</script>",
    "<img src=URL onerror=\"document.title='PWNED'\">",
    '" onmouseover="document.title=\'PWNED\'" style="background:url(URL)" x="',
    "' autofocus onfocus='fetch(`URL`)' tabindex=1 '",
    "<svg onload=\"document.title='PWNED'\"><image href='URL'/></svg>",
    "<svg><script href='URL'/><use href='URL#x'/></svg>",
    "</script><script src=URL></script>",
    "</style><style>@import 'URL';body{background:url(URL)}</style>",
    "</title></pre></details><iframe src=URL></iframe>",
    "<a href=\"javascript:document.title='PWNED'\">x</a><base href=URL>",
    "<meta http-equiv=refresh content='0;url=URL'><link rel=stylesheet href=URL>",
    "<object data=URL></object><embed src=URL><video src=URL><audio src=URL>",
    "{{ 7 * 7 }}{% for x in y %}{# #}{{ config.__class__ }}",
    "]]><![CDATA[<!--<img src=URL>--> --><!DOCTYPE x [<!ENTITY e SYSTEM 'URL'>]>&e;",
    "<form action=URL><button formaction=URL autofocus></form>",
    "<math><mtext><table><mglyph><style><img src=URL onerror=fetch('URL')>",
    "\x00<\x00script\x00>fetch('URL')</script>\x0b\x0c",
    "\u202e>tpircs<\u2066\u2028 \ud800 \ufeff &lt;img src=URL&gt; &#60;img src=URL>",
    "+ADw-script+AD4-fetch('URL')+ADw-/script+AD4-",
)
ON_DISK = str.maketrans({"/": "\u2215", "\x00": "0", "\ud800": "d"})


class Structure(html.parser.HTMLParser):
    """Tags in order, with the names of their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.values = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, [name for name, _ in attrs]))
        self.values += attrs

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_comment(self, data):
        self.tags.append("comment")

    def handle_pi(self, data):
        self.tags.append("instruction")

    def unknown_decl(self, data):
        self.tags.append("declaration")


def write_pages(folder, texts, monkeypatch):
    """A report and a page of tokens with the texts wherever text can be."""
    tame = [text.translate(ON_DISK) for text in texts]
    monkeypatch.setattr(sys, "argv", ["rlhf-jax", *tame])
    folder.mkdir()
    config = {
        "seed": 1,
        "note": tame,
        **{f"{n} {text}": n for n, text in enumerate(tame)},
    }
    run = open_run(folder / ("run" + tame[0][:60] + tame[4][:99]), config, stage="ppo")
    with MetricsWriter(run.metrics) as writer:
        for step in (0, 1):
            named = {f"mine/{n:02d}{text}": 1.0 for n, text in enumerate(texts)}
            writer.write(step, named | {f"eval/reward/{texts[1]}": 2.0})
    with SamplesWriter(run.samples) as samples:
        for step in (0, 1):
            rows = [
                {"prompt": f"{n}{text}", "response": text, "score": 1.0, text: text}
                for n, text in enumerate(texts)
            ]
            samples.write(step, rows)
    table = [{f"{n}{text}": text for n, text in enumerate(texts)}]
    report = write_report(run.path, table=table, notes=texts)
    assert len(list(run.path.glob("*.html"))) == 1
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": texts[1]})
    rows = [
        TokenRow(
            title=text, tokens=tokens, learnt=np.arange(len(tokens)) > 2, note=text
        )
        for text in texts
        for tokens in [np.array([258, *tokenizer.encode(text.replace("\ud800", ""))])]
    ]
    shown = folder / "tokens.html"
    text = page(rows, Tokenization(tokenizer), texts, learnt=texts[0])
    shown.write_text(text, "utf-8")
    return report, shown


def structure(text, *, ends=True):
    """Tags, with the names of their attributes, in order."""
    tags = Structure(text).tags
    return tags if ends else [tag for tag in tags if isinstance(tag, tuple)]


def harmless(text):
    return "".join(x if x.isalnum() or x in " \n/" else "x" for x in text)


def test_tags_and_attributes_do_not_depend_on_text(tmp_path, monkeypatch):
    texts = payloads(9)
    tame = [harmless(text) for text in texts]
    hostile = write_pages(tmp_path / "a", texts, monkeypatch)
    expected = write_pages(tmp_path / "b", tame, monkeypatch)
    for found, wanted in zip(hostile, expected, strict=True):
        text = found.read_text("utf-8")
        assert structure(text) == structure(wanted.read_text("utf-8"))
        assert not {"\x00", "\u202e", "\u2028"} & set(text)
        for name, value in Structure(text).values:
            assert name in ("title", "content") or "127.0.0.1" not in value


@contextlib.contextmanager
def listening():
    """A port of this machine, and what was asked of it until the block ends."""
    asked, ended = [], threading.Event()

    def listen():
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(1)
                    with contextlib.suppress(OSError):
                        asked.append(connection.recv(4096))

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield server.getsockname()[1], asked
        finally:
            ended.set()
            thread.join()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def loaded(path, home):
    """The page after a browser has run it."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options += [f"--user-data-dir={home}", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [CHROMIUM, *options, path.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode("utf-8")


def payloads(port):
    return [text.replace("URL", f"http://127.0.0.1:{port}/") for text in PAYLOADS]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_runs_and_requests_nothing(tmp_path, monkeypatch):
    with listening() as (port, asked):
        for path in write_pages(tmp_path / "pages", payloads(port), monkeypatch):
            text = loaded(path, tmp_path / "home")
            assert "<title>PWNED" not in text
            assert "</html>" in text
            tags = {tag for tag, _ in structure(text, ends=False)}
            assert not {"script", "img", "iframe", "a"} & tags
    assert asked == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("policy", [None, CONTENT_POLICY])
def test_the_policy_would_stop_what_was_not_escaped(tmp_path, policy):
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    page = tmp_path / "page.html"
    with listening() as (port, asked):
        body = "".join(payloads(port)[:9])
        text = f"<title>mine</title>{meta if policy else ''}{body}"
        page.write_text(text, "utf-8")
        found = loaded(page, tmp_path / "home")
    assert ("<title>PWNED</title>" in found) == (policy is None)
    # The policy does not stop a connection that is opened in advance and stays unused.
    assert any(asked) == (policy is None)
