"Every notebook that git tracks passes nbdev_test, whatever the reader has set; a stray executed copy is not a test."

import pytest
from conftest import BIN, NO_FORKS, ROOT, STRESS, forked, run, tracked
from nbdev.test import nbdev_test

NOTEBOOKS = [p for p in tracked("nbs/*.ipynb") if not {"benchmarks", "tutorials"} & set(p.parts)]
# Test cells run in every pipeline, with the settings of its project: none may lean on a default.
SETTINGS = {
    "RULES__MIN_USER_INTERACTIONS": "4",
    "RULES__K_CORE": "3",
    "RULES__WEIGHT_BY_RATING": "true",
    "RULES__HALF_LIFE_DAYS": "400",
    "RULES__MAX_INTERACTIONS_PER_USER": "200",
    "SPLIT__SPLIT": "holdout",
    "SPLIT__HOLDOUT_FRACTION": ".2",
    "SPLIT__SHORT_HISTORIES": "drop",
    "MODEL__MODELS": "popularity,rdlae,elsa",
    "MODEL__LAM": "99",
    "MODEL__DROPOUT": ".3",
    "TRAINING__LR": ".005",
    "TRAINING__NUM_EPOCH": "2",
    "TRAINING__BATCH_SIZE": "32",
    "TRAINING__EARLY_STOPPING_METRIC": "recall",
    "TRAINING__MAX_VALID_USERS": "50",
    "VALIDATION__TOPK": "7",
    "VALIDATION__REPORT_KS": "[15]",
    "VALIDATION__N_BOOTSTRAP": "150",
    "VALIDATION__LECTURE_REPLAY": "off",
    "INFERENCE__N_CANDIDATES": "30",
    "POSTPROCESSING__STEPS": "exclude_seen,ban_list,mmr",
    "POSTPROCESSING__BANNED_ITEMS": "[1,2]",
    "PACKAGING__MODEL_NAME": "other",
    "SERVING__PORT": "8123",
    "SERVING__MAX_K": "44",
    "SERVING__N_REQUESTS": "60",
    "SERVING__REQUIRE_AUTH": "true",
    "SERVING__API_KEYS": "k1",
    "MONITORING__WINDOW_HOURS": "5",
    "MONITORING__MIN_COVERAGE": ".3",
    "MONITORING__MAX_DRIFT": ".01",
    "RUN__RANDOM_SEED": "7",
}


LITERAL = ["index"]  # in a process of its own, as a contributor types it; the others in a fork with the same function


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    "A folder of runs that all notebooks share, whichever worker runs them: what one has built, the next takes."
    folder = tmp_path_factory.getbasetemp().parent / "notebooks"
    folder.mkdir(exist_ok=True)
    return folder


def marked(path):
    return pytest.param(path, marks=pytest.mark.slow) if path.parent.name == "how_to" else path


@pytest.mark.parametrize("path", map(marked, NOTEBOOKS), ids=lambda p: p.stem)
def test_notebook(path, together, environ):
    for name in ("AEREC_RUNS_DIR", "AEREC_PATHS__VAR_DIR", "AEREC_ENV"):
        environ.pop(name)  # nbdev_test brings its own environment
    if path.parent.name == "nbs":
        # A how-to page tells what comes of the defaults.
        environ.update((f"AEREC_{name}", value) for name, value in SETTINGS.items())
        environ["AEREC_TEST_DIR"] = str(together)
    if STRESS or path.stem in LITERAL or NO_FORKS:
        done = run(BIN / "nbdev_test", "--path", path, "--n_workers", "0", env=environ, cwd=ROOT)
    else:
        done = forked(nbdev_test, path, "", 0, env=environ, cwd=ROOT)
    assert done.returncode == 0 and "Success" in done.stdout, (done.stdout + done.stderr)[-6000:]
