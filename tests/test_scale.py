"""The same functions on Ray: results of one process, whatever the number of workers and whoever of them is killed;
mistakes in one line.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import BIN, NO_FORKS, ROOT, STRESS, run
from short import left_after, short_project

from aerec_nb import scale, training
from aerec_nb.business_preprocessing import apply_rules
from aerec_nb.core.errors import AerecError, DataError
from aerec_nb.data.features import item_features
from aerec_nb.data.interactions import Interactions
from aerec_nb.data.splits import split_interactions
from aerec_nb.data_import import load_ratings
from aerec_nb.distributed.settings import ComputeSettings
from aerec_nb.inference import Recommender
from aerec_nb.models.neural import TrainingDiverged
from aerec_nb.models.registry import create_model
from aerec_nb.packaging import load_bundle, save_bundle
from aerec_nb.testing import raised, test_error

pytestmark = pytest.mark.xdist_group("ray")
TWO = ComputeSettings(backend="ray", n_workers=2)
KILLS = 10


@pytest.fixture(scope="module", autouse=True)
def no_forks():
    NO_FORKS.append("Ray")


@pytest.fixture(scope="module")
def engine():
    "Ray with two workers, for the tests of this file."
    scale.start_engine(TWO)
    yield
    scale.stop_engine()


@pytest.fixture(scope="module")
def ratings():
    return load_ratings("sample")


@pytest.fixture(scope="module")
def split(ratings):
    return split_interactions(apply_rules(ratings)[0], "leave_last")


def workers(*names):
    "Ray's processes below this one that do something of these names at the moment."
    found = []
    for p in psutil.Process().children(recursive=True):
        try:
            said = " ".join(p.cmdline())
        except psutil.Error:
            continue
        if said.startswith("ray::") and any(n in said for n in names):
            found.append(p)
    return found


class Killer(threading.Thread):
    "Kills a worker with SIGKILL as soon as one does something of these names, some moments later, so many times."

    def __init__(self, *names, times=1, after=(0.05, 0.6), seed=0):
        super().__init__(daemon=True)
        self.names = names
        self.times = times
        self.after = after
        self.random = np.random.default_rng(seed)
        self.killed = []
        self.over = False
        self.start()

    def run(self):
        while len(self.killed) < self.times and not self.over:
            found = [p for p in workers(*self.names) if p.pid not in self.killed]
            if not found:
                time.sleep(0.01)
                continue
            time.sleep(self.random.uniform(*self.after))
            victim = found[self.random.integers(len(found))]
            try:
                victim.kill()
                self.killed.append(victim.pid)
            except psutil.NoSuchProcess:
                continue

    def end(self):
        self.over = True
        self.join()
        return self.killed


def test_an_engine_that_does_not_start_is_one_line(monkeypatch):
    "Stands before the tests with an engine: Ray is started once a process."
    small = ComputeSettings(backend="ray", object_store_gib=0.01)
    refused = raised(lambda: scale.start_engine(small))
    assert refused.code == "engine_not_started" and "the minimum allowed is" in str(refused), "what Ray says is lost"

    def late(**options):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(scale.ray_module(), "init", late)
    refused = raised(lambda: scale.start_engine(TWO))
    assert refused.code == "engine_not_started" and "The current node timed out" in str(refused)


def test_a_split_without_a_valid_fold(split):
    test_error(
        lambda: scale.train(create_model("mult_vae"), split.merge_valid_into_train(), scale=TWO),
        "not_found",
        "split.valid",
    )


def test_a_wrong_token_is_told_from_another_program(monkeypatch):
    def answers(health):
        monkeypatch.setattr(scale, "_health", lambda address, environ, seconds: health)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            return raised(lambda: scale.check_address(f"127.0.0.1:{listening.getsockname()[1]}")).code

    assert [answers(h) for h in (scale._Health.REFUSED, scale._Health.OTHER)] == ["wrong_token", "not_a_cluster"]


def test_nodes_are_asked_what_they_have(engine, monkeypatch):
    "A node that is late, one that fails, one with another version, and this one."
    ray = scale.ray_module()
    scale._check_nodes(ray)
    test_error(lambda: scale._check_nodes(ray, seconds=0), "timeout")

    def crashed(answer, timeout):
        raise ray.exceptions.WorkerCrashedError()

    with monkeypatch.context() as m:
        m.setattr(ray, "get", crashed)
        failed = raised(lambda: scale._check_nodes(ray))
        assert failed.code == "worker_failed" and "The worker died unexpectedly" in str(failed), "what Ray says is lost"

    with monkeypatch.context() as m:
        m.setattr(ray, "get", lambda answer, timeout: None)
        test_error(lambda: scale._check_nodes(ray), "not_installed")

    found = scale.importlib.metadata.version("aerec_nb")
    monkeypatch.setattr(scale.importlib.metadata, "version", lambda name: "0.0")
    other = raised(lambda: scale._check_nodes(ray))
    assert other.code == "other_version" and found in str(other) and "0.0" in str(other)


class Unknown(AerecError):
    "An error of a class that other processes need not know, as one of a plugin."


def test_an_error_of_a_worker_keeps_its_code(engine):
    "Class, code, place and the one line, from tasks and from Ray Data; what is no error of ours becomes one line."
    ray = scale.ray_module()

    def bad_row(*given):
        raise DataError("a row is bad", code="missing_value", where="ratings.csv")

    class BadActor:
        def __call__(self, rows):
            bad_row()

    def over_rows(function, **options):
        rows = scale._data().from_items([{"number": n} for n in range(2)])
        return lambda: list(rows.map_batches(function, batch_size=1, **options).iter_rows())

    def over_groups():
        rows = scale._data().from_items([{"number": n} for n in range(2)])
        return rows.groupby("number").map_groups(bad_row, batch_format="pandas").materialize()

    actors = {"compute": scale.ray_module("ray.data").ActorPoolStrategy(size=1)}
    for work in (
        lambda: ray.get(ray.remote(bad_row).remote()),
        over_rows(bad_row),
        over_rows(BadActor, **actors),
        over_groups,
    ):
        with pytest.raises(DataError) as e, scale._one_line("rules"):
            work()
        assert (str(e.value), e.value.code, e.value.where) == ("a row is bad", "missing_value", "ratings.csv")

    with pytest.raises(AerecError) as e, scale._one_line("rules"):
        ray.get(ray.remote(lambda: 1 / 0).remote())
    assert (e.value.code, e.value.where) == ("worker_failed", "rules") and "ZeroDivisionError" in str(e.value)
    assert "\n" not in str(e.value)
    made = scale._portable_error(Unknown("no such thing", "not_found", "it"))
    assert (type(made), str(made), made.code, made.where) == (AerecError, "no such thing", "not_found", "it")


@pytest.mark.parametrize("n_workers", [1, 2, 3] if STRESS else [2])
def test_closed_forms_are_equal_to_the_bit(engine, split, n_workers):
    features = (
        item_features(pd.read_csv(ROOT / "dataset" / "sample" / "movies.csv").rename(columns={"movieId": "item_id"}))
        .reindex_items(split.items)
        .matrix
    )
    for name, hp, given in (
        ("ease", {"lam": 50.0}, None),
        ("rdlae", {"user_power": 0.3}, None),
        ("ease", {"feature_weight": 3.0, "form": "primal"}, features),
    ):
        local = create_model(name, **{"form": "primal", **hp}).fit(split.train, given)
        there = create_model(name, **{"form": "primal", **hp})
        scale.fit_model(there, split.train, given, ComputeSettings(backend="ray", n_workers=n_workers))
        if hp.get("user_power"):
            np.testing.assert_allclose(
                there.B, local.B, atol=1e-6
            )  # weights that are no whole numbers: sums in another order
        else:
            assert np.array_equal(there.B, local.B)
    figures = scale.taken_figures()
    assert (
        {"counts", "sums", "Gram matrix"} <= set(figures.phase)
        and (figures.peak_mib > 50).all()
        and figures[figures.phase == "counts"].rows.sum() == 3 * split.train.shape[0]
    )


def test_a_dual_form_and_a_baseline_are_fitted_here(engine, split):
    for name, hp in (("ease", {"form": "dual"}), ("popularity", {})):
        assert np.array_equal(
            scale.fit_model(create_model(name, **hp), split.train, scale=TWO).score(split.train[:5]),
            create_model(name, **hp).fit(split.train).score(split.train[:5]),
        )


NETS = {
    "mult_vae": {"hidden_dim": 32, "latent_dim": 16, "batch_size": 64, "anneal_steps": 100},
    "elsa": {"rank": 16, "batch_size": 64},
    "autoencoder": {"hidden_dim": 32},
    "mult_dae": {"hidden_dim": 32, "batch_size": 64},
    "recvae": {"hidden_dim": 32, "latent_dim": 16, "batch_size": 64},
}


def difference(one, other):
    return max(float(np.abs(one.weights()[k] - w).max() / max(1, np.abs(w).max())) for k, w in other.weights().items())


@pytest.mark.stress  # the pipeline on Ray trains a net on two workers too
@pytest.mark.parametrize("name", list(NETS))
def test_two_workers_learn_what_one_process_does(engine, split, name, tmp_path):
    local, there, one = (create_model(name, num_epoch=1, **NETS[name]) for _ in range(3))
    alone = training.train(local, split, progress=False)
    together = scale.train(there, split, progress=False, scale=TWO, checkpoints=tmp_path / "kept")
    assert difference(there, local) < 1e-4
    pd.testing.assert_frame_equal(together, alone, rtol=1e-4, check_dtype=False)
    assert set(scale.taken_figures().phase) >= {f"training {name}"}
    assert [p.suffix for p in (tmp_path / "kept").iterdir() if p.suffix != ".json"] == [".safetensors"], (
        "Ray's own notes are left"
    )
    scale.train(one, split, progress=False, scale=ComputeSettings(backend="ray", n_workers=1))
    assert difference(there, one) < 1e-4
    local, there = (create_model(name, num_epoch=1, **NETS[name]) for _ in range(2))
    scale.fit_model(there, split.train, scale=TWO)
    assert difference(there, local.fit(split.train)) < 1e-4
    np.testing.assert_allclose(there.score(split.train[:20]), local.score(split.train[:20]), atol=1e-3)


@pytest.mark.stress
def test_a_killed_worker_of_a_training_is_replaced(engine, split):
    hp = dict(NETS["mult_vae"], num_epoch=30)
    undisturbed = create_model("mult_vae", **hp)
    training.train(undisturbed, split, patience=99, progress=False)
    for trial in range(KILLS):
        model = create_model("mult_vae", **hp)
        killer = Killer("RayTrainWorker", "TrainWorker", after=(1.0, 3.0), seed=trial)
        table = scale.train(model, split, patience=99, progress=False, checkpoint_interval_s=0, scale=TWO)
        assert killer.end(), "nobody was killed"
        assert len(table) == 30 and difference(model, undisturbed) < 1e-3, (
            trial
        )  # thirty epochs: an epoch's 1e-4, many times
        np.testing.assert_allclose(model.score(split.train[:50]), undisturbed.score(split.train[:50]), atol=2e-2)


@pytest.mark.stress
def test_diverging_is_one_line(engine, split):
    model = create_model("recvae", lr=1e20, num_epoch=3, hidden_dim=8, latent_dim=4)
    with pytest.raises(TrainingDiverged) as said:
        scale.train(model, split, progress=False, scale=TWO)
    assert "\n" not in str(said.value)


@pytest.fixture(scope="module")
def bundle(ratings, tmp_path_factory):
    known = Interactions.from_frame(apply_rules(ratings)[0])
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    save_bundle(Recommender(create_model("ease").fit(known.matrix), known.items, known.users, known.matrix), folder)
    return folder


@pytest.mark.slow
def test_lists_are_the_same_files(engine, bundle, tmp_path):
    r = load_bundle(bundle)
    seen = []
    here = r.recommend_batch(folder=tmp_path / "here", k=7, shard_users=50, now=1.7e9)
    there = scale.recommend_batch(
        bundle, folder=tmp_path / "there", k=7, shard_users=50, now=1.7e9, scale=TWO, progress=seen.append
    )
    pd.testing.assert_frame_equal(here, there)
    assert (tmp_path / "here" / "manifest.json").read_bytes() == (
        tmp_path / "there" / "manifest.json"
    ).read_bytes() and seen[-1] == r.n_users
    again = scale.recommend_batch(bundle, folder=tmp_path / "there", k=7, shard_users=50, scale=TWO)
    assert set(again.made) == {"earlier"}
    (tmp_path / "there" / "lists-00001.parquet").unlink()  # what is missing is made again, here or there
    assert r.recommend_batch(folder=tmp_path / "there", k=7, shard_users=50).made.tolist().count("now") == 1
    assert (tmp_path / "here" / "lists-00001.parquet").read_bytes() == (
        tmp_path / "there" / "lists-00001.parquet"
    ).read_bytes()
    some = r.users[5:40:3] + [10**9]  # nobody
    pd.testing.assert_frame_equal(
        scale.recommend_batch(r, some, folder=tmp_path / "some", now=1.7e9, scale=TWO),
        r.recommend_batch(some, folder=tmp_path / "some here", now=1.7e9),
    )
    in_memory = Recommender(r.model, r.items, r.users, r.histories)
    test_error(lambda: scale.recommend_batch(bundle, scale=TWO), "missing_value", "folder")
    test_error(lambda: scale.recommend_batch(in_memory, folder=tmp_path / "x", scale=TWO), "missing_value", "bundle")
    no_list = raised(lambda: scale.recommend_batch(bundle, folder=tmp_path / "x", k=0, scale=TWO))
    assert no_list.code == raised(lambda: scale.check_k(0)).code


def test_a_bundle_that_workers_cannot_load_is_one_line(engine, bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "manifest.json").unlink()
    here = raised(lambda: load_bundle(tmp_path / "bundle"))
    there = raised(lambda: scale.recommend_batch(loaded, folder=tmp_path / "lists", scale=TWO))
    assert (str(there), type(there), there.code, there.where) == (str(here), type(here), here.code, here.where)


@pytest.mark.stress
def test_a_killed_worker_of_a_batch_is_replaced(engine, bundle, tmp_path):
    r = load_bundle(bundle)
    r.recommend_batch(folder=tmp_path / "here", shard_users=2, now=1.7e9)
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "here").glob("*.parquet")}
    for trial in range(KILLS):
        killer = Killer("_Lists", "MapWorker", times=2, after=(0.0, 0.3), seed=trial)
        scale.recommend_batch(bundle, folder=tmp_path / f"there {trial}", shard_users=2, now=1.7e9, scale=TWO)
        assert killer.end(), "nobody was killed"
        assert {p.name: p.read_bytes() for p in (tmp_path / f"there {trial}").glob("*.parquet")} == wanted


@pytest.mark.stress
def test_a_killed_worker_of_a_gram_matrix_is_replaced(engine, split, monkeypatch):
    monkeypatch.setattr(scale, "PANEL_BYTES", 2**16)  # many panels
    wanted = create_model("ease", form="primal").fit(split.train).B
    for trial in range(KILLS):
        killer = Killer("_panel", times=2, after=(0.0, 0.05), seed=trial)
        assert np.array_equal(scale.fit_model(create_model("ease", form="primal"), split.train, scale=TWO).B, wanted)
        assert killer.end(), "nobody was killed"


# --- the pipeline


@pytest.fixture
def short_environ(environ, tmp_path):
    """Variables for pipelines of short notebooks on files of one's own: the named sample is so small that nobody is
    asked.
    """
    short_project(tmp_path / "project")
    (tmp_path / "mine").mkdir()
    shutil.copy(ROOT / "dataset" / "sample" / "ratings.csv", tmp_path / "mine" / "ratings.csv")
    return {**environ, "AEREC_PROJECT": str(tmp_path / "project"), "AEREC_DATA__SOURCE": str(tmp_path / "mine")}


@pytest.mark.slow
def test_the_pipeline_on_ray(short_environ, tmp_path):
    "The same stages, the same run folder, the same figures, and what each worker did."
    environ = {
        **short_environ,
        "AEREC_MODEL__MODELS": "popularity,ease,mult_dae",
        "AEREC_TRAINING__NUM_EPOCH": "2",
        "AEREC_VALIDATION__N_BOOTSTRAP": "100",
        "AEREC_VALIDATION__LECTURE_REPLAY": "off",
    }
    done = {
        e: run(
            BIN / "aerec",
            "run",
            "--backend",
            e,
            "--run",
            e,
            "--to",
            "validation" if STRESS else "training",
            env=environ,
            cwd=tmp_path,
            timeout=500,
        )
        for e in ("local", "ray")
    }
    assert [d.returncode for d in done.values()] == [0, 0], done["ray"].stdout + done["ray"].stderr
    here, there = (tmp_path / "runs" / e for e in done)
    for stage in ("data_import", "business_preprocessing", "model_preprocessing"):
        one, other = (json.loads((f / stage / "manifest.json").read_text())["outputs"] for f in (here, there))
        assert one == other, stage
    if STRESS:
        boards = [pd.read_parquet(f / "validation" / "leaderboard.parquet") for f in (here, there)]
        assert boards[0].model.tolist() == boards[1].model.tolist()
        np.testing.assert_allclose(boards[0].valid_ndcg, boards[1].valid_ndcg, atol=2e-3)
    one, other = (
        {m["name"]: m["valid_ndcg"] for m in json.loads((f / "training" / "summary.json").read_text())}
        for f in (here, there)
    )
    assert one.keys() == other.keys() == {"popularity", "ease", "mult_dae"} and all(
        abs(one[m] - other[m]) < 2e-3 for m in one
    ), (one, other)
    assert {f.parent.name for f in there.glob("*/workers.parquet")} >= {
        "data_import",
        "business_preprocessing",
        "training",
    } and not list(here.glob("*/workers.parquet"))
    page = (there / "index.html").read_text()
    assert (
        "<h2>Workers</h2>" in page
        and "training mult_dae" in page
        and "writing shards" not in page
        and "<h2>Workers</h2>" not in (here / "index.html").read_text()
    )
    assert not left_after(20, environ), "Ray outlives its pipeline"


# --- mistakes


def fails(words, env, cwd):
    done = run(BIN / "aerec", *words, env=env, cwd=cwd)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr, (
        done.stdout + done.stderr
    )
    return done.stderr


@pytest.mark.slow
def test_ray_missing_and_an_address_that_does_not_answer(environ, tmp_path):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE.format(name="ray"))
    assert "aerec_nb[ray]" in fails(["run", "--backend", "ray"], with_path(tmp_path / "hide", environ), tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "over-there"):
        said = fails(["run", "--backend", "ray", "--ray-address", address], environ, tmp_path)
        assert "compute.ray_address" in said and address in said
    assert not Path(environ["AEREC_RUNS_DIR"]).exists()


def with_path(folder, env):
    "Variables with a folder before all others in which Python looks for modules."
    return {**env, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [env.get("PYTHONPATH")])])}


HIDE = """import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == '{name}': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split('.')[0] == '{name}' else find(name, package)
"""


@contextmanager
def cluster(folder, env):
    "The address of a cluster of one machine that somebody else started."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # names of sockets must be short
    short = tempfile.mkdtemp(prefix="ray-")
    address = f"127.0.0.1:{port}"
    head = subprocess.Popen(
        [
            BIN / "ray",
            "start",
            "--head",
            "--block",
            "--port",
            str(port),
            "--num-cpus",
            "2",
            "--include-dashboard",
            "false",
            "--disable-usage-stats",
            "--temp-dir",
            short,
        ],
        env={**env, "RAY_USAGE_STATS_ENABLED": "0"},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for left in reversed(range(20)):
            try:
                scale.check_address(address)
                break  # it listens before it answers
            except AerecError:
                if not left:
                    raise
                time.sleep(1)
        yield address
    finally:
        family = (
            [head.pid, *(p.pid for p in psutil.Process(head.pid).children(recursive=True))]
            if head.poll() is None
            else []
        )
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait(10)
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.stress
def test_a_worker_without_the_package(environ, tmp_path):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE.format(name="aerec_nb"))
    with cluster(tmp_path, with_path(tmp_path / "hide", environ)) as address:
        said = fails(["run", "--backend", "ray", "--ray-address", address], environ, tmp_path)
    assert "aerec_nb[ray]" in said, said
    assert not Path(environ["AEREC_RUNS_DIR"]).exists()


@pytest.mark.stress
def test_a_cluster_that_asks_for_a_token(short_environ, tmp_path):
    "Import and rules on a cluster that somebody else started: with its token, and not with another."
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("a" * 64)
    environ = {**short_environ, "HOME": str(home)}
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HOME", str(home))
        with cluster(tmp_path, {**environ, "RAY_AUTH_MODE": "token"}) as address:
            assert "RAY_AUTH_TOKEN" in fails(
                ["run", "--backend", "ray", "--ray-address", address], {**environ, "RAY_AUTH_TOKEN": "b" * 64}, tmp_path
            )
            assert not Path(environ["AEREC_RUNS_DIR"]).exists()
            done = run(
                BIN / "aerec",
                "run",
                "--backend",
                "ray",
                "--ray-address",
                address,
                "--run",
                "there",
                "--to",
                "business_preprocessing",
                env=environ,
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert workers(""), "a cluster of somebody else goes on when the pipeline has ended"
    assert {f.parent.name for f in (tmp_path / "runs" / "there").glob("*/workers.parquet")} == {
        "data_import",
        "business_preprocessing",
    }
