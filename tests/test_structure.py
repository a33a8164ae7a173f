"The shape of the project: what nbdev, papermill and readers rely on."

import json
import re
import subprocess

import nbformat
import pytest
from conftest import BIN, ROOT, run, tracked

NOTEBOOKS = tracked("nbs/*.ipynb")
NUMBERED = [p for p in NOTEBOOKS if re.match(r"\d\d", p.name)]
PROCESS = ["00_", "01_", "01a_", "01b_", "02_", "03_", "03a_", "04_", "04a_", "05_", "05a_", "06_"]
STAGES = [p for p in NUMBERED if p.parent == ROOT / "nbs" and any(p.name.startswith(prefix) for prefix in PROCESS)]


def ids(p):
    return p.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def cells(path):
    return nbformat.read(path, as_version=4).cells


def test_the_table_of_notebooks_is_whole():
    assert [p.stem for p in STAGES] == [
        "00_configuration",
        "01_data_import",
        "01a_business_preprocessing",
        "01b_model_preprocessing",
        "02_modeling",
        "03_training",
        "03a_validation",
        "04_inference",
        "04a_postprocessing",
        "05_packaging",
        "05a_serving",
        "06_monitoring",
    ]
    libraries = {p.stem for p in NUMBERED if p.parent == ROOT / "nbs"} - {p.stem for p in STAGES}
    assert libraries == {
        "00e_warm_kernels",
        "04b_blocklist",
        "05b_transport",
        "05c_service_state",
        "06a_scale",
        "07_pipeline",
    }


@pytest.mark.parametrize("path", NUMBERED, ids=ids)
def test_cells_that_tools_rely_on(path):
    tags = [c.metadata.get("tags", []) for c in cells(path)]
    assert sum("parameters" in t for t in tags) == (1 if path in STAGES else 0)
    exports = [c for c in cells(path) if re.search(r"^#\s*\|\s*default_exp", c.source, re.M)]
    assert len(exports) == 1 and "papermill-error-cell-tag" in exports[0].metadata.get("tags", [])
    assert re.fullmatch(r"#\|\s*default_exp [\w.]+(\n#.*)*", exports[0].source.strip()), (
        "default_exp stands alone with its comment"
    )
    if path in STAGES:
        assert sum("open_run(parameters(globals()" in c.source for c in cells(path)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_metadata_and_outputs(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert nb["metadata"] == {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not re.search(r"/(?:root|tmp|work|home/[a-z]+)/[\w.\-/]+", json.dumps(outputs)), (
        "an output bears a machine path"
    )


@pytest.mark.parametrize("path", NUMBERED, ids=ids)
def test_long_cells_are_the_exception(path):
    longest = max((c.source.count("\n") + 1 for c in cells(path) if c.cell_type == "code"), default=0)
    assert longest <= 125, f"a cell of {longest} lines: split it"


def test_exported_modules_define_what_they_use():
    "A name that only a hidden cell imports is defined in the notebook, but not in its module."
    ruff = [
        BIN / "ruff",
        "check",
        "--isolated",
        "--select",
        "F821,F402,F823",
        *tracked("aerec_nb/*.py"),
        *tracked("aerec_nb/*/*.py"),
    ]
    done = run(*ruff, env=None, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_notebooks_are_clean_and_the_package_is_in_sync(project):
    before = {
        p.relative_to(project): p.read_bytes()
        for p in [*project.glob("nbs/**/*.ipynb"), *project.glob("aerec_nb/**/*.py")]
    }
    subprocess.run([BIN / "nbdev_clean"], cwd=project, check=True)
    subprocess.run([BIN / "nbdev_export"], cwd=project, check=True)
    changed = [str(p) for p, data in before.items() if (project / p).read_bytes() != data]
    assert not changed, f"nbdev_clean / nbdev_export change {changed}"
    assert {p.relative_to(project) for p in project.glob("aerec_nb/**/*.py")} == {
        p for p in before if p.suffix == ".py"
    }


def test_readme_is_made_from_index(project):
    made = run(BIN / "python", ".ci/readme.py", "--print", env=None, cwd=project)
    assert made.returncode == 0, made.stderr
    assert made.stdout == (project / "README.md").read_text(encoding="utf-8"), "run: make readme"


def test_nothing_tracked_is_too_large_or_names_a_machine():
    for path in tracked():
        assert path.stat().st_size < 2_000_000, path
        if path.suffix in (".py", ".md", ".toml", ".ini", ".txt", ".yml") and path.parent.name != "tests":
            assert not re.search(r"/(?:root|tmp|work|home/[a-z]+)/[\w.\-/]+", path.read_text(encoding="utf-8")), path


def test_no_pickle_is_written():
    for path in tracked("aerec_nb/*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\b|joblib|torch\.save|np\.save\b|to_pickle", source), path
