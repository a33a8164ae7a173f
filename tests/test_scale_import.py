"Import and rules on Ray: the same as in one process, whatever the pieces and shards, and whatever happens to workers."

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import NO_FORKS, ROOT, STRESS, TEST_DATA_DIR, real_data  # noqa: E402

from aerec_nb import business_preprocessing as bp  # noqa: E402
from aerec_nb import data_import as di  # noqa: E402
from aerec_nb import scale  # noqa: E402
from aerec_nb.core.errors import AerecError  # noqa: E402
from aerec_nb.core.plugins import registry  # noqa: E402
from aerec_nb.core.settings import load_settings  # noqa: E402
from aerec_nb.data.interactions import Interactions  # noqa: E402
from aerec_nb.distributed.settings import ComputeSettings  # noqa: E402
from aerec_nb.testing import raised, test_error  # noqa: E402

pytestmark = pytest.mark.xdist_group("ray")
SCALE = ComputeSettings(backend="ray", n_workers=2, object_store_gib=0.5)
LARGE = STRESS and TEST_DATA_DIR  # a million ratings instead of the sample
ALL_RULES = {
    "rules": [
        "deduplicate",
        "excluded_users",
        "excluded_items",
        "time_window",
        "bots",
        "min_positive_rating",
        "min_count",
        "max_interactions_per_user",
        "min_user_interactions",
        "min_item_interactions",
        "k_core",
        "weight_by_rating",
        "time_decay",
    ],
    "excluded_users": ["1", "99999"],
    "excluded_items": ["1", "x"],
    "time_from": "2000-05-01",
    "max_interactions_per_window": 800,
    "max_interactions_per_user": 300,
    "min_user_interactions": 3,
    "min_item_interactions": 5,
    "k_core": 10,
    "weight_by_rating": True,
    "half_life_days": 100,
}


@pytest.fixture(scope="module", autouse=True)
def engine():
    NO_FORKS.append("Ray")
    scale.start_engine(SCALE)
    yield
    scale.stop_engine()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(scale, "PIECE_BYTES", 2**22 if LARGE else 2**18)


@pytest.fixture(scope="module")
def table():
    "A million ratings, or the sample; times are made up, since the stored set has none."
    rng = np.random.default_rng(0)
    file = real_data("data/ml-1m/ratings.csv.gz") if LARGE else io.BytesIO(di._sample_files()["ratings.csv"])
    table = pd.read_csv(file)
    return table.assign(timestamp=956703932 + rng.integers(0, 3 * 10**7, len(table)) // 50 * 50)


def found(path):
    return di._locate(str(path), load_settings(), [Path.cwd()])


def shards_of(table, folder, n=5, kind="parquet"):
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.arange(len(table)), n)):
        path = folder / f"part-{i}.{kind}"
        rows = table.iloc[part]
        rows.to_parquet(path) if kind == "parquet" else rows.to_csv(path, index=False)
    return folder if kind == "parquet" else f"{folder}/*.csv"


def same_checked(local, ours):
    pd.testing.assert_frame_equal(local.ratings, ours.ratings)
    pd.testing.assert_frame_equal(local.bad, ours.bad)
    for k in ("used", "why", "n_later", "n_duplicates", "n_rows", "encoding"):
        assert getattr(local, k) == getattr(ours, k), k
    assert list(local.unused) == list(ours.unused)


def same_interactions(want, got):
    pairs = [(k, getattr(want, k), getattr(got, k)) for k in ("users", "items", "times", "position")] + [
        (k, getattr(want.matrix, k), getattr(got.matrix, k)) for k in ("data", "indices", "indptr")
    ]
    for name, a, b in pairs:
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, name)


def local_interactions(source, rules=None, **options):
    return Interactions.from_frame(bp.apply_rules(di.check_source(source, **options).ratings, rules)[0])


def same_result(a, b):
    for name in ("interactions", "dropped", "negatives"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name))
    pd.testing.assert_frame_equal(a.report, b.report, rtol=1e-12)


@pytest.fixture(scope="module")
def sources(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    table.to_csv(folder / "ratings.csv", index=False)
    return {
        "one": found(folder / "ratings.csv"),
        "csv": found(shards_of(table, folder / "csv", kind="csv")),
        "parquet": found(shards_of(table, folder / "parquet")),
    }


@pytest.mark.parametrize("kind", ["one", "csv", "parquet"])
def test_checked_as_in_one_process(sources, kind):
    if kind == "one":
        assert len(scale.pieces_of(sources[kind])) > 2
    same_checked(di.check_source(sources[kind]), scale.check_source(sources[kind], scale=SCALE))


def test_large_sources_have_categories(sources):
    same_checked(
        di.check_source(sources["one"], chunked_read_mb=1),
        scale.check_source(sources["one"], chunked_read_mb=1, scale=SCALE),
    )


@pytest.mark.parametrize("n", [1, 3, 8] if STRESS else [3])
def test_rules_and_shards(sources, table, tmp_path, n):
    ratings = di.check_source(sources["one"]).ratings
    same_result(bp.run_rules(ratings, ALL_RULES), scale.run_rules(ratings, ALL_RULES, n_partitions=n, scale=SCALE))
    kind = {1: "parquet", 3: "csv", 8: "one"}[n]
    made = scale.import_shards(sources[kind], tmp_path / "all", ALL_RULES, n, scale=SCALE)
    same_interactions(local_interactions(sources[kind], ALL_RULES), made.gather())
    made = scale.import_shards(sources[kind], tmp_path / "defaults", None, n, scale=SCALE)
    same_interactions(local_interactions(sources[kind]), made.gather())
    assert made.n_partitions == n and made.rows(0)[0] == 0 and made.rows(n - 1)[1] == made.n_users
    assert all(made.read(i).shape == (made.rows(i)[1] - made.rows(i)[0], made.n_items) for i in range(n))
    assert {"phase", "node", "pid", "rows", "seconds", "peak_mib"} <= set(made.figures)


SMALL = pd.DataFrame(
    {
        "user_id": [5, 5, 2, 2, 7, 9, 5, 2, 7, 7, 9, 1],
        "item_id": [1, 2, 1, 3, 1, 2, 1, 1, 4, 1, 2, 3],
        "rating": [5.0, 4, 3, 5, 4, 2, 1, 4, 5, 3, 5, 4],
        "timestamp": [9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 11, 12],
    }
)


def same_error(local, ours):
    "Compare the error of the workers with that of a single process."
    assert (ours.code, ours.where, str(ours)) == (local.code, local.where, str(local))


@pytest.mark.parametrize("rule", ["last", "first", "mean", "sum", "raise"])
def test_duplicates_across_shards(tmp_path, rule):
    source = found(shards_of(SMALL, tmp_path / "parts", 4))
    outcomes = []
    for check in (
        lambda: di.check_source(source, on_duplicate=rule),
        lambda: scale.check_source(source, on_duplicate=rule, scale=SCALE),
    ):
        try:
            outcomes.append(check())
        except AerecError as e:
            outcomes.append(e)
    if rule == "raise":
        with pytest.raises(AerecError) as e:
            scale.import_shards(source, tmp_path / "out", n_partitions=2, on_duplicate=rule, scale=SCALE)
        same_error(*outcomes)
        same_error(outcomes[0], e.value)
        return
    same_checked(*outcomes)
    same_interactions(
        local_interactions(source, on_duplicate=rule),
        scale.import_shards(source, tmp_path / "out", n_partitions=2, on_duplicate=rule, scale=SCALE).gather(),
    )


def test_events_are_counted(tmp_path):
    source = found(shards_of(SMALL[["user_id", "item_id"]], tmp_path / "parts", 4))
    same_checked(
        di.check_source(source, on_duplicate="sum"), scale.check_source(source, on_duplicate="sum", scale=SCALE)
    )
    same_interactions(
        local_interactions(source, on_duplicate="sum"),
        scale.import_shards(source, tmp_path / "out", n_partitions=3, on_duplicate="sum", scale=SCALE).gather(),
    )


def test_text_ids_in_one_shard(tmp_path):
    table = SMALL.astype({"user_id": str})
    table.loc[8, "user_id"] = "somebody"
    source = found(shards_of(table, tmp_path / "parts", 4, "csv"))
    same_checked(di.check_source(source), scale.check_source(source, scale=SCALE))
    same_interactions(
        local_interactions(source), scale.import_shards(source, tmp_path / "out", n_partitions=2, scale=SCALE).gather()
    )


def test_bad_rows(tmp_path):
    table = SMALL.astype(str)
    table.loc[7, "rating"] = "nonsense"
    table.loc[4, "user_id"] = ""
    source = found(shards_of(table, tmp_path / "parts", 4, "csv"))
    with pytest.raises(AerecError) as local:
        di.check_source(source)
    with pytest.raises(AerecError) as ours:
        scale.check_source(source, scale=SCALE)
    same_error(local.value, ours.value)
    assert ours.value.code == "bad_rows"
    assert ours.value.problems[["row", "code"]].values.tolist() == [[5, "missing_value"], [8, "not_a_number"]]
    same_checked(
        di.check_source(source, on_invalid="quarantine"),
        scale.check_source(source, on_invalid="quarantine", scale=SCALE),
    )
    made = scale.import_shards(source, tmp_path / "out", n_partitions=2, on_invalid="quarantine", scale=SCALE)
    same_interactions(local_interactions(source, on_invalid="quarantine"), made.gather())
    assert len(pd.read_parquet(tmp_path / "out" / "quarantine.parquet")) == 2


@pytest.mark.parametrize(
    "text, options, code, where",
    [
        ("user_id,item_id\n", {}, "empty_data", "ratings.csv"),
        ("user_id,item_id\n1,2\n", {"on_invalid": "skip"}, "unknown_name", "data.on_invalid"),
        ("user_id,item_id\n1,2\n", {"on_duplicate": "newest"}, "unknown_name", "data.on_duplicate"),
    ],
)
def test_tables_and_options_that_both_ways_refuse(tmp_path, text, options, code, where):
    (tmp_path / "ratings.csv").write_text(text)
    source = found(tmp_path / "ratings.csv")
    with pytest.raises(AerecError) as local:
        di.check_source(source, **options)
    with pytest.raises(AerecError) as ours:
        scale.check_source(source, scale=SCALE, **options)
    assert (local.value.code, local.value.where) == (code, where)
    assert (ours.value.code, str(ours.value)) == (code, str(local.value))


@pytest.mark.parametrize("count, code", [(3e38, "not_a_number"), (0, "empty_data")])
def test_counts_that_are_no_weights(tmp_path, count, code):
    "The sum of the counts of a pair is no float32, or each is 0."
    (tmp_path / "ratings.csv").write_text(f"user_id,item_id,count\n1,2,{count}\n1,2,{count}\n")
    source = found(tmp_path / "ratings.csv")
    rules = {"rules": ["deduplicate"]}
    test_error(lambda: local_interactions(source, rules, on_duplicate="sum"), code)
    out = tmp_path / "out"
    test_error(lambda: scale.import_shards(source, out, rules, n_partitions=1, on_duplicate="sum", scale=SCALE), code)


def test_bad_line_in_a_cut_file(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "PIECE_BYTES", 200)
    lines = ["user_id,item_id,rating"] + [f"{i},{i % 7},4" for i in range(200)]
    lines[150] = "149,3,4,5,6"
    (tmp_path / "ratings.csv").write_text("\n".join(lines))
    source = found(tmp_path / "ratings.csv")
    assert len(scale.pieces_of(source, size=200)) > 5
    with pytest.raises(AerecError) as local:
        di.check_source(source)
    with pytest.raises(AerecError) as ours:
        scale.check_source(source, scale=SCALE)
    same_error(local.value, ours.value)
    assert (ours.value.code, ours.value.where) == ("too_many_fields", "ratings.csv, row 150")
    assert "151" in ours.value.problems.value[0]  # the line, counted through the pieces
    same_checked(
        di.check_source(source, on_invalid="quarantine"),
        scale.check_source(source, on_invalid="quarantine", scale=SCALE),
    )


def test_encoding_of_a_cut_file(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "PIECE_BYTES", 2**17)
    text = "user_id,item_id\n" + "".join(f"{i},abcdefgh\n" for i in range(30_000)) + "1,café\n"
    (tmp_path / "ratings.csv").write_bytes(text.encode("cp1252"))
    source = found(tmp_path / "ratings.csv")
    same_checked(di.check_source(source), scale.check_source(source, scale=SCALE))
    for options in ({}, {"encoding": "utf-8"}):
        if not options:
            (tmp_path / "ratings.csv").write_bytes((text + "2,ééé\n").encode() + b"3,\xff\n")
        with pytest.raises(AerecError) as local:
            di.check_source(source, **options)
        with pytest.raises(AerecError) as ours:
            scale.check_source(source, scale=SCALE, **options)
        same_error(local.value, ours.value)
        assert ours.value.code == "wrong_encoding"


def test_as_of(tmp_path):
    source = found(shards_of(SMALL, tmp_path / "parts", 4))
    same_checked(di.check_source(source, as_of=6), scale.check_source(source, as_of=6, scale=SCALE))
    with pytest.raises(AerecError) as local:
        di.check_source(source, as_of=0)
    with pytest.raises(AerecError) as ours:
        scale.check_source(source, as_of=0, scale=SCALE)
    same_error(local.value, ours.value)
    assert ours.value.code == "nothing_known"


def test_rules_of_ones_own():
    seen = []
    try:

        @bp.register_rule("no_thirds")
        def no_thirds(ratings):
            seen.append(len(ratings))
            return np.arange(len(ratings)) % 3 != 0

        @bp.register_rule("two_each", user_local=True)
        def two_each(ratings):
            return ratings.groupby("user_id", observed=True).cumcount() < 2

        rules = {"rules": ["min_positive_rating", "no_thirds", "two_each"], "min_positive_rating": 4}
        ratings = di.check_ratings(SMALL, "small").ratings
        same_result(bp.run_rules(ratings, rules), scale.run_rules(ratings, rules, n_partitions=3, scale=SCALE))
        assert seen[0] == seen[1]  # all rows in one place

        @bp.register_rule("of_numbers", user_local=True)
        def of_numbers(ratings):
            return np.ones(len(ratings), int)

        rules = {"rules": ["of_numbers"]}
        with pytest.raises(AerecError) as local:
            bp.run_rules(ratings, rules)
        with pytest.raises(AerecError) as ours:
            scale.run_rules(ratings, rules, n_partitions=3, scale=SCALE)
        same_error(local.value, ours.value)
        assert "of_numbers" in str(ours.value) and "int64" in str(ours.value)
    finally:
        for name in ("no_thirds", "two_each", "of_numbers"):
            registry("rules").added.pop(name, None)


def test_rules_that_leave_nothing():
    ratings = di.check_ratings(SMALL, "small").ratings
    for rules in (
        {"min_positive_rating": 5, "min_user_interactions": 50},
        {"k_core": 50},
        {"rules": ["weight_by_rating"], "weight_by_rating": True},
    ):
        frame = ratings.assign(rating=ratings.rating - 3) if "weight_by_rating" in rules else ratings
        with pytest.raises(AerecError) as local:
            bp.run_rules(frame, rules)
        with pytest.raises(AerecError) as ours:
            scale.run_rules(frame, rules, n_partitions=3, scale=SCALE)
        same_error(local.value, ours.value)
        assert ours.value.code == ("rating_not_positive" if "weight_by_rating" in rules else "no_interactions")


def test_what_cannot_be_read_is_one_line(tmp_path):
    source = found(shards_of(SMALL, tmp_path / "parts", 4))
    whole = (tmp_path / "parts" / "part-2.parquet").read_bytes()
    damaged = bytearray(whole)
    damaged[10:60] = bytes(50)
    for broken in (whole[: len(whole) // 2], bytes(damaged)):
        (tmp_path / "parts" / "part-2.parquet").write_bytes(broken)
        for do in (
            lambda: scale.check_source(source, scale=SCALE),
            lambda: scale.import_shards(source, tmp_path / "out", scale=SCALE),
        ):
            error = raised(do)
            assert (error.code, error.where) == ("damaged_file", "part-2.parquet") and "\n" not in str(error)
    texts = found(shards_of(SMALL, tmp_path / "texts", 3, "csv"))
    (tmp_path / "texts" / "part-1.csv").write_text("who,what\n1,2\n")
    test_error(lambda: scale.check_source(texts, scale=SCALE), "shape_mismatch", "part-1.csv")
    (tmp_path / "texts" / "part-1.csv").write_bytes(b"user_id,item_id,rating,timestamp\n1,\x9d,3,4\n")
    error = raised(lambda: scale.check_source(texts, scale=SCALE))
    assert (error.code, error.where) == ("wrong_encoding", "part-1.csv, line 2") and "0x9d" in str(error)
    elsewhere = di.Source("events", "a log", SimpleLog())
    test_error(lambda: scale.check_source(elsewhere, scale=SCALE), "not_supported", "events")


class SimpleLog:
    name = "events"


def test_a_damaged_shard_is_named_and_made_again(tmp_path):
    source = found(shards_of(SMALL, tmp_path / "parts", 4))
    made = scale.import_shards(source, tmp_path / "out", n_partitions=3, scale=SCALE)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.safetensors")}
    same_interactions(
        made.gather(), scale.import_shards(source, tmp_path / "out", n_partitions=3, scale=SCALE).gather()
    )
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.safetensors")}
    path = tmp_path / "out" / made.manifest["shards"][1]["file"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    test_error(lambda: made.read(1), "damaged_file", path.name)
    again = scale.import_shards(source, tmp_path / "out", n_partitions=3, scale=SCALE)
    same_interactions(local_interactions(source), again.gather())
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.safetensors")}
    assert [name for name in before if before[name] != now[name]] == [path.name]


def workers():
    "Processes of Ray's workers that are at something."
    found = []
    for p in psutil.process_iter(["cmdline"]):
        try:
            if (
                (p.info["cmdline"] or [""])[0].startswith("ray::")
                and "IDLE" not in p.info["cmdline"][0]
                and "Agent" not in p.info["cmdline"][0]
                and any(a.pid == os.getpid() for a in p.parents())
            ):
                found.append(p)
        except psutil.Error:
            pass
    return found


@pytest.mark.parametrize("after", np.linspace(0.1, 3, 10 if STRESS else 1).tolist())
def test_a_killed_worker_is_replaced(sources, tmp_path, after):
    killed = []

    def kill():
        time.sleep(after)
        until = time.monotonic() + 20
        while not killed and time.monotonic() < until:
            for p in workers()[:1]:
                try:
                    p.send_signal(signal.SIGKILL)
                    killed.append(p.pid)
                except psutil.Error:
                    pass
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    made = scale.import_shards(sources["one"], tmp_path / "out", ALL_RULES, 4, scale=SCALE)
    killer.join()
    assert killed
    same_interactions(local_interactions(sources["one"], ALL_RULES), made.gather())


@pytest.mark.slow
def test_a_killed_import_goes_on(sources, tmp_path):
    "The process that asked for the import dies when the first shard is there."
    code = f"""
import os, signal, threading, time
from pathlib import Path
from aerec_nb import data_import as di, scale
from aerec_nb.configuration import load_settings
from aerec_nb.distributed.settings import ComputeSettings
def watch():
    while not list(Path({str(tmp_path / "out")!r}).glob('shard-*.json')): time.sleep(.002)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
source = di._locate({str(sources["one"].ratings)!r}, load_settings(), [Path.cwd()])
on_ray = ComputeSettings(backend='ray', object_store_gib=.5)
scale.import_shards(source, {str(tmp_path / "out")!r}, None, 24, scale=on_ray)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    time.sleep(1)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.json")}
    assert before and not (tmp_path / "out" / "manifest.json").exists()
    test_error(lambda: scale.Shards.open(tmp_path / "out"), "missing_file", "manifest.json")
    made = scale.import_shards(sources["one"], tmp_path / "out", None, 24, scale=SCALE)
    same_interactions(local_interactions(sources["one"]), made.gather())
    assert before == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before}
