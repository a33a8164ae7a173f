"What the tests share: the project, its virtual environment, and a scratch copy of what git tracks."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def tracked(pattern='*'):
    "Files that git tracks; everything where there is no git. An executed copy that papermill left in nbs/ is none of ours."
    listed = subprocess.run(['git', 'ls-files', '-z', '--', pattern], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0: return sorted(ROOT/name for name in listed.stdout.split('\0') if name and (ROOT/name).exists())
    return sorted(p for p in ROOT.glob(pattern) if p.is_file())


@pytest.fixture
def project(tmp_path):
    "A copy of the project to write in."
    copy = tmp_path/'project'
    for path in tracked():
        target = copy/path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return copy


def variables(folder):
    "Variables for a child process: the environment `test`, stores of its own in `folder`, one thread, no variables of the caller's."
    kept = {k: v for k, v in os.environ.items() if not k.startswith('AEREC_') and k not in ('IN_TEST', 'MPLBACKEND')}
    return {**kept, 'AEREC_ENV': 'test', 'AEREC_RUNS_DIR': str(folder/'runs'), 'AEREC_PATHS__VAR_DIR': str(folder/'var'),
            'OMP_NUM_THREADS': '1', 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}'}


@pytest.fixture
def environ(tmp_path): return variables(tmp_path)


def run(*command, env, cwd, timeout=280):
    "Run a command and return it with its output as text."
    return subprocess.run([str(c) for c in command], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout)
