"""`session.py`: what is said of metrics that overflow."""

import numpy as np
import pytest

from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.run.log_files import read_metrics
from rlhf_jax.run.session import Session


@pytest.mark.parametrize("quiet", [True, False])
def test_a_metric_that_overflows_is_named_once_and_written_each_time(
    tmp_path, capsys, quiet
):
    config = SFTConfig(
        run_dir=str(tmp_path / "run"), data="none.jsonl", steps=4, quiet=quiet
    )
    rows = [
        {"policy/ratio_mean": 1.0, "policy/approx_kl": 0.5},
        {"policy/ratio_mean": np.float32(np.inf), "policy/approx_kl": 0.5},
        {"policy/ratio_mean": np.inf, "policy/approx_kl": np.nan},
        {"policy/ratio_mean": 1.0, "policy/approx_kl": np.nan},
        {"policy/ratio_mean": -np.inf, "policy/approx_kl": 0.5},
    ]
    with Session(config) as session:
        session.restore({})  # as every stage does; it opens the logs
        for step, row in enumerate(rows):
            session.log(step, row, shown={})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "warning: step 1: policy/ratio_mean is inf",
        "warning: step 2: policy/approx_kl is nan",
    ]
    written = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("policy/ratio_mean", "policy/approx_kl"):
        got = [row[name] for row in written]
        np.testing.assert_array_equal(got, [row[name] for row in rows])
