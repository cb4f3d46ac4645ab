"""Renders chat templates in a process of its own, under limits.

A script that `models.chat_renderer` starts. A chat template is a program that someone
else wrote: jinja2's sandbox keeps it from files and code, but not from running forever
or filling the memory. Here the operating system ends it.

Jobs and answers are lines of JSON. A job has `template` (a number), `source` (its text,
if it is new) and `values`; its answer is `{"text": …}`, `{"broken": …}` for a template
that does not parse, or `{"error": …}`.
"""

import codecs
import contextlib
import datetime
import json
import signal
import sys
import textwrap  # noqa: F401 (jinja2 imports it late, when no file may be opened)
import time
from typing import Any

import jinja2
import jinja2.debug  # likewise
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SECONDS = 5.0
MOST_BYTES = 2**30
MOST_CHARACTERS = 2**25


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_same")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict(…)` without the class, whose attributes lead elsewhere."""

    def __call__(self, *pairs: Any, **values: Any) -> dict:
        return dict(*pairs, **values)

    def fromkeys(self, *values: Any) -> dict:
        return dict.fromkeys(*values)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(…)` without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # `self` may be a variable
        self, *pairs = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*pairs, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"the variable {name} begins with an underscore")
        super().__setitem__(name, value)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment() -> jinja2.Environment:
    """What templates are written for: that of `transformers`, without `lipsum`."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
        optimized=False,  # or 10 ** 10 ** 8 is computed while parsing
    )
    del made.globals["lipsum"]
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    return made


def answer(made: jinja2.Environment, known: dict, job: dict) -> dict[str, str]:
    """The answer to a job."""
    number = job["template"]
    try:
        if number not in known:
            known[number] = made.from_string(job["source"])
        text, size = [], 0
        for part in known[number].generate(**job["values"]):
            size += len(part)
            if size > MOST_CHARACTERS:
                return {"error": f"gives more than {MOST_CHARACTERS:,} characters"}
            text.append(part)
        found = "".join(text)
        found.encode("utf-8")
        return {"text": found}
    except jinja2.TemplateSyntaxError as error:
        return {"broken": f"in line {error.lineno}: {str(error.message)[:1000]}"}
    except jinja2.TemplateError as error:
        return {"error": str(error)[:1000] or type(error).__name__}
    except MemoryError:
        return {"error": f"needs more than {MOST_BYTES:,} bytes of memory"}
    except RecursionError:
        return {"error": "calls itself too often"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}


def _limit() -> None:
    """Memory, and no file that is not open yet: no template needs one."""
    try:
        import resource
    except ImportError:  # Windows has neither these limits nor the timer below
        return
    time.localtime()  # reads the time zone
    codecs.lookup("unicode-escape")  # of texts in a template
    limits = {"RLIMIT_AS": MOST_BYTES, "RLIMIT_NOFILE": 3, "RLIMIT_FSIZE": 0}
    for name, most in (limits | {"RLIMIT_CORE": 0}).items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))


def _end_after(seconds: float) -> None:
    """Ends the process, even inside the computation of one long number; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    """Answers jobs until there are no more."""
    made, known = environment(), {}
    _limit()
    for line in sys.stdin.buffer:
        _end_after(MOST_SECONDS)
        found = answer(made, known, json.loads(line))
        _end_after(0.0)
        sys.stdout.buffer.write(json.dumps(found).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
