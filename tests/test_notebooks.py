"Every notebook that git tracks passes nbdev_test; a stray executed copy is not a test."
import pytest
from conftest import BIN, ROOT, run, tracked

NOTEBOOKS = [p for p in tracked('nbs/*.ipynb') if not {'benchmarks', 'tutorials'} & set(p.parts)]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, environ):
    environ.pop('AEREC_RUNS_DIR'); environ.pop('AEREC_PATHS__VAR_DIR'); environ.pop('AEREC_ENV')  # nbdev_test brings its own environment
    done = run(BIN/'nbdev_test', '--path', path, '--n_workers', '0', env=environ, cwd=ROOT)
    assert done.returncode == 0 and 'Success' in done.stdout, (done.stdout + done.stderr)[-6000:]
