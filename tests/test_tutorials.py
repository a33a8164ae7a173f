"""The tutorials run from their first cell to their last, on what comes with the project and, under STRESS, on the
lecture's data where they lie beside it.
"""

from pathlib import Path

import papermill
import pytest
from conftest import STRESS, TEST_DATA_DIR, real_data

from aerec_nb.configuration import project_dir


@pytest.mark.parametrize(
    "data",
    ["sample", *([str(real_data("data/ml-latest-small"))] if STRESS and TEST_DATA_DIR else [])],
    ids=lambda d: Path(d).name,
)
@pytest.mark.slow
def test_the_lecture_revisited(tmp_path, data, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = project_dir() / "nbs" / "tutorials" / "lecture_revisited.ipynb"
    made = papermill.execute_notebook(
        source,
        tmp_path / "out.ipynb",
        parameters={"data": data, "budget_s": 5},
        cwd=source.parent,
        progress_bar=False,
        kernel_name="python3",
    )  # its own checks stop it
    said = "\n".join("".join(o.get("text", "")) for c in made.cells for o in c.get("outputs", []))
    assert (
        "users were asked for items that the net had been shown as theirs; when only what is not hidden is "
        "learned from: 0."
    ) in said
    figures = dict(
        part.rsplit(" ", 1) for part in next(line for line in said.splitlines() if " -> " in line).split(" -> ")
    )
    leaky = float(figures["list best first"])
    honest = float(figures["trained without the hidden items"])
    assert leaky > honest, "who has seen the answers knows more of them"
    assert sum("image/png" in o.get("data", {}) for c in made.cells for o in c.get("outputs", [])) == 1, "the waterfall"
