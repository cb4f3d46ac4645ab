"""Fuzzes every reader of files that others wrote, and prints what was found.

    make fuzz ARGS="--seconds 60"
    python tests/fuzz/run_fuzz.py --targets config yaml --engines mutations atheris

Engines: `mutations` changes seeds at random and is fast; `hypothesis` builds
structures and shrinks what fails; `atheris` is guided by coverage and needs the extra
"fuzz". Findings are written to `--found`, each as the file that caused it.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
if __name__ == "__main__":  # its own folder must not shadow the package of that name
    sys.path[:1] = [str(TESTS), str(TESTS.parent)]

INSTRUMENTED = [
    *("rlhf_jax.files", "rlhf_jax.data", "rlhf_jax.models.families"),
    *("rlhf_jax.models.hf", "rlhf_jax.models.chat", "rlhf_jax.cli"),
    *("yaml", "json"),
]
TOKENS = [
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\n", b"\0", b"\x1b", b"\xff"),
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 50, b"0.5", b"\\ud800"),
    *(b"[" * 120, b'{"a":' * 120, b"*a", b"&a ", b"!!int ", b"<<: ", b"- ", b"? "),
    *(b"{{ ", b" }}", b"{% for i in range(9) %}", b"{% endfor %}", b" ~ ", b"|join"),
    *(
        b"..",
        b"/",
        b".safetensors",
        b"F32",
        b"\xe2\x80\xae",
        b"x" * 300,
        b".*",
        b"(a+)+",
    ),
]


def mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with parts removed, repeated, replaced, or from another one."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 4)):
        begin = draw.randint(0, len(data))
        end = min(len(data), begin + draw.choice([0, 1, 1, 2, 4, 8, 32]))
        match draw.randint(0, 5):
            case 0:
                del data[begin:end]
            case 1:
                data[begin:end] = draw.choice(TOKENS)
            case 2:
                data[begin:begin] = draw.choice(TOKENS)
            case 3:
                data[begin:end] = data[begin:end] * draw.choice([2, 3, 50])
            case 4:
                data[begin:end] = draw.randbytes(end - begin)
            case _:
                other = draw.choice(seeds)
                start = draw.randint(0, len(other))
                data[begin:end] = other[start : start + draw.randint(1, 40)]
    return bytes(data)


def by_mutations(name: str, seconds: float, found: Path) -> tuple[int, int]:
    """Executions and findings."""
    from fuzz.fuzz_targets import TARGETS, Finding, Runner

    draw, run = random.Random(f"{name}{time.time()}"), Runner(name)
    executions, findings = 0, set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(draw, TARGETS[name].seeds)
        executions += 1
        try:
            run(data)
        except Finding as error:
            kind = re.sub(r"\d+|'[^']*'", "…", str(error))[:100]
            if kind not in findings:
                findings.add(kind)
                _keep(found, name, data, error)
    run.close()
    return executions, len(findings)


def by_hypothesis(name: str, seconds: float, found: Path) -> tuple[int, int]:
    """Executions and findings."""
    from fuzz.fuzz_targets import Finding
    from fuzz.structures import run_examples

    executions, findings = 0, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, error, data = run_examples(name, count=500)
        executions += done
        if error is not None:
            findings += 1
            _keep(found, name, data, Finding(str(error)))
            break
    return executions, findings


def by_atheris(name: str, seconds: float, found: Path) -> tuple[int, int]:
    """Executions and findings; in a process that libFuzzer ends."""
    from fuzz.fuzz_targets import TARGETS

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(TARGETS[name].seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        command = [sys.executable, __file__, "--inside", name, corpus]
        command += [f"-max_total_time={int(seconds)}", "-timeout=10"]
        command += ["-rss_limit_mb=8192", "-max_len=4096"]
        command += [f"-artifact_prefix={found}/{name}-"]
        done = subprocess.run(command, capture_output=True, text=True)
    counts = re.findall(r"(?:^#|Done )(\d+)", done.stderr, re.MULTILINE)
    executions = max(map(int, counts), default=0)
    failed = done.returncode != 0
    if failed:
        print(done.stderr[-2500:], file=sys.stderr)
    return executions, int(failed)


def inside_atheris(name: str, arguments: list[str]) -> None:
    """The process of `by_atheris`."""
    import atheris  # pyright: ignore[reportMissingImports] (optional)

    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz.fuzz_targets import Runner
    atheris.Setup([sys.argv[0], *arguments], Runner(name))
    atheris.Fuzz()


ENGINES = {
    "mutations": by_mutations,
    "hypothesis": by_hypothesis,
    "atheris": by_atheris,
}


def _keep(found: Path, name: str, data: bytes, error: BaseException) -> None:
    number = len(list(found.glob(f"{name}-*")))
    (found / f"{name}-{number}").write_bytes(data)
    print(f"{name}: {error} <- {data[:200]!r}", file=sys.stderr)


def main() -> None:
    """Prints a table; exits with 1 if there are findings."""
    if sys.argv[1:2] == ["--inside"]:
        inside_atheris(sys.argv[2], sys.argv[3:])
        return
    from fuzz.fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=30.0, help="for each of them")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    options.found.mkdir(parents=True, exist_ok=True)
    total = total_findings = 0
    print(
        "| target | engine | executions | seconds | findings |\n|---|---|---|---|---|"
    )
    for name in options.targets:
        for engine in options.engines:
            begin = time.monotonic()
            done, findings = ENGINES[engine](name, options.seconds, options.found)
            seconds = time.monotonic() - begin
            print(
                f"| {name} | {engine} | {done:,} | {seconds:.0f} | {findings} |",
                flush=True,
            )
            total, total_findings = total + done, total_findings + findings
    print(f"| all | | {total:,} | | {total_findings} |")
    sys.exit(total_findings > 0)


if __name__ == "__main__":
    main()
