"""Every stage runs alone under plain papermill, from any folder; settings arrive, misspelt ones are refused, stray
copies do no harm.
"""

import json
from pathlib import Path

import nbformat
import pytest
from conftest import BIN, ROOT, STRESS, papermill, run, variables
from short import QUICK, short_project
from test_structure import NOTEBOOKS, STAGES

# Whole notebooks take half a minute each: `test_notebooks.py` runs their cells, and STRESS runs all of them here.
FEW = [p for p in STAGES if STRESS or p.stem in ("00_configuration", "06_monitoring")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Variables for tests that share their runs and stores: what one has built, the next takes. Such tests are of one
    group, so that it is built once.
    """
    return {**variables(tmp_path_factory.mktemp("shared")), **({} if STRESS else QUICK)}


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    "The folder of the stages' notebooks: the whole ones under STRESS, else those without their library part."
    return ROOT / "nbs" if STRESS else short_project(tmp_path_factory.mktemp("short") / "project", shows=True) / "nbs"


def manifests(environ, stage):
    return [json.loads(p.read_text()) for p in Path(environ["AEREC_RUNS_DIR"]).glob(f"*/{stage}/manifest.json")]


@pytest.mark.xdist_group("stages")
@pytest.mark.parametrize("path", FEW, ids=lambda p: p.stem)
def test_stage_runs_alone_from_an_unrelated_folder(path, notebooks, shared, environ, tmp_path):
    """The last one, and every one under STRESS, begins from nothing; the others may take what they need from the runs
    of those before.
    """
    env = shared
    if STRESS:
        env = environ
    elif path == STAGES[-1]:
        env = {**environ, **QUICK}
    stage = path.stem.split("_", 1)[1]
    before = len(manifests(env, stage))
    done = papermill(notebooks / path.name, tmp_path / "out.ipynb", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(manifests(env, stage)) == before + 1
    result = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in result), "no plot"
    assert any("text/html" in o.get("data", {}) for o in result), "no table"


# That every stage calls the same function first is seen in test_structure.py.
@pytest.mark.parametrize("path", STAGES if STRESS else STAGES[:1], ids=lambda p: p.stem)
def test_misspelt_parameter_names_the_valid_ones(path, environ, tmp_path):
    done = papermill(path, tmp_path / "out.ipynb", "-p", "runn", "x", env=environ, cwd=tmp_path)
    assert done.returncode != 0 and "'runn'" in done.stderr and "did you mean 'run'?" in done.stderr
    assert not Path(environ["AEREC_RUNS_DIR"]).exists()


@pytest.mark.xdist_group("stages")
def test_the_command_of_the_readme_in_nbs(project, shared, environ):
    "`papermill 03_training.ipynb out.ipynb -p lr 0.001`: lr arrives, and the copy left in nbs/ exports nothing."
    exported = {p.name: p.read_bytes() for p in (project / "aerec_nb").glob("*.py")}
    before = manifests(shared, "training")
    env = {**shared, "AEREC_MODEL__MODELS": "autoencoder", "PYTHONPATH": str(project)}
    done = papermill("03_training.ipynb", "out.ipynb", "-p", "lr", "0.001", env=env, cwd=project / "nbs")
    assert done.returncode == 0, done.stderr[-3000:]
    (manifest,) = [m for m in manifests(shared, "training") if m not in before]
    assert manifest["settings"]["training.lr"] == {"value": "0.001", "source": "argument"}
    shown = json.dumps([c.get("outputs") for c in nbformat.read(project / "nbs" / "out.ipynb", 4).cells])
    assert "0.001" in shown

    assert run(BIN / "nbdev_export", env=environ, cwd=project).returncode == 0
    assert {p.name: p.read_bytes() for p in (project / "aerec_nb").glob("*.py")} == exported


@pytest.mark.xdist_group("stages")
def test_lr_arrives_from_the_root(notebooks, shared, tmp_path):
    before = manifests(shared, "training")
    out = tmp_path / "out.ipynb"
    env = {**shared, "AEREC_MODEL__MODELS": "autoencoder"}
    done = papermill(notebooks / "03_training.ipynb", out, "-p", "lr", "0.002", env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    (manifest,) = [m for m in manifests(shared, "training") if m not in before]
    assert manifest["settings"]["training.lr"] == {"value": "0.002", "source": "argument"}


def test_upstream_artifacts_are_reused_by_fingerprint(notebooks, environ, tmp_path):
    def executed(name, notebook, *options):
        done = papermill(notebooks / f"{notebook}.ipynb", tmp_path / name, *options, env=environ, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]

    def made_in(stage):
        "Names of the runs that made what each run has of a stage."
        return [manifest["run"] for manifest in manifests(environ, stage)]

    executed("a.ipynb", "01b_model_preprocessing")
    executed("b.ipynb", "02_modeling")
    assert len(made_in("model_preprocessing")) == 2 and len(set(made_in("model_preprocessing"))) == 1
    executed("c.ipynb", "02_modeling", "-p", "random_seed", "7")
    assert len(set(made_in("model_preprocessing"))) == 2 and len(made_in("business_preprocessing")) >= 2
    assert len(set(made_in("business_preprocessing"))) == 1


# nbdev_test runs every notebook in the same working folder; these two show that a kernel of JupyterLab does too.
IN_JUPYTER = [p for p in NOTEBOOKS if p.parent.name == "nbs" and (STRESS or p.stem in ("00_configuration", "index"))]


@pytest.mark.xdist_group("stages")
@pytest.mark.parametrize("path", IN_JUPYTER, ids=lambda p: p.stem)
def test_jupyter_kernel_runs_it_with_the_working_folder_nbs(path, shared, tmp_path):
    convert = [BIN / "jupyter", "nbconvert", "--to", "notebook", "--execute", path.name, "--output-dir", tmp_path]
    done = run(*convert, env=shared, cwd=ROOT / "nbs")
    assert done.returncode == 0, done.stderr[-3000:]
