"""Runs at once share the compiled programs that are kept, which are bounded."""

import os

import pytest
from program_cache import NAME, close_own, kept_folder, open_own


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    return kept_folder()


def programs(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*-cache")}


def test_two_runs_at_once_hand_over_what_each_has_added(kept):
    first, second = open_own(kept), open_own(kept)
    for own, content in ((first, b"1"), (second, b"2")):
        (own / "both-cache").write_bytes(b"same")
        (own / f"{content.decode()}-cache").write_bytes(content)
    assert programs(kept) == {}
    close_own(first)
    close_own(second)
    want = {"both-cache": b"same", "1-cache": b"1", "2-cache": b"2"}
    assert programs(kept) == want
    assert programs(open_own(kept)) == want


def test_what_was_not_used_for_longest_is_dropped(kept):
    own = open_own(kept)
    for age, name in enumerate(["new", "middle", "old"]):
        (own / f"{name}-cache").write_bytes(b"12345")
        os.utime(own / f"{name}-cache", (1e9 - age, 1e9 - age))
    close_own(own, most_bytes=10)
    assert set(programs(kept)) == {"new-cache", "middle-cache"}


def test_folders_of_killed_runs_are_removed(kept):
    killed, alive = open_own(kept), open_own(kept)
    os.utime(killed, (1e9, 1e9))
    open_own(kept)
    assert alive.exists() and not killed.exists()


def test_the_folder_is_the_one_that_the_environment_names(kept, tmp_path, monkeypatch):
    assert kept == tmp_path / NAME
    # Workers are told a folder inside that one.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(open_own(kept) / "commands"))
    assert kept_folder() == kept
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert kept_folder() == tmp_path / "home" / "rlhf_jax" / NAME
