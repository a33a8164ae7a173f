"""The wheel and the sdist carry what a project of one's own needs: both are built, the wheel is installed into a fresh
environment elsewhere, and its first pipeline runs.
"""

import os
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import BIN, ROOT, STRESS, run

BUILD = 'import sys; from setuptools import build_meta; print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))'


def built(what, project, target, environ):
    made = run(BIN / "python", "-c", BUILD, what, target, env=environ, cwd=project)
    assert made.returncode == 0, made.stderr
    return target / made.stdout.split()[-1]


@pytest.fixture
def wheel(project, environ, tmp_path):
    "Built from the unpacked sdist, so that both are whole."
    shutil.copy2(ROOT / "MANIFEST.in", project)
    sdist = built("sdist", project, tmp_path, environ)
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    return built("wheel", next((tmp_path / "unpacked").iterdir()), tmp_path, environ)


@pytest.mark.slow
def test_a_project_of_ones_own_from_the_wheel(wheel, environ, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert (
        sum(n.startswith("aerec_nb/_project/nbs/0") for n in names) >= 12
        and not (ROOT / "aerec_nb" / "_project").exists()
    ), "copied in when built"
    fresh = tmp_path / "fresh"
    assert run(sys.executable, "-m", "venv", fresh, env=environ, cwd=tmp_path).returncode == 0
    installed = run(
        fresh / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        wheel,
        env=environ,
        cwd=tmp_path,
    )
    assert installed.returncode == 0, installed.stderr
    site = next((fresh / "lib").glob("python*")) / "site-packages"
    (site / "others.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # what aerec_nb needs is here already; a path in a .pth does not bring the checkout along
    env = {k: v for k, v in environ.items() if k != "PATH"} | {
        "PATH": f"{fresh / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    }
    aerec = fresh / "bin" / "aerec"
    made = run(aerec, "new", "my_recommender", env=env, cwd=tmp_path)
    assert made.returncode == 0 and "my_recommender" in made.stdout, made.stderr
    project = tmp_path / "my_recommender"
    assert {p.name for p in project.iterdir()} == {
        ".gitignore",
        "Makefile",
        "README.md",
        "config",
        "constraints.txt",
        "dataset",
        "nbs",
        "settings.ini",
    }
    env |= {
        "AEREC_RUNS_DIR": "runs",
        "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),
    }  # nbconvert's templates lie there
    done = run(aerec, "run", "--data", "sample", *([] if STRESS else ["--to", "01a"]), env=env, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (project / "runs").glob("2*")
    assert len(list(found.glob("*/manifest.json"))) == (12 if STRESS else 3) and (found / "index.html").exists()
    where = run(fresh / "bin" / "python", "-c", "import aerec_nb; print(aerec_nb.__file__)", env=env, cwd=project)
    assert Path(where.stdout.strip()).is_relative_to(fresh), "the checkout was used"
    again = run(aerec, "run", "--data", "sample", "--to", "01a", "--dry-run", env=env, cwd=project / "nbs")
    assert again.stdout.count(" reuse ") == 3 or STRESS, again.stdout + again.stderr
    made_twice = run(aerec, "new", "my_recommender", env=env, cwd=tmp_path)
    assert made_twice.returncode == 2 and "my_recommender" in made_twice.stderr
    seen = run(aerec, "doctor", env=env, cwd=project)
    assert seen.returncode == 0 and "12 stages" in seen.stdout, seen.stdout
