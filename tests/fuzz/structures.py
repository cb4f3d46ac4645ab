"""Inputs that hypothesis builds: structures close to those that a reader expects."""

import json
import re

from fuzz.fuzz_targets import TARGETS, Finding, Runner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["gpt2", "llama", "LORA", "F32", "user", "ranking", "x" * 300]),
)


def _names(seeds: list[bytes]) -> list[str]:
    """The keys of the seeds."""
    found = {
        key.decode()
        for seed in seeds
        for key in re.findall(rb'"?([A-Za-z_]{1,40})"?\s*:', seed)
    }
    return sorted(found) or ["a"]


def _values(names: list[str]) -> st.SearchStrategy:
    keys = st.one_of(st.sampled_from(names), st.text(max_size=10))
    return st.recursive(
        _SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=6)
        ),
        max_leaves=12,
    )


def _changed(seed: bytes, change: dict) -> bytes:
    """A seed with other values of some fields, or the values alone."""
    try:
        fields = json.loads(seed)
    except (ValueError, RecursionError):
        fields = None
    fields = fields | change if isinstance(fields, dict) else change
    return json.dumps(fields).encode()


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Inputs of a target."""
    seeds = TARGETS[name].seeds
    if name == "template":
        parts = [part for seed in seeds for part in re.split(rb"(?<=[}\]) ])", seed)]
        return st.lists(st.sampled_from(sorted(set(parts))), max_size=12).map(b"".join)
    names = _names(seeds)
    change = st.dictionaries(st.sampled_from(names), _values(names), max_size=4)
    made = st.builds(_changed, st.sampled_from(seeds), change)
    if name == "tensors":
        return st.builds(
            lambda text, data: len(text).to_bytes(8, "little") + text + data,
            st.one_of(made, _values(names).map(lambda x: json.dumps(x).encode())),
            st.binary(max_size=32),
        )
    return made


def run_examples(name: str, *, count: int) -> tuple[int, Finding | None, bytes]:
    """Runs a target on examples: how many, and the smallest that is a finding."""
    runner, done, last = Runner(name), 0, b""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(inputs(name))
    def run(data: bytes) -> None:
        nonlocal done, last
        done, last = done + 1, data
        runner(data)

    try:
        run()
    except Finding as error:
        return done, error, last
    finally:
        runner.close()
    return done, None, b""
