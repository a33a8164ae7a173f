"""The tutorials run from their first cell to their last, on what comes with the project and, under STRESS, on the
lecture's data where they lie beside it.
"""

import json
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import STRESS, TEST_DATA_DIR, real_data

from aerec_nb.core.project import project_dir

# what the page found out, in a cell at its end
FIGURES = """
import json

print(
    json.dumps(
        {
            "caught": int(caught),
            "asked": len(whole.test),
            "clean": int(clean),
            "leaky": float(best_first.mean()),
            "honest": float(honest.mean()),
        }
    )
)
"""


@pytest.mark.parametrize(
    "data",
    ["sample", *([str(real_data("data/ml-latest-small"))] if STRESS and TEST_DATA_DIR else [])],
    ids=lambda d: Path(d).name,
)
@pytest.mark.slow
def test_the_lecture_revisited(tmp_path, data, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = project_dir() / "nbs" / "tutorials" / "lecture_revisited.ipynb"
    page = nbformat.read(source, nbformat.NO_CONVERT)
    page.cells.append(nbformat.v4.new_code_cell(FIGURES))
    nbformat.write(page, tmp_path / "in.ipynb")
    made = papermill.execute_notebook(
        tmp_path / "in.ipynb",
        tmp_path / "out.ipynb",
        parameters={"data": data, "time_budget_s": 5},
        cwd=source.parent,
        progress_bar=False,
        kernel_name="python3",
    )  # its own checks stop it
    found = json.loads("".join(o["text"] for o in made.cells[-1].outputs if o.get("name") == "stdout"))
    assert found["caught"] == found["asked"] > 0 and found["clean"] == 0, "every leak was found, and no other"
    assert found["leaky"] > found["honest"], "who has seen the answers knows more of them"
    assert sum("image/png" in o.get("data", {}) for c in made.cells for o in c.get("outputs", [])) == 1, "the waterfall"
