"""Every stage runs alone under plain papermill, from any folder; knobs arrive, misspelt ones are refused, stray copies
do no harm.
"""

import json
import os
from pathlib import Path

import nbformat
import pytest
from conftest import BIN, ROOT, run, variables
from test_structure import NOTEBOOKS, STAGES

STRESS = os.environ.get("STRESS")


def papermill(source, target, *options, env, cwd, timeout=280):
    return run(BIN / "papermill", "--no-progress-bar", source, target, *options, env=env, cwd=cwd, timeout=timeout)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Variables for tests that share their runs and stores: what one has built, the next takes. Such tests are of one
    group, so that it is built once.
    """
    return variables(tmp_path_factory.mktemp("shared"))


def manifests(environ, stage):
    return [json.loads(p.read_text()) for p in Path(environ["AEREC_RUNS_DIR"]).glob(f"*/{stage}/manifest.json")]


FEW = [
    p for p in STAGES if STRESS or p.stem in ("00_configuration", "02_modeling", "04a_postprocessing", "06_monitoring")
]  # the others are run by the pipeline (papermill too) and by nbdev_test, and 03_training below; STRESS runs them all


@pytest.mark.xdist_group("stages")
@pytest.mark.parametrize("path", FEW, ids=lambda p: p.stem)
def test_stage_runs_alone_from_an_unrelated_folder(path, shared, environ, tmp_path):
    """The last one, and every one under STRESS, begins from nothing; the others may take what they need from the runs
    of those before.
    """
    env = environ if STRESS or path == STAGES[-1] else shared
    stage = path.stem.split("_", 1)[1]
    before = len(manifests(env, stage))
    done = papermill(path, tmp_path / "out.ipynb", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(manifests(env, stage)) == before + 1
    result = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in result) and any(
        "text/html" in o.get("data", {}) for o in result
    ), "a table and a plot"


@pytest.mark.parametrize(
    "path", FEW, ids=lambda p: p.stem
)  # that every stage asks the same function first is seen in test_structure.py
def test_misspelt_parameter_names_the_valid_ones(path, environ, tmp_path):
    done = papermill(path, tmp_path / "out.ipynb", "-p", "runn", "x", env=environ, cwd=tmp_path)
    assert done.returncode != 0 and "unknown parameter 'runn': did you mean 'run'? valid names are" in done.stderr
    assert not Path(environ["AEREC_RUNS_DIR"]).exists()


@pytest.mark.xdist_group("stages")
@pytest.mark.parametrize("where", [".", "nbs"])
def test_lr_arrives_from_the_root_and_from_nbs(where, shared, tmp_path):
    source = {".": "nbs/03_training.ipynb", "nbs": "03_training.ipynb"}[where]
    before = manifests(shared, "training")
    done = papermill(source, tmp_path / "out.ipynb", "-p", "lr", "0.001", env=shared, cwd=ROOT / where)
    assert done.returncode == 0, done.stderr[-3000:]
    (manifest,) = [m for m in manifests(shared, "training") if m not in before]
    assert manifest["settings"]["training.lr"] == {"value": "0.001", "source": "argument"}
    shown = json.dumps([c.get("outputs") for c in nbformat.read(tmp_path / "out.ipynb", 4).cells])
    assert "0.001" in shown


def test_upstream_artifacts_are_reused_by_fingerprint(environ, tmp_path):
    first = papermill(ROOT / "nbs" / "01b_model_preprocessing.ipynb", tmp_path / "a.ipynb", env=environ, cwd=tmp_path)
    again = papermill(ROOT / "nbs" / "02_modeling.ipynb", tmp_path / "b.ipynb", env=environ, cwd=tmp_path)
    other = papermill(
        ROOT / "nbs" / "02_modeling.ipynb", tmp_path / "c.ipynb", "-p", "random_seed", "7", env=environ, cwd=tmp_path
    )
    assert [first.returncode, again.returncode, other.returncode] == [0, 0, 0], other.stderr[-2000:]
    text = {n: json.dumps(nbformat.read(tmp_path / f"{n}.ipynb", 4)) for n in "bc"}
    assert "model_preprocessing: taken from run" in text["b"]
    assert "model_preprocessing: building" in text["c"] and "business_preprocessing: taken from run" in text["c"]


@pytest.mark.xdist_group("stages")
def test_a_stray_executed_copy_leaves_the_package_alone(project, environ, shared):
    before = {p.name: p.read_bytes() for p in (project / "aerec_nb").glob("*.py")}
    done = papermill(
        "03_training.ipynb",
        "out.ipynb",
        "-p",
        "lr",
        "0.001",
        env={**shared, "PYTHONPATH": str(project)},
        cwd=project / "nbs",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(BIN / "nbdev_export", env=environ, cwd=project).returncode == 0
    assert {p.name: p.read_bytes() for p in (project / "aerec_nb").glob("*.py")} == before


IN_JUPYTER = [
    p
    for p in NOTEBOOKS
    if p.parent.name == "nbs"
    and (
        STRESS
        or p.stem == "00_configuration"
        or p not in STAGES
        and p.stem not in ("02b_neural_models", "06a_scale", "07_pipeline")
    )
]  # papermill has run the other stages above; the three take long, and nbdev_test runs them


@pytest.mark.xdist_group("stages")
@pytest.mark.parametrize("path", IN_JUPYTER, ids=lambda p: p.stem)
def test_jupyter_kernel_runs_it_with_the_working_folder_nbs(path, shared, tmp_path):
    done = run(
        BIN / "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        path.name,
        "--output-dir",
        tmp_path,
        env=shared,
        cwd=ROOT / "nbs",
    )
    assert done.returncode == 0, done.stderr[-3000:]
