"What the tests share: the project, its virtual environment, processes, and a scratch copy of what git tracks."

import contextlib
import importlib
import logging
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.parse
import uuid
from pathlib import Path

import pytest

# Set before anything loads torch. As many tests run at once as there are processors: more threads would only compete.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes import the package: it is compiled once

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STRESS = bool(os.environ.get("STRESS"))  # `make stress`: the long load and fault trials, and every variant
# A folder with real data (data/, reference/). Tests marked `data` run only where this variable names one.
TEST_DATA_DIR = os.environ.get("TEST_DATA_DIR")


def real_data(name=""):
    "Return a file or folder of the real data; for tests marked `data`."
    return Path(TEST_DATA_DIR or "TEST_DATA_DIR is not set") / name


def tracked(pattern="*"):
    """Files that git tracks; everything where there is no git. An executed copy that papermill left in nbs/ is none of
    ours.
    """
    listed = subprocess.run(["git", "ls-files", "-z", "--", pattern], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return sorted(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists())
    return sorted(p for p in ROOT.glob(pattern) if p.is_file())


@pytest.fixture
def project(tmp_path):
    "A copy of the project to write in."
    copy = tmp_path / "project"
    for path in tracked():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return copy


def variables(folder):
    """Variables for a child process: the environment `test`, stores of its own in `folder`, one thread, no variables of
    the caller's.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AEREC_") and k not in ("IN_TEST", "MPLBACKEND")}
    return {
        **kept,
        "AEREC_ENV": "test",
        "AEREC_RUNS_DIR": str(folder / "runs"),
        "AEREC_PATHS__VAR_DIR": str(folder / "var"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def environ(tmp_path):
    return variables(tmp_path)


def run(*command, env, cwd, timeout=280):
    "Run a command and return it with its output as text; again where a port that its kernel was told to take was gone."
    for _ in range(3):
        done = subprocess.run(
            [str(c) for c in command], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        if "Kernel died before replying to kernel_info" not in done.stderr:
            break  # papermill and nbconvert: no cell has run
    return done


# What makes forks of this process unsafe from now on: tests that start Ray in it say so, for its threads.
NO_FORKS = []


def forked(function, *arguments, env, cwd, timeout=280):
    """Call a function in a fork of this process, which has imported the package already.

    The fork is a process with its own variables, working folder and output. Returns what `subprocess.run` returns; the
    exit code is what the function returns, 0 for None.
    """
    assert not NO_FORKS, f"no fork after {NO_FORKS}"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _become_process(out, err, env, cwd)
                code = function(*arguments) or 0
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else int(e.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        code = _wait_for(pid, timeout)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([function.__name__, *arguments], code, out.read(), err.read())


def _become_process(out, err, env, cwd):
    "Give this fork a session, variables, a working folder and output of its own."
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    logging.getLogger().handlers.clear()  # pytest's
    os.environ.clear()
    os.environ.update({k: str(v) for k, v in env.items()})
    os.chdir(cwd)


def _wait_for(pid, timeout):
    "Return the exit code of a fork; kill its session when it takes too long."
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise subprocess.TimeoutExpired(f"a fork of {os.getpid()}", timeout)


IMPORTED_BEFORE_A_FORK = [
    "aerec_nb.monitoring",
    "aerec_nb.serving",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "papermill",
]


def aerec(*words, env, cwd, timeout=600):
    "Run the `aerec` command; in a fork, which spares its imports, unless every variant is asked for."
    if STRESS or NO_FORKS:
        return run(BIN / "aerec", *words, env=env, cwd=cwd, timeout=timeout)
    for name in IMPORTED_BEFORE_A_FORK:
        importlib.import_module(name)
    from aerec_nb import pipeline
    from aerec_nb.core import artifacts

    artifacts.read_code()
    return forked(pipeline.main, [str(w) for w in words], env=env, cwd=cwd, timeout=timeout)


def papermill(source, target, *options, env, cwd, timeout=280):
    "Run the `papermill` command."
    return run(BIN / "papermill", "--no-progress-bar", source, target, *options, env=env, cwd=cwd, timeout=timeout)


# Groups and tests that take longest, longest first, so that at the end no worker waits for one that has just begun a
# long one; the others follow in their order. Those on Ray come after all that fork.
LONGEST = [
    "stages",
    "finished",
    "short",
    "test_notebook",
    "test_data_of_another_shape_runs_through",
    "ray",
    "test_serving",
    "cold",
    "mlflow",
]

# Files whose tests share a service that takes seconds to start: each is one group.
WITH_SERVICE = ["test_serving", "test_limits", "test_transport", "test_monitoring", "test_inference"]


def place(item):
    group = item.get_closest_marker("xdist_group")
    name = group.args[0] if group else item.originalname
    if name not in LONGEST and item.path.stem == "test_pipeline":
        name = "test_data_of_another_shape_runs_through"  # before those on Ray: its tests fork
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Tests of one xdist_group go to one worker.

    xdist 3.8 appends the group to `_nodeid`, which pytest 9.2 no longer reads: without this a group's costly fixture is
    made by every worker.
    """
    slow = STRESS or "slow" in config.getoption("markexpr", "")
    unwanted = [name for name, wanted in (("data", TEST_DATA_DIR), ("slow", slow), ("stress", STRESS)) if not wanted]
    left_out = [i for i in items if any(i.get_closest_marker(name) for name in unwanted)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [i for i in items if i not in left_out]
    if not config.getoption("loadgroup", False):
        return
    for item in items:
        if item.path.stem in WITH_SERVICE and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=place)  # keeps the order of equals
    for item in items:
        group = item.get_closest_marker("xdist_group")
        if group and not item.nodeid.endswith(f"@{group.args[0]}"):
            item._id = type(item._id).parse(f"{item.nodeid}@{group.args[0]}")


# --- a PostgreSQL of our own


def postgres_program(name):
    "Where a program of PostgreSQL is, or None; Debian keeps the server's outside the search path."
    return shutil.which(name) or next(
        (str(p) for p in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None
    )


@pytest.fixture(scope="session")
def postgres_url():
    """The URL (with a password) of an empty database of a private PostgreSQL, on a free loopback port, in a temporary
    folder; one a worker: mark tests with xdist_group('postgres').
    """
    if not postgres_program("initdb"):
        pytest.skip("no PostgreSQL here (Debian: apt-get install postgresql)")
    password = "p@ss:w/rd s3cret"
    folder = Path(tempfile.mkdtemp(prefix="aerec_nb-postgres-"))
    server = None
    try:
        as_user = {}
        if os.geteuid() == 0:  # the server refuses root
            user = next(
                pwd.getpwnam(name) for name in ("postgres", "nobody") if any(u.pw_name == name for u in pwd.getpwall())
            )
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        (folder / "password").write_text(password)
        (folder / "password").chmod(0o644)
        made = subprocess.run(
            [
                postgres_program("initdb"),
                "-D",
                folder / "data",
                "-U",
                "aerec",
                "-A",
                "scram-sha-256",
                "--pwfile",
                folder / "password",
                "-E",
                "UTF8",
                "--locale",
                "C",
                "--no-sync",
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            **as_user,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        with open(folder / "log", "w") as log:
            server = subprocess.Popen(
                [
                    postgres_program("postgres"),
                    "-D",
                    folder / "data",
                    "-h",
                    "127.0.0.1",
                    "-p",
                    str(port),
                    "-c",
                    "unix_socket_directories=",
                    "-c",
                    "fsync=off",
                    "-c",
                    "shared_buffers=32MB",
                ],
                cwd=folder,
                stdout=log,
                stderr=log,
                **as_user,
            )
        url = f"postgresql://aerec:{urllib.parse.quote(password, safe='')}@127.0.0.1:{port}/postgres"
        _wait_for_postgres(url, server, folder / "log")
        yield url
    finally:
        if server is not None and server.poll() is None:
            server.send_signal(signal.SIGINT)  # fast shutdown: open connections are ended
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_postgres(url, server, log, seconds=60):
    import psycopg

    for _ in range(seconds * 10):
        assert server.poll() is None, log.read_text()
        try:
            return psycopg.connect(url, connect_timeout=5).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture
def fresh_database(postgres_url):
    "The URL of a database that only this test uses."
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(postgres_url, autocommit=True) as c:
        c.execute(f"CREATE DATABASE {name}")
    yield f"{postgres_url.rpartition('/')[0]}/{name}"
    with psycopg.connect(postgres_url, autocommit=True) as c:
        c.execute(f"DROP DATABASE {name} WITH (FORCE)")
