"""Real files in full; skipped where they are absent."""

import gzip
import json
import os
from pathlib import Path

import pytest

from rlhf_jax.data.text_data import Columns, read_examples, read_pairs


def real_data() -> Path:
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("RLHF_JAX_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.mark.realdata
def test_real_preferences():
    path = real_data() / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    read = read_pairs(path)
    assert len(read.rows) == 2312 and read.dropped == {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        originals = [json.loads(line) for line in file]
    for pair, original in zip(read.rows, originals, strict=True):
        assert pair.prompt.startswith("\n\nHuman:")
        assert pair.prompt.endswith("\n\nAssistant:")
        assert pair.prompt + pair.chosen == original["chosen"]
        assert pair.prompt + pair.rejected == original["rejected"]
        assert "\n\nHuman:" not in pair.chosen + pair.rejected
    # To four questions the preferred answer is silence: pairs, but no demonstrations.
    left = read_examples(path, on_unusable="drop")
    assert len(left.rows) == 2308 and left.dropped == {"empty completion": 4}
    with pytest.raises(ValueError, match=r"jsonl\.gz:87: empty completion; 4 of 2312"):
        read_examples(path)


@pytest.mark.realdata
def test_real_questions_and_text():
    folder = real_data()
    columns = Columns(prompt="question", completion="answer")
    read = read_examples(folder / "gsm8k" / "test.jsonl", columns=columns)
    assert len(read.rows) == 1319 and read.rows[0].completion.endswith("#### 18")
    text = read_examples(folder / "tinyshakespeare" / "input.txt").rows
    assert [len(example.completion) for example in text] == [1115394]
