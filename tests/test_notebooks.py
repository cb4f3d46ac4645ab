"""The notebooks run from top to bottom and print what is stored in them."""

import contextlib
import io
import json
import re
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FIGURES = {"01_losses_by_hand": 5, "02_what_the_critic_buys": 5}
MOST_BYTES = 600_000  # what GitHub still shows without delay


def read(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))


def code_cells(name):
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def stored_text(cell):
    streams = [o for o in cell["outputs"] if o["output_type"] == "stream"]
    return "".join("".join(output["text"]) for output in streams)


def stored_pictures(cell):
    return [o for o in cell["outputs"] if "image/png" in o.get("data", {})]


def test_every_notebook_is_run_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_notebook_prints_and_draws_what_is_stored(name):
    namespace = {"__name__": "__main__"}
    figures = 0
    try:
        with matplotlib.rc_context():
            for number, cell in enumerate(code_cells(name), start=1):
                where = f"{name}, code cell {number}"
                printed = io.StringIO()
                code = compile("".join(cell["source"]), where, "exec")
                with contextlib.redirect_stdout(printed):
                    exec(code, namespace)
                assert printed.getvalue() == stored_text(cell), where
                assert len(plt.get_fignums()) == len(stored_pictures(cell)), where
                figures += len(plt.get_fignums())
                plt.close("all")
    finally:
        plt.close("all")
    assert figures == FIGURES[name]


@pytest.mark.parametrize("name", FIGURES)
def test_every_part_ends_with_a_check(name):
    # The numbers in the text are asserted: each cell that computes some has a check.
    for number, cell in enumerate(code_cells(name), start=1):
        source = "".join(cell["source"])
        if cell["outputs"]:
            assert re.search(r"^ *assert ", source, re.MULTILINE), number


@pytest.mark.parametrize("name", FIGURES)
def test_stored_notebook_is_one_clean_run(name):
    cells = code_cells(name)
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell["outputs"]:
            # No results, errors or warnings: text is printed, pictures are drawn.
            assert output["output_type"] in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout"
    metadata = read(name)["metadata"]
    assert set(metadata) == {"kernelspec", "language_info"}
    assert metadata["kernelspec"]["name"] == "python3"
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < MOST_BYTES
