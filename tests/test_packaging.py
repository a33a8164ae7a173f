"""Bundles that lie, a registry that is killed, a real MLflow server, ONNX against the models, and the Dockerfile.

The Dockerfile runs as plain commands. Loopback only.
"""

import hashlib
import json
import math
import os
import pickle
import pwd
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, STRESS, run, variables
from filelock import FileLock
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix

from aerec_nb.core.errors import AerecError
from aerec_nb.core.settings import default_settings
from aerec_nb.inference import Recommender, Segments, with_cold_items
from aerec_nb.models.cold_start import ColdStartWrapper
from aerec_nb.models.ensemble import Blend
from aerec_nb.models.linear import regularization_path
from aerec_nb.models.registry import create_model, model_names
from aerec_nb.packaging import (
    LoadPolicy,
    Registry,
    _load_folder,
    bundle_id,
    export_onnx,
    key_id,
    load_bundle,
    new_signing_key,
    pack_zip,
    save_bundle,
    sign_bundle,
    unpack_zip,
    verify_bundle,
)
from aerec_nb.postprocessing import Chain
from aerec_nb.release.settings import PackagingSettings
from aerec_nb.testing import raised, test_error

# `make stress` runs the fault trials in full, `make test` a tenth of them
TRIALS = 10 if STRESS else 1
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
PRIVATE, PUBLIC = new_signing_key()
POLICY = PackagingSettings(bundle_keys=[PUBLIC])


def recommender(seed=0, **kw):
    "200 users, 60 items with genres, segments and negatives; another seed, other people."
    rng = np.random.default_rng(seed)
    x = csr_matrix((rng.random((200, 60)) < 0.15 * np.linspace(2, 0.3, 60)).astype(np.float32))
    table = pd.DataFrame(
        {
            "item_id": np.arange(60),
            "title": [f"Film {n}" for n in range(60)],
            "genres": np.resize(["Drama", "Comedy|Drama", "War"], 60),
        }
    )
    segments = Segments.of(
        x, np.arange(200), pd.DataFrame({"user_id": np.arange(200), "country": np.resize(["KR", "NZ"], 200)})
    )
    return Recommender(
        create_model("ease", lam=10.0).fit(x),
        np.arange(60),
        np.arange(200),
        x,
        chain=Chain(banned_items=[3]),
        item_table=table,
        segments=segments,
        times=np.arange(x.nnz),
        negatives=csr_matrix((np.ones(3, bool), ([0, 1, 2], [5, 6, 7])), shape=x.shape),
        **kw,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_bundle(recommender(), tmp_path_factory.mktemp("bundles") / "b", {"name": "films"})


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    "Three signed bundles that differ, with headlines that compare."
    folder = tmp_path_factory.mktemp("bundles")

    def card(n):
        return {
            "name": "films",
            "headline": {"metric": "test NDCG@10", "value": 0.2 + n / 1000, "se": 0.01, "data": "d", "split": "s"},
        }

    return [save_bundle(recommender(n), folder / str(n), card(n), key=PRIVATE) for n in range(3)]


# --- bundles ----------------------------------------------------------------------------------------------------------


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_bundle_gives_back_what_it_was_given(bundle):
    r = recommender()
    back = load_bundle(bundle)
    pd.testing.assert_frame_equal(back.recommend_batch(k=10), r.recommend_batch(k=10))
    assert (
        back.segments.names == ["country=KR", "country=NZ"]
        and (back.segments.matrix != r.segments.matrix).nnz == 0
        and back.segments.sizes.tolist() == [100, 100]
    )
    assert back.recommend(context={"country": "NZ"}).item_ids == r.recommend(context={"country": "NZ"}).item_ids
    assert (back.times == r.times).all() and (back.negatives != r.negatives).nnz == 0
    assert not [p for p in bundle.iterdir() if p.suffix not in (".json", ".md", ".parquet", ".safetensors", ".sha256")]


def test_reference_figures_against_plain_python(bundle):
    ref = load_bundle(bundle).info["reference"]
    r = recommender()
    lists = [r.recommend(user_id=u, k=10).item_ids for u in r.users]
    shown = [i for items in lists for i in items]
    users_of = np.bincount(r.histories.indices, minlength=60)
    genres = [set(g.split("|")) for g in r.item_table.genres]

    def likeness(a, b):
        return len(genres[a] & genres[b]) / np.sqrt(len(genres[a]) * len(genres[b]))

    assert ref["coverage"] == len(set(shown)) / 60 and ref["n_users"] == 200 and ref["fallback_share"] == 0
    assert ref["novelty"] == pytest.approx(np.mean([np.log2(200 / users_of[i]) for i in shown]))
    assert ref["diversity"] == pytest.approx(
        np.mean([np.mean([1 - likeness(a, b) for n, a in enumerate(items) for b in items[:n]]) for items in lists]),
        rel=1e-5,
    )
    x = np.sort(np.bincount(shown, minlength=60))
    assert ref["gini"] == pytest.approx(np.abs(x[:, None] - x[None]).sum() / (2 * 60 * x.sum()))
    scores = [i["score"] for u in r.users for i in r.recommend(user_id=u, k=10).items]
    assert ref["score_quantiles"]["0.5"] == pytest.approx(np.median(scores), rel=1e-5)
    assert (
        ref["history_length"]["users"][4] == sum(8 <= n < 16 for n in np.diff(r.histories.indptr))
        and sum(ref["item_popularity"]["items"]) == 60
    )
    assert ref["item_popularity"]["shown"][5] == sum(16 <= users_of[i] < 32 for i in shown)


def test_no_flipped_byte_goes_unnoticed(bundle, tmp_path):
    rng = random.Random(0)
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    for _n in range(60 * TRIALS):
        p = rng.choice(sorted(copy.iterdir()))
        data = bytearray(p.read_bytes())
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        kept = p.read_bytes()
        p.write_bytes(data)
        if p.name == "manifest.sha256" and at >= 64:
            verify_bundle(copy)  # after the sum only the file's name follows
        else:
            with pytest.raises(AerecError) as e:
                verify_bundle(copy)
            place = "manifest.json" if p.name == "manifest.sha256" else p.name  # the sum stands for the manifest
            assert (e.value.code, e.value.where) == ("changed_file", place) and one_line(e)
        p.write_bytes(kept)
    assert verify_bundle(copy) == bundle_id(bundle)


def test_a_zip_with_a_flipped_byte_is_refused_or_is_the_same_bundle(bundle, tmp_path):
    rng = random.Random(1)
    path = pack_zip(bundle, tmp_path / "b.zip")
    whole = path.read_bytes()
    refused = 0
    for n in range(40 * TRIALS):
        data = bytearray(whole)
        at = (
            rng.randrange(len(data)) if n % 2 else len(data) - 1 - rng.randrange(1500)
        )  # every other one in the list of entries
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            assert verify_bundle(path) == bundle_id(bundle)  # a time, or another field that says nothing
        except AerecError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 20


def add_member(path, name, data=b"x", mode=stat.S_IFREG | 0o644, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "a") as z:
        m = zipfile.ZipInfo(name)
        m.external_attr = mode << 16
        m.compress_type = compress
        z.writestr(m, data)


def patch_last_entry(path, offset, value, form="<I"):
    "Change a field of the last entry of the list at the end of a zip."
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into(form, data, at + offset, value)
    path.write_bytes(data)


@pytest.fixture
def plain(tmp_path):
    "A zipped bundle without segments, so that there is a name to add."
    r = recommender()
    r.segments = None
    return save_bundle(r, tmp_path / "plain.zip", k=5)


def refused(path, code=None, where=None, shows=(), **kw):
    "Check how a bundle is refused; `shows` are names and numbers that the error must have."
    with pytest.raises(AerecError) as e:
        load_bundle(path, **kw)
    assert code in (None, e.value.code) and where in (None, e.value.where), (e.value.code, e.value.where, e.value)
    assert all(s in str(e.value) for s in shows) and one_line(e), str(e.value)


def moves(moved):
    "Where an alias was, and where it is."
    return moved.before, moved.version


def test_zip_bombs(plain):
    bomb = shutil.copy(plain, plain.with_name("bomb.zip"))
    add_member(bomb, "segments.parquet", b"\0" * 2**27, compress=zipfile.ZIP_DEFLATED)  # 128 MiB in 128 KiB
    assert bomb.stat().st_size < 2**20
    refused(bomb, "too_large", "packaging.bundle_limit_mib", ["128", "64"], limit_mib=64)
    patch_last_entry(bomb, 24, 1000)  # it states 1,000 bytes
    refused(bomb, "wrong_size", "segments.parquet", ["1,000"], limit_mib=64)
    patch_last_entry(bomb, 24, 2**27 + 5)
    refused(bomb, "wrong_size", "segments.parquet")


def test_text_that_is_too_long_is_not_read(plain, bundle, tmp_path):
    long = Path(shutil.copytree(bundle, tmp_path / "long"))
    with open(long / "golden.json", "ab") as f:
        f.truncate(2**24 + 1)
    refused(long, "too_large", "golden.json")
    with open(long / "manifest.json", "ab") as f:
        f.truncate(2**24 + 1)
    refused(long, "too_large", "manifest.json")


def test_members_that_a_bundle_has_not(plain):
    for name, mode, code in (
        ("segments.parquet", stat.S_IFLNK | 0o777, "is_link"),
        ("segments.parquet", stat.S_IFIFO | 0o644, "not_a_file"),
        ("../x", stat.S_IFREG, "unsafe_path"),
        ("/x", stat.S_IFREG, "unsafe_path"),
        ("x/y", stat.S_IFREG, "unsafe_path"),
        ("run.py", stat.S_IFREG, "unexpected_file"),
        ("SEGMENTS.parquet", 0, "unexpected_file"),
    ):
        bad = shutil.copy(plain, plain.with_name("bad.zip"))
        add_member(bad, name, mode=mode)
        refused(bad, code, name)
    with pytest.warns(UserWarning, match="Duplicate"):
        add_member(twice := shutil.copy(plain, plain.with_name("twice.zip")), "chain.json")
    refused(twice, "duplicate_name", "chain.json")
    add_member(secret := shutil.copy(plain, plain.with_name("secret.zip")), "segments.parquet")
    patch_last_entry(secret, 8, 1, "<H")
    refused(secret, "encrypted", "segments.parquet")
    (none := plain.with_name("none.zip")).write_bytes(b"PK" * 100)
    refused(none, "damaged_file", str(none))
    assert not (plain.parent.parent / "x").exists() and not [
        p for p in plain.parent.iterdir() if p.name.startswith(".")
    ]


def test_a_zip_that_others_made_is_read(bundle, tmp_path):
    "Packed with deflate, in another order."
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for p in sorted(bundle.iterdir(), reverse=True):
            z.write(p, p.name)
    assert load_bundle(tmp_path / "z.zip").info["id"] == bundle_id(bundle)


# --- the registry -----------------------------------------------------------------------------------------------------


def registry_at(folder, policy=POLICY, **kw):
    return Registry(f"sqlite:///{folder / 'registry.db'}", folder / "bundles", "films", policy=policy, **kw)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    "A registry's file as MLflow makes it, which takes seconds."
    registry_at(folder := tmp_path_factory.mktemp("empty"))
    return folder / "registry.db"


@pytest.fixture
def home(empty, tmp_path):
    "A folder with an empty registry."
    shutil.copy(empty, tmp_path / "registry.db")
    return tmp_path


def in_child(work):
    "Run a function in a process of its own; -> its id."
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def check_whole(folder, before=None, after=None):
    """Everything that is registered verifies, the history ends where the alias points, nothing half made is in the way;
    -> what live is.
    """
    r = registry_at(folder)
    assert (r.verify().result == "ok").all(), r.verify()
    live = r.current("live")
    rows = r._log.rows()
    moves = r.history().query("alias == 'live' and action != 'refuse'")
    assert r._stack("live")[-1] == live and int(moves.to.iloc[-1]) == live, moves
    for p in r.bundles_dir.iterdir() if r.bundles_dir.exists() else ():
        if not p.name.startswith("."):
            assert verify_bundle(p)[:16] == p.name
    assert not [x for x in r.gc().itertuples() if x.bundle in {v.tags["bundle"][:16] for v in r.versions()}]
    if before is not None:
        assert live in (before, after), (live, [tuple(row) for row in rows])
    return live


def test_killed_while_registering_and_promoting(bundles, home):
    "At random moments: the old state or the new one, and the next process goes on from there."
    rng = random.Random(2)
    r = registry_at(home)
    began = time.perf_counter()
    r.register(bundles[0])
    r.promote(1, "live", by="ann")
    usual = time.perf_counter() - began
    live = 1
    deaths = 0
    for n in range(20 * TRIALS):
        target = bundles[n % 2 + 1]

        def work(target=target, n=n):
            mine = registry_at(home)
            version = mine.register(target)
            mine.promote(version, "live", by="bob", why=f"trial {n}")

        child = in_child(work)
        time.sleep(rng.random() * 1.5 * usual)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        deaths += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        known = {v.tags["bundle"]: int(v.version) for v in registry_at(home).versions()}
        live = check_whole(home, live, known.get(bundle_id(target)))
    assert deaths
    r = registry_at(home)
    r.gc(dry_run=False)
    assert not [p for p in r.bundles_dir.iterdir() if p.name.startswith(".")]
    assert r.promote(r.register(bundles[0]), "live", by="ann").version == 1


@pytest.mark.parametrize(
    "where, when",
    [
        ("rename", "before"),
        ("rename", "after"),
        ("create_model_version", "before"),
        ("create_model_version", "after"),
        ("set_registered_model_alias", "before"),
        ("set_registered_model_alias", "after"),
        ("set_model_version_tag", "before"),
        ("set_model_version_tag", "after"),
    ],
)
def test_killed_at_the_worst_moment(bundles, home, where, when):
    "Right before and right after each step that others see."
    r = registry_at(home)
    r.register(bundles[0])
    r.promote(1, "live", by="ann")
    r.register(bundles[1])
    r.promote(2, "live", by="ann")

    def work():
        mine = registry_at(home)
        holder, name = (os, where) if where == "rename" else (mine._mlflow, where)
        do = getattr(holder, name)

        def deadly(*a, **kw):
            if when == "after":
                do(*a, **kw)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(holder, name, deadly)
        if where == "set_model_version_tag":
            mine.archive(1, by="bob")
        else:
            mine.promote(mine.register(bundles[2]), "live", by="bob")

    _, status = os.waitpid(in_child(work), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    live = check_whole(home, 2, 3)
    r = registry_at(home)
    if where == "set_registered_model_alias":
        assert live == (2 if when == "before" else 3)
        assert r.history().action.tolist()[-1] == ("interrupted" if when == "before" else "promote")
    if where == "set_model_version_tag":
        assert ("archived" in r.versions()[0].tags) == (when == "after") and r.history().action.tolist()[-1] == (
            "interrupted" if when == "before" else "archive"
        )
    else:
        r.promote(r.register(bundles[2]), "live", by="ann")
        assert [moves(r.rollback("live", by="ann")) for _ in range(2)] == [(3, 2), (2, 1)]


def test_many_at_once(bundles, home):
    "Each bundle has one version, whoever comes first."
    children = [in_child(lambda b=b: registry_at(home).register(b)) for b in bundles * 2]
    assert [os.waitpid(c, 0)[1] for c in children] == [0] * 6
    assert sorted(int(v.version) for v in registry_at(home).versions()) == [1, 2, 3]


def test_gates_decide(bundles, home):
    r = registry_at(home)
    for b in bundles:
        r.register(b)
    assert r.promote(3, "live", by="ann").gates.result.tolist() == ["passed", "not compared", "passed", "passed"]
    assert r.promote(1, "live", by="ann").gates.result.tolist() == ["passed"] * 4  # .200 is within .202 - 1.96 x .01
    tight = registry_at(home, policy=PackagingSettings(gate_size_mib=0.001, gate_latency_ms=1e-9, bundle_keys=[PUBLIC]))
    refusal = raised(lambda: tight.promote(2, "live", by="bob"))
    assert (refusal.code, refusal.where, refusal.failed) == ("gates_failed", "live", ["latency", "size"])
    assert "1e-09" in refusal.gates[2]["asked"]
    again = pickle.loads(pickle.dumps(refusal))
    assert (str(again), again.where, again.gates) == (str(refusal), "live", refusal.gates)
    test_error(lambda: tight.promote(2, "live", by="bob", why="now", force=True), "never_forced", "live")
    assert tight.promote(2, "dev", by="bob").gates is None and r.current("live") == 1
    last = r.history().iloc[-2]
    written = {g["gate"]: g["result"] for g in json.loads(r._log.rows()[-2].gates)}
    assert last.action == "refuse" and last.by == "bob"
    assert [gate for gate, result in written.items() if result == "failed"] == ["latency", "size"]
    stored = r.resolve(2)
    golden = json.loads((stored / "golden.json").read_text())
    golden[0]["answer"][0][1] += 1
    (stored / "golden.json").write_text(json.dumps(golden))
    test_error(lambda: r.promote(2, "live", by="ann"), "changed_file", "golden.json")


def test_a_registry_of_before_goes_on(bundles, home):
    "Its history has no column for gates, and gets one; rows that are there stay."
    r = registry_at(home)
    r.register(bundles[0])
    r.promote(1, "dev", by="ann")
    del r
    with sqlite3.connect(home / "registry.db") as db:
        db.executescript(
            "CREATE TABLE old AS SELECT * FROM aerec_alias_history; DROP TABLE aerec_alias_history; "
            "DROP TABLE aerec_alias_done; ALTER TABLE old DROP COLUMN gates; "
            "ALTER TABLE old RENAME TO aerec_alias_history;"
        )
    r = registry_at(home)
    assert r.history()[["action", "alias", "to", "gates"]].values.tolist() == [["promote", "dev", 1, ""]]
    with pytest.raises(sqlite3.IntegrityError), sqlite3.connect(home / "registry.db") as db:
        db.execute("UPDATE aerec_alias_history SET why = 'x'")


# --- a real MLflow server ---------------------------------------------------------------------------------------------

SERVER_PINS = ROOT / "tests" / "mlflow_server.txt"


def server_environment():
    "An environment for the server alone, made once and kept beside the tests' own."
    home = Path(sys.prefix) / "mlflow-server"
    ready = home / ".ready"
    wanted = SERVER_PINS.read_text()
    with FileLock(f"{home}.lock", timeout=600):
        if ready.exists() and ready.read_text() == wanted:
            return home
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=120)
        made = subprocess.run(
            [
                home / "bin" / "python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--retries",
                "1",
                "--no-deps",
                "-r",
                SERVER_PINS,
            ],
            capture_output=True,
            text=True,
            timeout=600,
        )
        if made.returncode:
            reason = f"no MLflow server could be installed: {(made.stderr.strip().splitlines() or ['?'])[-1]}"
            if IN_CI:
                pytest.fail(reason)
            pytest.skip(reason)
        ready.write_text(wanted)
    return home


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url, seconds, process, log):
    "Wait until something answers with 200."
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with opener.open(url, timeout=5) as a:
                return a.status == 200
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer: {log.read_text()[-3000:]}")


def end(process):
    "End a process and its children."
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@pytest.fixture
def mlflow_server(tmp_path):
    "The address of a server on a free loopback port, with its own database and artifacts."
    python = server_environment() / "bin" / "python"
    port = free_port()
    log = tmp_path / "server.log"
    (tmp_path / "server").mkdir()
    command = [
        python,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}",
        "--artifacts-destination",
        tmp_path / "server" / "artifacts",
    ]
    env = {
        **variables(tmp_path),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    with open(log, "w") as out:
        server = subprocess.Popen(
            [str(c) for c in command], env=env, cwd=tmp_path / "server", stdout=out, stderr=out, start_new_session=True
        )
    try:
        assert answers(f"http://127.0.0.1:{port}/health", 90, server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(server)


@pytest.mark.slow
@pytest.mark.xdist_group("mlflow")
def test_a_real_mlflow_server_by_its_uri(mlflow_server, bundles, tmp_path, capfd):
    "Two machines, one server: what one registers the other finds, fetches, verifies and serves."
    here, there = (
        Registry(mlflow_server, tmp_path / machine / "bundles", "films", policy=POLICY) for machine in ("here", "there")
    )
    assert [here.register(b) for b in bundles] == [1, 2, 3] and here.register(bundles[1]) == 2
    assert [moves(here.promote(n, "live", by="ann")) for n in (1, 2)] == [(None, 1), (1, 2)]
    assert moves(here.rollback("live", by="bob")) == (2, 1)
    assert here.history().action.tolist() == ["promote", "promote", "rollback"]
    assert there.current("live") == 1 and not (tmp_path / "there" / "bundles").exists()
    assert load_bundle(there.resolve("live")).info["id"] == bundle_id(bundles[0])
    assert there.list().aliases.tolist() == ["live", "", ""] and there.list().value.tolist() == [0.2, 0.201, 0.202]
    assert there.promote(3, "stage", by="eve").gates is not None and here.current("stage") == 3
    here.promote(3, "live", by="ann")
    assert (
        moves(there.rollback("live", by="eve")) == (3, 1)
        and Registry(mlflow_server, tmp_path / "here" / "bundles", "films", policy=POLICY).current("live") == 1
    )
    assert here.history().equals(there.history()) and here.history().action.tolist() == [
        "promote",
        "promote",
        "rollback",
        "promote",
        "promote",
        "rollback",
    ]
    here.archive(2, by="ann", why="old")
    test_error(lambda: there.resolve(2), "archived", "2")
    for n, sign in (
        (4, lambda b: here.sign(4, PRIVATE)),
        (5, lambda b: (sign_bundle(b, PRIVATE), here.register(b))),
    ):  # signed later: the other machine fetches it signed
        unsigned = save_bundle(recommender(n), tmp_path / f"unsigned{n}")
        assert here.register(unsigned) == n
        test_error(lambda n=n: here.promote(n, "live", by="ann"), "not_signed", "signature.json")
        sign(unsigned)
        assert load_bundle(there.resolve(n), settings=default_settings("live", bundle_keys=[PUBLIC])).info[
            "id"
        ] == bundle_id(unsigned)
    for p in (tmp_path / "server" / "artifacts").rglob("*.zip"):
        p.write_bytes(
            pack_zip(bundles[0], tmp_path / "other.zip").read_bytes()
        )  # somebody changes what the server keeps
    shutil.rmtree(tmp_path / "there" / "bundles")
    test_error(lambda: there.resolve(3), "other_bundle", "3")
    said = capfd.readouterr()
    assert not said.out and "Downloading" not in said.err, said
    nowhere = f"{mlflow_server}/nothing"
    test_error(lambda: Registry(nowhere, tmp_path / "x" / "bundles", "films"), "no_answer", "packaging.registry_uri")


# --- bundles that break later -----------------------------------------------------------------------------------------


def reseal(folder):
    "Make the hashes fit again, as any writer of the folder can."
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [p.name for p in folder.iterdir() if p.name not in ("manifest.json", "manifest.sha256", "signature.json")]
    manifest["files"] = {
        name: {
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "bytes": (folder / name).stat().st_size,
        }
        for name in names
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.sha256").write_text(hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())


def document(name, change):
    def mutate(folder):
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return mutate


def arrays(name, change):
    def mutate(folder):
        found = {k: v.copy() for k, v in load_file(folder / name).items()}
        save_file(change(found) or found, folder / name)

    return mutate


def header(change):
    def mutate(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        changed = json.dumps(
            {k: v if k == "__metadata__" else {**v, **change} for k, v in json.loads(raw[8 : 8 + n]).items()}
        ).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + n :])

    return mutate


def table(name, change):
    def mutate(folder):
        change(pd.read_parquet(folder / name)).to_parquet(folder / name, index=False)

    return mutate


def content(name, change):
    def mutate(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return mutate


def put(key, at, value):
    "Set one value of an array."

    def change(found):
        found[key].reshape(-1)[at] = value

    return change


def extra(**more):
    return lambda d: {**d, **more}


def hyper(**more):
    return lambda d: {**d, "hyperparameters": {**d["hyperparameters"], **more}}


GOLDEN = "golden.json"
MODEL = "model.safetensors"
HISTORIES = "histories.safetensors"
CHAIN = "chain.json"
CARD = "card.json"
REFERENCE = "reference.json"
DIFFERENT = ("different_answer", "golden.json")
MUTATIONS = {  # name -> (change, arguments of `refused`; None: it loads, and every list is finite)
    "golden answers altered": (
        document(GOLDEN, lambda d: [{**g, "answer": g["answer"][::-1]} for g in d]),
        DIFFERENT,
    ),
    "golden empty": (document(GOLDEN, lambda d: []), ("out_of_range", GOLDEN)),
    "model poisoned": (arrays(MODEL, lambda d: {**d, "B": -d["B"]}), DIFFERENT),
    "model poisoned, golden emptied": (
        lambda b: (arrays(MODEL, lambda d: {**d, "B": -d["B"]})(b), document(GOLDEN, lambda d: [])(b)),
        ("out_of_range", GOLDEN),
    ),
    "golden asks for very much": (
        document(GOLDEN, lambda d: [{"request": {"history": [50], "k": 10**9}, "answer": []}]),
        ("out_of_range", "golden.json:k"),
    ),
    "golden asks for long lists": (
        document(GOLDEN, lambda d: [{"request": {"exclude": [1] * 100_001}, "answer": []}]),
        ("too_large", GOLDEN),
    ),
    "golden with another argument": (
        document(GOLDEN, lambda d: [{"request": {"evil": 1}, "answer": []}]),
        ("unknown_name", "golden.json:evil"),
    ),
    "golden with a bad argument": (
        document(GOLDEN, lambda d: [{"request": {"history": {"a": 1}}, "answer": []}]),
        (None, None, ["history"]),
    ),
    "golden is no list": (document(GOLDEN, lambda d: {"a": 1}), ("out_of_range", GOLDEN)),
    "weights not numbers": (
        arrays(MODEL, lambda d: {**d, "B": d["B"] * np.float32("nan")}),
        ("out_of_range", "model.safetensors:B"),
    ),
    "a weight not a number": (arrays(MODEL, put("B", 5, np.nan)), ("out_of_range", "model.safetensors:B")),
    "a weight infinite": (arrays(MODEL, put("B", 5, np.inf)), ("out_of_range", "model.safetensors:B")),
    "a weight beyond reason": (arrays(MODEL, put("B", 5, 1e38)), ("out_of_range", "model.safetensors:B")),
    "weights float64": (
        arrays(MODEL, lambda d: {k: v.astype(np.float64) if k == "B" else v for k, v in d.items()}),
        None,
    ),
    "weights int8": (
        arrays(MODEL, lambda d: {k: v.astype(np.int8) for k, v in d.items()}),
        ("not_supported",),
    ),
    "weights flat": (arrays(MODEL, lambda d: {k: v.reshape(-1) for k, v in d.items()}), ("damaged_bundle",)),
    "weights too few": (arrays(MODEL, lambda d: {**d, "B": np.ascontiguousarray(d["B"][:10])}), ("damaged_bundle",)),
    "weights too wide": (
        arrays(MODEL, lambda d: {**d, "B": np.pad(d["B"], ((0, 0), (0, 1)))}),
        ("out_of_range", MODEL),
    ),
    "a method as an array": (arrays(MODEL, extra(score=np.zeros(3, np.float32))), (None, None, ["EASE", "score"])),
    "items of the model": (arrays(MODEL, put("n_items", 0, 59)), (None, None, ["59"])),
    "history index beyond": (
        arrays(HISTORIES, put("indices", 30, 2**31 - 1)),
        (None, "histories.safetensors:indices", ["60"]),
    ),
    "history index negative": (
        arrays(HISTORIES, put("indices", 30, -5)),
        (None, "histories.safetensors:indices", ["60"]),
    ),
    "history indptr falls": (
        arrays(HISTORIES, put("indptr", 5, 2**30)),
        (None, "histories.safetensors:indices", ["indptr"]),
    ),
    "history indptr negative": (
        arrays(HISTORIES, put("indptr", 5, -7)),
        (None, "histories.safetensors:indices", ["indptr"]),
    ),
    "history indptr begins late": (
        arrays(HISTORIES, put("indptr", 0, 1)),
        (None, "histories.safetensors:indices", ["indptr"]),
    ),
    "history indptr empty": (
        arrays(HISTORIES, extra(indptr=np.zeros(0, np.int64))),
        ("missing_value", "histories.safetensors:indptr"),
    ),
    "history data not a number": (
        arrays(HISTORIES, put("data", 30, np.nan)),
        ("out_of_range", "histories.safetensors:data"),
    ),
    "history data large": (arrays(HISTORIES, put("data", 30, 1e12)), ("out_of_range", "histories.safetensors:data")),
    "history data too few": (
        arrays(HISTORIES, lambda d: {**d, "data": d["data"][:-1]}),
        ("out_of_range", "histories.safetensors:data"),
    ),
    "history duplicate index": (
        arrays(HISTORIES, lambda d: put("indices", 1, d["indices"][0])(d)),
        (None, "histories.safetensors:indices"),
    ),
    "history of another type": (
        arrays(HISTORIES, lambda d: {**d, "indices": d["indices"].astype(np.int64)}),
        ("wrong_type", "histories.safetensors:indices"),
    ),
    "history with more": (
        arrays(HISTORIES, extra(evil=np.zeros(1, np.float32))),
        ("wrong_type", "histories.safetensors:evil"),
    ),
    "history without indices": (
        arrays(HISTORIES, lambda d: {k: v for k, v in d.items() if k != "indices"}),
        ("missing_value", "histories.safetensors:indices"),
    ),
    "negatives index beyond": (
        arrays(HISTORIES, put("negatives.indices", 1, 2**31 - 1)),
        (None, "histories.safetensors:negatives.indices"),
    ),
    "features index beyond": (
        arrays(HISTORIES, put("features.indices", 1, 2**31 - 1)),
        (None, "histories.safetensors:features.indices"),
    ),
    "features of other items": (
        arrays(HISTORIES, put("features.shape", 0, 61)),
        ("shape_mismatch", "histories.safetensors:features.shape"),
    ),
    "features very wide": (
        arrays(HISTORIES, put("features.shape", 1, 2**40)),
        ("shape_mismatch", "histories.safetensors:features.shape"),
    ),
    "features data infinite": (
        arrays(HISTORIES, put("features.data", 1, np.inf)),
        ("out_of_range", "histories.safetensors:features.data"),
    ),
    "features data large": (
        arrays(HISTORIES, put("features.data", 1, 1e12)),
        ("out_of_range", "histories.safetensors:features.data"),
    ),
    "times too few": (
        arrays(HISTORIES, lambda d: {**d, "times": d["times"][:-1]}),
        ("out_of_range", "histories.safetensors:times"),
    ),
    "times beyond reason": (arrays(HISTORIES, put("times", 3, 2**62)), ("out_of_range", "histories.safetensors:times")),
    "popularity not a number": (
        arrays(HISTORIES, put("popularity", 3, np.nan)),
        ("out_of_range", "histories.safetensors:popularity"),
    ),
    "popularity negative": (
        arrays(HISTORIES, put("popularity", 3, -1)),
        ("out_of_range", "histories.safetensors:popularity"),
    ),
    "popularity too short": (
        arrays(HISTORIES, lambda d: {**d, "popularity": d["popularity"][:-1]}),
        ("out_of_range", "histories.safetensors:popularity"),
    ),
    "safetensors huge shape": (header({"shape": [2**40, 2**20]}), ("shape_mismatch",)),
    "safetensors place beyond": (header({"data_offsets": [0, 2**50]}), ("missing_value",)),
    "safetensors overlapping": (
        header({"data_offsets": [0, 4], "shape": [1], "dtype": "F32"}),
        ("shape_mismatch", MODEL),
    ),
    "safetensors other type": (header({"dtype": "F8_E4M3"}), ("not_supported",)),
    "safetensors long header": (content(MODEL, lambda b: b"\xff" * 8 + b[8:]), ("damaged_file", MODEL)),
    "safetensors cut": (content(MODEL, lambda b: b[:300]), (None, None, [MODEL])),
    "safetensors empty": (content(MODEL, lambda b: b""), ("damaged_file", MODEL)),
    "items cut": (content("items.parquet", lambda b: b[:-100]), ("damaged_file", "items.parquet")),
    "items garbage": (
        content("items.parquet", lambda b: b"PAR1" + b"x" * 1000 + b"PAR1"),
        ("damaged_file", "items.parquet"),
    ),
    "items one fewer": (
        table("items.parquet", lambda t: t.iloc[:-1]),
        ("shape_mismatch", "items.parquet", ["59", "60"]),
    ),
    "items id twice": (
        table("items.parquet", lambda t: t.assign(item_id=[0, *t.item_id[:-1]])),
        ("duplicate_name", "items.parquet:item_id"),
    ),
    "items id missing": (
        table("items.parquet", lambda t: t.assign(item_id=[None, *map(str, t.item_id[1:])])),
        ("wrong_type", "items.parquet:item_id"),
    ),
    "items id float": (
        table("items.parquet", lambda t: t.assign(item_id=t.item_id + 0.5)),
        ("wrong_type", "items.parquet:item_id"),
    ),
    "items without id": (
        table("items.parquet", lambda t: t.drop(columns="item_id")),
        ("missing_column", "items.parquet:item_id"),
    ),
    "items with lists": (
        table("items.parquet", lambda t: t.assign(tags=[["a"]] * 60)),
        ("wrong_type", "items.parquet:tags"),
    ),
    "items infinite": (
        table("items.parquet", lambda t: t.assign(price=np.inf)),
        ("out_of_range", "items.parquet:price"),
    ),
    "items column popularity": (table("items.parquet", lambda t: t.assign(popularity=np.nan)), None),
    "items with a bomb of text": (
        table("items.parquet", lambda t: t.assign(title="x" * 10**7)),
        ("too_large", "items.parquet"),
    ),
    "items with many columns": (
        table("items.parquet", lambda t: t.assign(**{f"c{n}": 1 for n in range(1001)})),
        ("too_large", "items.parquet"),
    ),
    "titles html": (table("items.parquet", lambda t: t.assign(title="<img src=x onerror=alert(1)>")), None),
    "users id is a list": (
        table("users.parquet", lambda t: t.assign(user_id=[[1]] * len(t))),
        ("wrong_type", "users.parquet:user_id"),
    ),
    "users one more": (
        table("users.parquet", lambda t: pd.DataFrame({"user_id": range(len(t) + 1)})),
        ("shape_mismatch", "users.parquet", ["201", "200"]),
    ),
    "users without id": (
        table("users.parquet", lambda t: t.rename(columns={"user_id": "id"})),
        ("missing_column", "users.parquet:user_id"),
    ),
    "segments with a gap": (
        table("segments.parquet", lambda t: t.assign(segment=None)),
        ("missing_value", "segments.parquet"),
    ),
    "segments not named": (
        table("segments.parquet", lambda t: t.assign(segment="KR")),
        ("wrong_type", "segments.parquet"),
    ),
    "segments item beyond": (
        table("segments.parquet", lambda t: t.assign(item=t.item + 1)),
        ("out_of_range", "segments.parquet"),
    ),
    "segments twice": (table("segments.parquet", lambda t: pd.concat([t, t])), ("duplicate_name", "segments.parquet")),
    "segments many": (
        table("segments.parquet", lambda t: t.iloc[np.zeros(10**6, int)]),
        ("too_large", "segments.parquet"),
    ),
    "chain steps no list": (document(CHAIN, extra(steps="exclude_seen")), (None, None, ["steps"])),
    "chain without steps": (document(CHAIN, extra(steps=[], banned_items=[])), DIFFERENT),
    "chain option beyond": (
        document(CHAIN, lambda d: {**d, "steps": [*d["steps"], "mmr"], "options": {"mmr": {"diversity": 5}}}),
        (None, None, ["mmr.diversity", "5"]),
    ),
    "chain option of no step": (document(CHAIN, extra(options={"mmr": {}})), (None, None, ["mmr"])),
    "chain seed": (document(CHAIN, extra(seed=1.5)), (None, None, ["seed"])),
    "chain unknown step": (
        document(CHAIN, extra(steps=["exclude_seen", "ban_list", "evil"])),
        (None, None, ["'evil'"]),
    ),
    "model unknown": (document("model.json", extra(name="evil")), (None, None, ["'evil'"])),
    "model of the system": (document("model.json", extra(name="os:system")), (None, None, ["os"])),
    "model with more": (document("model.json", hyper(evil=1)), (None, None, ["'evil'"])),
    "model with bad values": (document("model.json", hyper(lam="x")), (None, None, ["lam", "'x'"])),
    "model other items": (document("model.json", extra(n_items=59)), (None, "histories.safetensors:indices", ["59"])),
    "model very many items": (document("model.json", extra(n_items=10**12)), ("out_of_range", "model.json:n_items")),
    "model is no table": (document("model.json", lambda d: [1]), ("out_of_range", "model.json:n_items")),
    "model.json deep": (
        content("model.json", lambda b: b"[" * 100_000 + b"]" * 100_000),
        ("damaged_file", "model.json"),
    ),
    "card deep": (
        content(CARD, lambda b: b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        ("damaged_file", CARD),
    ),
    "card nested": (content(CARD, lambda b: b'{"a":' * 100 + b"1" + b"}" * 100), ("too_deep", CARD)),
    "card a list": (content(CARD, lambda b: b"[1]"), ("wrong_type", CARD)),
    "card no text": (content("card.md", lambda b: b"\xff"), ("not_text", "card.md")),
    "card not a number": (content(CARD, lambda b: b'{"packed": NaN}'), ("damaged_file", CARD)),
    "card name an object": (document(CARD, extra(name={"a": 1})), ("wrong_type", "card.json:name")),
    "card name html": (document(CARD, extra(name="<img src=x onerror=alert(1)>")), None),
    "card headline": (document(CARD, extra(headline={"metric": "x"})), ("missing_value", "card.json:headline")),
    "versions a list": (content("versions.json", lambda b: b"[1]"), ("wrong_type", "versions.json")),
    "reference without figures": (content(REFERENCE, lambda b: b"{}"), ("missing_value", REFERENCE)),
    "reference without bins": (
        document(REFERENCE, extra(history_length=[])),
        ("out_of_range", "reference.json:history_length.edges"),
    ),
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    "A bundle with everything that a bundle can have."
    features = csr_matrix((np.random.default_rng(0).random((60, 5)) < 0.4).astype(np.float32))
    return save_bundle(recommender(features=features), tmp_path_factory.mktemp("bundles") / "rich", k=5)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bundle_that_is_sealed_again_is_refused_in_one_line_or_works(name, rich, tmp_path):
    change, refusal = MUTATIONS[name]
    folder = Path(shutil.copytree(rich, tmp_path / "b"))
    change(folder)
    reseal(folder)
    if refusal:
        return refused(folder, *refusal)
    r = load_bundle(folder)
    assert all(math.isfinite(item["score"]) for user in r.users for item in r.recommend(user, k=10))
    return None


def test_a_net_is_not_allocated_before_its_arrays_were_looked_at(tmp_path):
    x = recommender().histories
    folder = save_bundle(Recommender(create_model("elsa", rank=4, num_epoch=1).fit(x), np.arange(60)), tmp_path / "b")
    document("model.json", hyper(rank=10**11))(folder)
    reseal(folder)
    refused(folder, shows=["6,000,000,000,000"])


def test_files_that_are_no_files(bundle, tmp_path):
    "Links are not followed, pipes do not block: each file of a bundle in turn, the manifest and its seal too."
    signal.alarm(60)  # a pipe that is opened would wait for ever
    try:
        for name in sorted(p.name for p in bundle.iterdir()):
            for kind, code in (
                (lambda p: p.symlink_to(bundle / p.name), "is_link"),
                (os.mkfifo, "not_a_file"),
                (Path.mkdir, "not_a_file"),
            ):
                folder = Path(shutil.copytree(bundle, tmp_path / f"{name}-{code}", dirs_exist_ok=True))
                (folder / name).unlink()
                kind(folder / name)
                refused(folder, code, name)
                shutil.rmtree(folder)
        for make in (os.mkfifo, Path.touch):
            make(tmp_path / "x")
            refused(tmp_path / "x")
            (tmp_path / "x").unlink()
    finally:
        signal.alarm(0)


def test_a_file_that_becomes_a_link_or_changes_while_it_is_read(bundle, tmp_path, monkeypatch):
    """What is parsed is what was hashed: nothing is read a second time, and a link that takes a file's place is not
    followed.
    """
    from aerec_nb import packaging

    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    expected = load_bundle(bundle).recommend(1, k=5).item_ids
    real = packaging._Files.contents

    def contents(self, name, *args):
        found = real(self, name, *args)
        (folder / name).write_bytes(b"garbage")  # as soon as it was read
        return found

    monkeypatch.setattr(packaging._Files, "contents", contents)
    assert load_bundle(folder).recommend(1, k=5).item_ids == expected
    monkeypatch.undo()
    refused(folder, "changed_file")
    folder = Path(shutil.copytree(bundle, tmp_path / "c"))

    def swapped(self, name, *args):
        (folder / name).unlink()
        (folder / name).symlink_to(bundle / name)
        return real(self, name, *args)

    monkeypatch.setattr(packaging._Files, "contents", swapped)
    refused(folder, "is_link")


def test_columns_of_the_items_are_the_same_after_packing(tmp_path):
    """A column popularity, no column genres, ids of histories in any order: the lists are the same; new items keep the
    column as well.
    """
    rng = np.random.default_rng(3)
    x = csr_matrix((rng.random((30, 12)) < 0.4).astype(np.float32))
    shuffled = csr_matrix(
        (
            x.data,
            np.concatenate([rng.permutation(x.indices[a:b]) for a, b in zip(x.indptr, x.indptr[1:], strict=False)]),
            x.indptr,
        ),
        shape=x.shape,
    )
    table = pd.DataFrame(
        {"item_id": np.arange(12), "popularity": np.arange(12.0), "year": pd.array([1990, None] * 6, "Int64")}
    )
    chain = Chain(
        ["exclude_seen", "ban_list", "filter", "mmr"],
        options={"filter": {"where": {"all": [{"popularity": {"ge": 3}}]}}, "mmr": {"diversity": 0.5}},
    )
    r = Recommender(
        create_model("ease").fit(x),
        np.arange(12),
        np.arange(30),
        shuffled,
        item_table=table,
        chain=chain,
        times=np.arange(x.nnz),
        features=x[:12].T.tocsr()[:, :8],
    )
    back = load_bundle(save_bundle(r, tmp_path / "b", k=4))
    for user in r.users:
        assert back.recommend(user, k=4, now=0.0).items == r.recommend(user, k=4, now=0.0).items

    def times_of(r):
        return {
            (user, item): when
            for user, item, when in zip(
                np.repeat(np.arange(30), np.diff(r.histories.indptr)).tolist(),
                r.histories.indices.tolist(),
                np.asarray(r.times).tolist(),
                strict=True,
            )
        }

    assert times_of(back) == times_of(r)
    more = with_cold_items(r, pd.DataFrame({"item_id": [99], "popularity": [5.0], "year": [1990]}))
    assert 99 in more.catalogue.index.ids and more.catalogue.numbers("popularity")[-1] == 5


def test_what_cannot_be_packed_says_so_and_leaves_nothing(tmp_path):
    x = recommender().histories
    twice = csr_matrix((np.ones(3, np.float32), [1, 1, 2], [0, 3]), shape=(1, 60))
    for r, where in (
        (Recommender(create_model("ease").fit(x), np.arange(60) + 0.5), "items.parquet:item_id"),
        (Recommender(create_model("ease").fit(x), np.arange(60), ["u"], twice), "histories.safetensors:indices"),
        (
            Recommender(
                create_model("ease").fit(x),
                np.arange(60),
                item_table=pd.DataFrame({"item_id": np.arange(60), "price": np.inf}),
            ),
            "items.parquet:price",
        ),
    ):
        with pytest.raises(AerecError) as e:
            save_bundle(r, tmp_path / "b")
        assert e.value.where == where and one_line(e) and not [*tmp_path.iterdir()]
    r = recommender()
    r.recent = object()  # of a running service: it is not packed
    assert load_bundle(save_bundle(r, tmp_path / "b")).n_users == 200


# --- code that a bundle names -----------------------------------------------------------------------------------------

STEPS = """
from pathlib import Path
from aerec_nb.postprocessing import step
from aerec_nb.modeling import Model
Path(__file__).with_suffix('.ran').touch()

@step('even')
def even(candidates, request): return candidates.items % 2 == 0

class Flat(Model):
    fitted = ()
    def _fit(self, train, item_features): pass
    def _score(self, history):
        import numpy as np
        return np.zeros(history.shape, np.float32)
"""
BAD_NAMES = [
    "drop/evil:x",
    ".drop.evil:x",
    "..evil:x",
    "/srv/evil:x",
    "C:\\evil:x",
    "evil.py:x",
    "evil",
    "evil:x",
    "drop.evil:x",
    "os:system",
    "this:x",
    "antigravity:x",
    "xml.dom.minidom:parse",
    "aerec_nb.modeling:Blend",
    "numpy:array",
    "evil:x:y",
    "evil:",
    ":x",
    "",
    "еvil:x",
    "evіl:x",
    "evil\0:x",
    "evil:x\n",
    " evil:x",
    "evil :x",
    "e" * 10**5,
    "e." * 10**4 + "x:y",
    "__main__:x",
    "Ease",
    "ease ",
    None,
    7,
    ["evil:x"],
    {"name": "evil:x"},
]
PLACES = {  # where a name can stand in a bundle
    "step": ("chain.json", lambda d, name: {**d, "steps": [*d["steps"], name]}),
    "option": (
        "chain.json",
        lambda d, name: {**d, "options": {name if isinstance(name, str) else json.dumps(name): {}}},
    ),
    "option value": (
        "chain.json",
        lambda d, name: {
            **d,
            "steps": [*d["steps"], "mmr"],
            "options": {"mmr": {"of": name if name is not None else "evil:x"}},
        },
    ),
    "model": ("model.json", lambda d, name: {**d, "name": name}),
    "member": ("model.json", lambda d, name: {**d, "name": "blend", "hyperparameters": {"members": [name]}}),
    "named member": (
        "model.json",
        lambda d, name: {**d, "name": "blend", "hyperparameters": {"members": [{"name": name}]}},
    ),
    "member of a member": (
        "model.json",
        lambda d, name: {
            **d,
            "name": "blend",
            "hyperparameters": {"members": [{"name": "cold_items", "hyperparameters": {"member": {"name": name}}}]},
        },
    ),
    "cold items": ("model.json", lambda d, name: {**d, "name": "cold_items", "hyperparameters": {"member": name}}),
}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A project with a plugin that nothing names, and the same file where it does not belong; each leaves a mark when
    it is run.
    """
    (tmp_path / "shop" / "drop").mkdir(parents=True)
    for path in ("evil.py", "drop/evil.py"):
        (tmp_path / "shop" / path).write_text(STEPS)
    shutil.copy(tmp_path / "shop" / "evil.py", tmp_path / "evil.py")
    monkeypatch.setenv("AEREC_PROJECT", str(tmp_path / "shop"))
    monkeypatch.chdir(tmp_path / "shop")
    return tmp_path / "shop"


@pytest.mark.parametrize("place", PLACES)
def test_no_name_in_a_bundle_runs_code(place, rich, shop, tmp_path):
    "Neither is anything imported; what is not refused by its pattern is refused because nothing lists or names it."
    name, change = PLACES[place]
    folder = Path(shutil.copytree(rich, tmp_path / "b"))
    kept = (rich / name).read_text()
    before = set(sys.modules)
    for bad in BAD_NAMES:
        (folder / name).write_text(json.dumps(change(json.loads(kept), bad)))
        reseal(folder)
        refused(folder)
    assert not [*tmp_path.rglob("*.ran")]
    assert not {"this", "antigravity", "_aerec_own_evil", "_aerec_own_os", "xml.dom.minidom"} & (
        set(sys.modules) - before
    )


def test_a_plugin_is_run_where_the_operator_lists_or_names_it(shop, tmp_path):
    """The same bundle: refused with the line that would allow it, taken with it, refused again once the file has
    changed.
    """
    x = recommender().histories
    r = Recommender(
        create_model("evil:Flat").fit(x),
        np.arange(60),
        np.arange(200),
        x,
        chain=Chain(["exclude_seen", "ban_list", "evil:even"]),
    )
    folder = save_bundle(r, tmp_path / "b")
    (shop / "evil.ran").unlink()
    sha = hashlib.sha256((shop / "evil.py").read_bytes()).hexdigest()
    for env in ("dev", "test", "stage", "live"):
        refused(
            folder,
            shows=[f'"evil:Flat" = "{sha}"', "[plugins.trusted]", f"config/{env}.toml"],  # the line to write, and where
            settings=default_settings(env, require_signature=False),
        )
    for env in ("stage", "live"):
        refused(
            folder,
            shows=['"evil:Flat"'],
            settings=default_settings(env, require_signature=False, steps=["evil:even"], models=["evil:Flat"]),
        )
    assert not (shop / "evil.ran").exists()
    trusted = {"evil:Flat": sha, "evil:even": sha}
    for settings in (
        default_settings("dev", steps=["evil:even"], models=["evil:Flat"]),
        default_settings("dev", trusted=trusted),
        default_settings("live", trusted=trusted, require_signature=False),
    ):
        back = load_bundle(folder, settings=settings)
        assert {i % 2 for i in back.recommend(1, k=5).item_ids} == {0}
    (shop / "config").mkdir()
    (shop / "config" / "dev.toml").write_text(
        "[plugins.trusted]\n" + "".join(f'"{name}" = "{sha}"\n' for name in trusted)
    )
    assert load_bundle(folder).recommend(1, k=5).item_ids == back.recommend(1, k=5).item_ids
    (
        back.chain.bind(back.catalogue),
        back.chain.with_bans([3]),
    )  # as a service does while it runs: the file is not read again
    (shop / "evil.ran").unlink()
    (shop / "evil.py").write_text(STEPS + "# changed")
    assert back.chain.with_bans([3]).bind(back.catalogue).banned_items == [3]
    refused(folder, shows=["evil.py", "plugins.trusted"])
    assert not (shop / "evil.ran").exists()


def test_the_bytes_that_are_hashed_are_the_bytes_that_run(shop, monkeypatch):
    "A file that changes right after it was read is not read again."
    from aerec_nb.core.custom import load_plugin, using_settings

    good = (shop / "evil.py").read_bytes()
    real = Path.read_bytes
    path = shop / "evil.py"
    reads = []

    def read_bytes(self):
        data = real(self)
        if self == path:
            reads.append(self)
            path.write_text("1/0")
        return data

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with using_settings(
        default_settings("live", trusted={"evil:even": hashlib.sha256(good).hexdigest()}), from_bundle=True
    ):
        assert callable(load_plugin("evil:even", "x"))
    assert reads == [path]
    path.unlink()
    path.write_bytes(good)
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with (
        using_settings(default_settings("dev")),
        pytest.raises(AerecError, match="evil.py.*Permission denied"),
    ):
        load_plugin("evil:even", "x")


# --- signatures -------------------------------------------------------------------------------------------------------


def poisoned(folder, key=None):
    "Other weights with answers made for them: what an attacker who can write the folder makes."
    arrays(MODEL, lambda d: {**d, "B": d["B"] + 50 * np.eye(1, 60, 7, dtype=np.float32)})(folder)
    (folder / "golden.json").write_text(json.dumps([{"request": {"history": [1], "k": 2}, "answer": []}]))
    reseal(folder)
    r = _load_folder(folder, folder, LoadPolicy()).recommender
    (folder / "golden.json").write_text(
        json.dumps(
            [
                {
                    "request": {"history": [1], "k": 2},
                    "answer": [[i["item_id"], i["score"]] for i in r.recommend(history=[1], k=2)],
                }
            ]
        )
    )
    reseal(folder)
    if key:
        sign_bundle(folder, key)
    return folder


def test_a_signature_finds_what_hashes_do_not(bundles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = poisoned(Path(shutil.copytree(bundles[0], tmp_path / "b")))
    assert load_bundle(folder).recommend(history=[1], k=1).item_ids == [7], "without a key that is what is promised"
    monkeypatch.setenv("AEREC_BUNDLE_KEYS", PUBLIC)
    refused(folder, "wrong_signature", "signature.json", [key_id(PUBLIC)])
    theirs, their_public = new_signing_key()
    sign_bundle(folder, theirs)
    refused(folder, "untrusted_key", key_id(their_public))
    (folder / "signature.json").unlink()
    assert load_bundle(folder), "dev does not ask for one"
    for settings in (
        default_settings("live", bundle_keys=[PUBLIC]),
        default_settings("dev", bundle_keys=[PUBLIC], require_signature=True),
    ):
        refused(folder, "not_signed", "signature.json", settings=settings)
    assert (
        load_bundle(bundles[0]).info["id"]
        == load_bundle(bundles[0], settings=default_settings("live", bundle_keys=[PUBLIC])).info["id"]
    )


def test_the_signature_is_checked_before_anything_else_is_read(bundles, tmp_path, monkeypatch):
    from aerec_nb import packaging

    folder = poisoned(Path(shutil.copytree(bundles[0], tmp_path / "b")))
    monkeypatch.setattr(packaging._Files, "contents", lambda *a: pytest.fail("a file was read"))
    refused(folder, "wrong_signature", settings=default_settings("live", bundle_keys=[PUBLIC]))


def test_a_signature_survives_what_is_done_with_bundles(bundles, home):
    """Packed, unpacked, registered as a folder and as a zip, shown, verified, promoted, rolled back; a copy that was
    kept unsigned gets it.
    """
    zipped = pack_zip(bundles[0], home / "b.zip")
    live = default_settings("live", bundle_keys=[PUBLIC])
    (home / "unpacked").mkdir()
    unpack_zip(zipped, home / "unpacked")
    for path in (zipped, home / "unpacked"):
        assert load_bundle(path, settings=live).info["id"] == bundle_id(bundles[0])
    unsigned = Path(shutil.copytree(bundles[1], home / "unsigned"))
    (unsigned / "signature.json").unlink()
    r = registry_at(home)
    assert [r.register(b) for b in (zipped, unsigned)] == [1, 2]
    assert not (r.resolve(2) / "signature.json").exists()
    assert moves(r.promote(1, "live", by="ann")) == (None, 1)
    for refuse in (r.promote, r.check_gates):
        test_error(lambda refuse=refuse: refuse(2, "live"), "not_signed", "signature.json")
    assert r.current("live") == 1 and r.promote(2, "dev", by="ann") and r.register(bundles[1]) == 2
    assert (
        moves(r.promote(2, "live", by="ann")) == (1, 2)
        and (r.verify().result == "ok").all()
        and len(r.show(2))
        and len(r.diff(1, 2))
    )
    assert moves(r.rollback("live", by="ann")) == (2, 1)
    for version in (1, 2):
        assert load_bundle(r.resolve(version), settings=live)
    sign_bundle(unsigned, theirs := new_signing_key()[0])
    careless = registry_at(home, policy=PackagingSettings())
    assert careless.register(unsigned) == 2 and load_bundle(r.resolve(2), settings=live), (
        "a signature that was not verified does not take the place of another"
    )
    r.sign(2, theirs)
    test_error(lambda: r.promote(2, "live", by="ann"), "untrusted_key")
    (r.resolve(1) / "signature.json").unlink()
    assert r.current("live") == 1
    test_error(lambda: r.promote(1, "live", by="ann"), "not_signed", "signature.json")


def test_what_is_registered_is_what_is_loaded(bundles, home, monkeypatch):
    "A folder that is exchanged between the look at its identity and the load."
    r = registry_at(home)
    for b in bundles[:2]:
        r.register(b)
    real = Registry.resolve
    calls = []

    def resolve(self, version):
        folder = real(self, version)
        other = self.bundles_dir / bundle_id(bundles[1])[:16]
        calls.append(folder)
        if len(calls) == 2:
            shutil.rmtree(folder)
            shutil.copytree(other, folder)
        return folder

    monkeypatch.setattr(Registry, "resolve", resolve)
    test_error(lambda: r.promote(1, "dev", by="ann"), "other_bundle", "1")
    monkeypatch.undo()
    test_error(lambda: r.register(bundles[0]), "other_bundle", str(home / "bundles" / bundle_id(bundles[0])[:16]))


def test_a_bundle_that_answers_differently_is_neither_written_nor_promoted(bundles, home, monkeypatch):
    from aerec_nb import packaging

    r = registry_at(home)
    r.register(bundles[0])
    monkeypatch.setattr(packaging, "same_answer", lambda *a: False)
    test_error(lambda: r.promote(1, "dev", by="ann"), "different_answer", "1")
    assert r.verify().code[0] == "different_answer" and r.check_gates(1, "live").result[0] == "failed"
    test_error(lambda: save_bundle(recommender(), home / "b"), "different_answer", "golden.json")
    assert not (home / "b").exists() and not [p for p in home.iterdir() if p.name.startswith(".b")]


def test_a_server_that_is_not_there(bundles, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from aerec_nb import packaging

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = SimpleNamespace(uri=f"http://ann:s3cret@127.0.0.1:{free_port()}", name="films")
    for use, code in (
        (lambda: packaging._upload(registry, bundles[0], "x" * 64), "upload_failed"),
        (
            lambda: packaging._download(registry, SimpleNamespace(run_id="r", version="1"), "x" * 64),
            "download_failed",
        ),
        (lambda: packaging._upload_again(registry, SimpleNamespace(run_id="r"), bundles[0]), "upload_failed"),
    ):
        with pytest.raises(AerecError) as e:
            use()
        assert e.value.code == code and one_line(e) and "s3cret" not in str(e.value)


# --- full disks and missing rights ------------------------------------------------------------------------------------


def in_strange_conditions(work, n_bytes=None, user=None):
    "Call a function in a child in which no file may become larger, or as another user; -> the lines it printed."
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            sys.stdout = open(theirs, "w")  # noqa: SIM115 (open until the child exits)
            if n_bytes is not None:
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (n_bytes, n_bytes)
                )  # as a full disk: writing fails with an error
            if user is not None:
                os.setgroups([])
                os.setgid(user.pw_gid)
                os.setuid(user.pw_uid)
            work()
            code = 0
        except BaseException as e:
            print(f"{type(e).__name__}: {e}")
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(theirs)
    with open(ours) as f:
        said = f.read()
    assert os.waitpid(pid, 0)[1] == 0, said
    return said.splitlines()


def tried(*actions):
    "Make a function that prints how each action ends, as a line of JSON: [result], or [code, place, text]."

    def work():
        for action in actions:
            try:
                print(json.dumps([action()], default=str))
            except AerecError as e:
                print(json.dumps([e.code, e.where, str(e)]))

    return work


def ends(said):
    "Read what `tried` printed."
    found = [json.loads(line) for line in said]
    assert not any("\n" in end[-1] for end in found if len(end) == 3), "one line each"
    return found


def test_a_full_disk(bundles, home, tmp_path):
    """No file may have more than 8 KiB (RLIMIT_FSIZE, which needs no rights): one line each, and nothing half written
    is left.
    """
    r = recommender()
    registry = registry_at(home)
    registry.register(bundles[0])
    (home / "full").mkdir()

    def lists():
        return r.recommend_batch(k=50, folder=home / "full" / "lists")

    said = in_strange_conditions(
        tried(
            lambda: save_bundle(r, home / "full" / "b"),
            lambda: save_bundle(r, home / "full" / "b.zip"),
            lambda: pack_zip(bundles[0], home / "full" / "c.zip"),
            lambda: registry.register(bundles[1]),
            lambda: registry.promote(1, "dev", by="ann"),
            lists,
            lambda: Registry(f"sqlite:///{home / 'full' / 'new.db'}", home / "x", "films"),
            lambda: len(registry.list()),
        ),
        n_bytes=8192,
    )
    found = ends(said)
    assert len(found) == 8 and all(len(end) == 3 for end in found[:7]), said
    assert all(str(home / "full") in end[2] for end in (*found[:3], found[5])), said
    assert found[3][:2] == ["disk_full", str(home / "bundles")], said
    assert found[4][:2] == ["registry_failed", "packaging.registry_uri"], said
    assert found[6][:2] == ["cannot_open", "packaging.registry_uri"] and found[7] == [1], said
    assert not [
        p.name for p in (home / "full").rglob("*") if p.suffix not in (".lock", ".db", ".json") and p.name != "lists"
    ] and not [p for p in (home / "bundles").iterdir() if p.name.startswith(".")]
    assert registry.register(bundles[1]) == 2


def test_a_registry_that_cannot_be_used(home, tmp_path):
    "Garbage, nothing, a folder: refused in one line, and left as it is."
    for name, make, code in (
        ("garbage", lambda p: p.write_bytes(b"garbage" * 1000), "damaged_file"),
        ("empty", Path.touch, "empty_data"),
        ("folder", Path.mkdir, "not_a_file"),
        (
            "page",
            lambda p: p.write_bytes((home / "registry.db").read_bytes()[:100] + b"x" * 100_000),
            "cannot_open",
        ),
    ):
        path = tmp_path / f"{name}.db"
        make(path)
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(AerecError) as e:
            Registry(f"sqlite:///{path}", tmp_path / "x", "films")
        assert e.value.code == code and str(path) in str(e.value)
        assert one_line(e) and (path.read_bytes() if path.is_file() else None) == before
    r = registry_at(home)
    (home / "registry.db").write_bytes(b"garbage" * 10_000)  # while it is used
    for ask in (r.list, r.history, r.versions, lambda: r.resolve("live"), lambda: r.promote(1, "dev")):
        with pytest.raises(AerecError) as e:
            ask()
        assert (e.value.code, e.value.where) == ("registry_failed", "packaging.registry_uri") and one_line(e)


def test_missing_rights(bundles, empty):
    "As a user who may not read or not write: one line each."
    with tempfile.TemporaryDirectory() as d:
        home = Path(d)
        home.chmod(0o755)
        shutil.copy(empty, home / "registry.db")
        r = registry_at(home)
        r.register(bundles[0])
        shutil.copytree(bundles[0], home / "b")
        (home / "b" / "model.json").chmod(0)
        shutil.copytree(bundles[0], home / "shut")
        (home / "shut").chmod(0)
        user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if user is None:
            for p in (home, home / "registry.db", home / "bundles"):
                p.chmod(0o555 if p.is_dir() else 0o444)
        said = in_strange_conditions(
            tried(
                lambda: load_bundle(home / "shut" / "b"),
                lambda: save_bundle(recommender(), home / "new"),
                lambda: pack_zip(bundles[0], home / "new.zip"),
                lambda: load_bundle(home / "b"),
                lambda: load_bundle(home / "shut"),
                lambda: registry_at(home),
                lambda: r.promote(1, "dev", by="ann"),
                lambda: recommender().recommend_batch(folder=home / "lists"),
            ),
            user=user,
        )
        found = ends(said)
        assert len(found) == 8 and all(len(end) == 3 for end in found), said
        assert found[1][:2] == ["not_allowed", str(home / "new")], said
        assert found[3][:2] == ["not_allowed", "model.json"], said
        assert all("permission denied" in found[n][2].lower() for n in (0, 4, 5)), "the system's words"
        for p in (home, home / "bundles", home / "shut"):
            p.chmod(0o755)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def fitted_models():
    "Every model that has a graph, in every form it can take."
    rng = np.random.default_rng(0)
    x = csr_matrix((rng.random((120, 50)) < 0.15).astype(np.float32))
    x.data[:] = rng.random(x.nnz) + 0.5
    features = csr_matrix((rng.random((50, 6)) < 0.3).astype(np.float32))
    few = {n: {"num_epoch": 2} for n in ("autoencoder", "mult_dae", "mult_vae", "recvae", "elsa")}
    made = {n: create_model(n, **few.get(n, {})).fit(x) for n in model_names() if n not in ("blend", "ials")}
    made |= {
        "ease dual": create_model("ease", form="dual").fit(x),
        "rdlae dual": create_model("rdlae", form="dual", user_power=0.3, item_power=0.2).fit(x),
        "ease head": create_model("ease", max_items=20).fit(x),
        "ease head dual": create_model("ease", max_items=20, form="dual").fit(x),
        "ease features": create_model("ease").fit(x, features),
        "mult_dae features": create_model("mult_dae", num_epoch=2).fit(x, features),
        "mult_vae linear": create_model("mult_vae", linear_decoder=True, num_epoch=2).fit(x),
    }
    made |= {
        f"path {n}": m
        for n, m in enumerate(regularization_path(create_model("rdlae", form="dual"), x, lam=[10.0, 100.0]))
    }
    made["blend"] = Blend.from_models([made["ease"], made["mult_dae"], made["popularity"]], [1, 0.5, 0.2])
    likes = csr_matrix(np.vstack([features.toarray(), rng.random((4, 6)) < 0.4, np.zeros((1, 6))]).astype(np.float32))
    made["cold items"] = ColdStartWrapper.wrap(made["ease"], likes)
    made["blend of cold items"] = Blend.from_models([made["cold items"], made["cold items"]], [1, -2])
    return made


def test_onnx_gives_the_scores_of_the_model(tmp_path):
    "For one history, for many, and for an empty one, to a ten-thousandth of the largest score."
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(1)
    for name, m in fitted_models().items():
        history = (rng.random((9, m.n_items)) < 0.2) * (rng.random((9, m.n_items)) + 0.5)
        history[0] = 0
        session = onnxruntime.InferenceSession(
            str(export_onnx(m, tmp_path / "m.onnx")), providers=["CPUExecutionProvider"]
        )
        for rows in (history, history[3:4]):
            want = m.score(csr_matrix(rows.astype(np.float32)))
            (got,) = session.run(["scores"], {"history": rows.astype(np.float32)})
            assert got.dtype == np.float32 and np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), name


def test_onnx_from_a_bundle_ranks_as_it_does(bundle, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    r = load_bundle(bundle)
    (scores,) = onnxruntime.InferenceSession(
        str(export_onnx(r, tmp_path / "m.onnx")), providers=["CPUExecutionProvider"]
    ).run(None, {"history": r.histories[:20].toarray()})
    for user in range(20):
        scores[user][[3, *r.histories[user].indices, *r.negatives[user].indices]] = -np.inf
        assert np.argsort(-scores[user], kind="stable")[:10].tolist() == r.recommend(user, k=10).item_ids


def test_onnx_says_what_it_cannot_do(tmp_path, monkeypatch):
    x = csr_matrix(np.eye(5, dtype=np.float32)[[0, 1, 2, 3, 4, 0]] + np.eye(5, dtype=np.float32)[[1, 2, 3, 4, 0, 2]])
    without_graph = create_model("ials", factors=2, iterations=1).fit(x)
    test_error(lambda: export_onnx(without_graph, tmp_path / "m.onnx"), "not_supported", "ials")
    monkeypatch.setitem(sys.modules, "onnx", None)
    ease = create_model("ease").fit(x)
    test_error(lambda: export_onnx(ease, tmp_path / "m.onnx"), "missing_package", "onnx")
    assert not [*tmp_path.iterdir()]


# --- the container ----------------------------------------------------------------------------------------------------


def instructions(text):
    "A Dockerfile as (instruction, argument) pairs."
    lines = re.sub(
        r"\\\n\s*", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    ).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def test_the_dockerfile_is_of_two_stages_and_ends_without_rights():
    text = (ROOT / "Dockerfile").read_text()
    steps = instructions(text)
    assert [k for k, _ in steps].count("FROM") == 2 and all(
        a.startswith("python:3.11-slim") for k, a in steps if k == "FROM"
    )
    last = steps[max(n for n, (k, _) in enumerate(steps) if k == "FROM") :]
    assert [a for k, a in last if k == "USER"] == ["aerec"] and [
        a for k, a in last if k == "COPY" and "--from=build" in a
    ]
    assert any(k == "HEALTHCHECK" and "/health/ready" in a for k, a in last) and last[-1][0] == "CMD"
    assert not re.search(r"index-url\s+\S*//|https?://(?!127\.0\.0\.1)", text), "no host of a registry"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for k, a in steps:  # what is copied is let in
        if k == "COPY" and "--from" not in a:
            for name in a.split()[:-1]:
                assert any(line.startswith(f"!{name}") for line in ignored) and (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_dockerfile_as_plain_commands(bundle, tmp_path):
    """Its steps one after another in temporary folders, packages borrowed from this environment; its command then
    serves a bundle. What needs root (useradd) is left out.
    """
    places = {
        "/src": tmp_path / "src",
        "/opt/venv": tmp_path / "venv",
        "/app": tmp_path / "app",
        "/data": tmp_path / "data",
    }
    port = free_port()

    def here(text):
        for place, folder in places.items():
            text = re.sub(rf"(?<![\w.]){place}(?![\w])", str(folder), text)
        return text.replace("0.0.0.0", "127.0.0.1").replace("8000", str(port))

    for folder in places.values():
        folder.mkdir() if folder.name != "venv" else None
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("AEREC_") and k not in ("IN_TEST", "VIRTUAL_ENV", "PYTHONPATH")
    }
    folder = None
    stage = 0
    command = None
    health = None
    for k, a in instructions((ROOT / "Dockerfile").read_text()):
        if k == "FROM":
            stage += 1
        elif k == "WORKDIR":
            folder = Path(here(a))
        elif k == "ARG":
            env.setdefault(*a.replace('"', "").split("=", 1))
        elif k == "COPY" and "--from" not in a:
            for name in a.split()[:-1]:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, folder)
        elif k == "RUN" and "useradd" not in a:
            done = subprocess.run(
                ["sh", "-ec", here(a.replace("python -m venv", f"{sys.executable} -m venv"))],
                cwd=folder,
                env={**env, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.returncode == 0, (a, done.stdout[-2000:], done.stderr[-2000:])
            if "-m venv" in a:  # packages that are here already need not be fetched again
                lib = next((tmp_path / "venv").glob("lib/python*/site-packages"))
                (lib / "borrowed.pth").write_text(str(next(Path(sys.prefix).glob("lib/python*/site-packages"))) + "\n")
        elif k == "ENV":
            for pair in shlex.split(a):
                name, value = pair.split("=", 1)
                env[name] = here(value).replace("$PATH", env["PATH"])
        elif k == "HEALTHCHECK":
            health = json.loads(here(a[a.index("[") :]))
        elif k == "CMD":
            command = json.loads(here(a))
    assert stage == 2 and env["AEREC_ENV"] == "live"
    where = run("python", "-c", "import aerec_nb; print(aerec_nb.__file__)", env=env, cwd=tmp_path / "app")
    assert str(tmp_path / "venv") in where.stdout, where
    key = "a-key-that-is-long-enough-to-be-one"
    bundle = shutil.copytree(bundle, tmp_path / "signed")
    env["AEREC_BUNDLE_KEYS"] = PUBLIC
    sign_bundle(bundle, PRIVATE)
    env["AEREC_SERVING__API_KEYS"] = f"read:sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    script = (
        "import sys; from aerec_nb.configuration import load_settings; from aerec_nb.packaging import Registry; "
        "r = Registry.from_settings(load_settings()); "
        "print(r.promote(r.register(sys.argv[1]), 'live', by='release-manager', why='first').version)"
    )
    moved = run("python", "-c", script, bundle, env=env, cwd=tmp_path / "app")
    assert moved.stdout.strip() == "1", moved
    log = tmp_path / "served.log"
    with open(log, "w") as out:
        served = subprocess.Popen(
            [str(tmp_path / "venv" / "bin" / command[0]), *command[1:]],
            env=env,
            cwd=tmp_path / "app",
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        assert answers(f"http://127.0.0.1:{port}/health/ready", 60, served, log)
        assert (
            subprocess.run([str(tmp_path / "venv" / "bin" / health[0]), *health[1:]], env=env, timeout=60).returncode
            == 0
        )
        ask = urllib.request.Request(f"http://127.0.0.1:{port}/v1/recommend/7", headers={"X-API-Key": key})
        assert (
            len(json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(ask, timeout=10))["items"])
            == 10
        )
    finally:
        end(served)
    assert (
        subprocess.run(
            [str(tmp_path / "venv" / "bin" / health[0]), *health[1:]], env=env, timeout=60, capture_output=True
        ).returncode
        != 0
    )
    assert (tmp_path / "data" / "registry.db").exists() and (tmp_path / "data" / "events.db").exists()


def test_text_in_a_zip_that_is_too_long_is_not_unpacked(plain, monkeypatch):
    from aerec_nb import packaging

    monkeypatch.setattr(packaging, "_SMALL", 100)
    error = raised(lambda: load_bundle(plain))
    assert error.code == "too_large" and error.where.endswith((".json", ".md", ".sha256"))


def test_a_zip_whose_data_cannot_be_inflated(plain, monkeypatch):
    def fail(self, n=-1):
        raise zlib.error("Error -3 while decompressing data")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    test_error(lambda: load_bundle(plain), "damaged_file", str(plain))


def test_a_registered_bundle_that_is_gone_or_another_one(bundles, home):
    r = registry_at(home)
    r.register(bundles[0])
    (folder,) = (p for p in (home / "bundles").iterdir() if not p.name.startswith("."))
    folder.rename(home / "elsewhere")
    test_error(lambda: r.promote(1, "dev", by="ann"), "missing_bundle", "1")
    shutil.copytree(bundles[1], folder)
    test_error(lambda: r.promote(1, "dev", by="ann"), "other_bundle", "1")


def test_a_bundle_that_changes_while_it_is_registered(bundles, home, monkeypatch):
    from aerec_nb import packaging

    monkeypatch.setattr(packaging, "verify_bundle", lambda path, *a, **kw: "0" * 64)
    test_error(lambda: registry_at(home).register(bundles[0]), "changed_bundle")
    assert not [p for p in (home / "bundles").glob(".*") if p.is_dir()], "the copy is removed"


def test_a_graph_that_one_onnx_file_cannot_hold():
    from aerec_nb import packaging

    graph = object.__new__(packaging._Graph)
    graph.n_bytes = 2**31
    test_error(lambda: graph.const([1.0]), "too_large")


def test_a_rollback_beside_another_move_is_refused(bundles, home, monkeypatch):
    r = registry_at(home)
    for n in (0, 1):
        r.register(bundles[n])
        r.promote(n + 1, "dev", by="ann")

    def move(self, number, alias):
        monkeypatch.setattr(type(r), "current", lambda self, alias: 99)

    monkeypatch.setattr(type(r), "_load_sound", move)
    test_error(lambda: r.rollback("dev", by="ann"), "moved_meanwhile", "dev")


def test_a_folder_of_a_bundle_that_may_not_be_opened(bundle, monkeypatch):
    from aerec_nb import packaging

    def refuse(path, *options, **named):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(packaging.os, "open", refuse)
        error = raised(lambda: packaging._Files(bundle, bundle))
    assert (error.code, error.where) == ("not_allowed", str(bundle))
