"""Splits cannot leak: properties on random frames, slow independent constructions, and the matrices of other
libraries.
"""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import real_data
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy import sparse

from aerec_nb.core.errors import AerecError
from aerec_nb.core.plugins import registry
from aerec_nb.data.batches import iter_batches
from aerec_nb.data.features import ItemFeatures
from aerec_nb.data.interactions import Interactions
from aerec_nb.data.split_report import split_table
from aerec_nb.data.splits import (
    TEST,
    TEST_INPUT,
    TRAIN,
    UNUSED,
    VALID,
    VALID_INPUT,
    Split,
    make_splitter,
    split_interactions,
)
from aerec_nb.model_preprocessing import AEDataSet
from aerec_nb.testing import test_error

SPLITS = tuple(registry("splitters").names())
TIMED = ("leave_last", "temporal", "rolling")
quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# ---- random frames ----


@st.composite
def frames(draw, times=None, unique_times=False):
    "A small frame: repeated pairs, integers, texts or categories for ids, with or without weights and times."
    n = draw(st.integers(60, 160))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    users = draw(st.integers(4, 14))
    items = draw(st.integers(8, 30))
    frame = pd.DataFrame(
        {"user_id": random.integers(users, size=n) * 7 + 3, "item_id": (random.random(n) ** 2 * items).astype(int) * 5}
    )
    if draw(st.booleans()):
        frame["weight"] = random.integers(1, 5, n).astype(float)
    if draw(st.booleans()) if times is None else times:
        frame["timestamp"] = (
            random.permutation(n) * 3 if unique_times else random.integers(draw(st.sampled_from([12, 1000])), size=n)
        )
    if unique_times:
        frame = frame.drop_duplicates(["user_id", "item_id"])
    kind = draw(st.sampled_from(["int", "text", "category"]))
    if kind != "int":
        frame = frame.assign(user_id="u" + frame.user_id.astype(str), item_id=frame.item_id.astype(str))
    return frame.astype({"user_id": "category", "item_id": "category"}) if kind == "category" else frame


@st.composite
def rules(draw, frame, kinds=SPLITS):
    "A kind of split for a frame, and arguments for it."
    kind = draw(st.sampled_from([k for k in kinds if "timestamp" in frame or k not in TIMED]))
    kw = {"seed": draw(st.integers(0, 1000))}
    if kind == "lecture" or kind in ("holdout", "leave_last") and draw(st.booleans()):
        kw["valid_sample_size"] = draw(st.integers(1, 4))
    elif kind in ("holdout", "leave_last", "temporal", "rolling"):
        kw["holdout_fraction"] = draw(st.sampled_from([0.05, 0.1, 0.25, 0.45]))
    if kind == "strong":
        kw["n_test_users"] = draw(st.integers(1, 2))
    if kind == "rolling":
        kw["n_folds"] = draw(st.integers(1, 3))
        kw["fold"] = draw(st.integers(0, kw["n_folds"] - 1))
    if kind not in ("temporal", "rolling", "strong"):
        kw["short_histories"] = draw(st.sampled_from(["train", "drop"]))
    return kind, kw


def made(data, **kw):
    "A frame, a rule and its split; frames that the rule refuses are passed over."
    frame = data.draw(frames(**{k: v for k, v in kw.items() if k != "kinds"}))
    kind, arguments = data.draw(rules(frame, kw.get("kinds", SPLITS)))
    try:
        return frame, kind, arguments, split_interactions(frame, kind, **arguments)
    except AerecError as e:
        assert "\n" not in str(e)
        assume(False)


def pairs(split, *parts):
    "Pairs of ids that play some parts."
    x = split.interactions
    of = np.isin(split.part, parts)
    return set(zip(x.users[x.rows[of]].tolist(), x.items[x.matrix.indices[of]].tolist(), strict=True))


def named(users, items, matrix):
    row, column = matrix.nonzero()
    return set(zip(np.asarray(users)[row].tolist(), np.asarray(items)[column].tolist(), strict=True))


def last_rows(frame):
    "Each pair's last row: pair -> its place in the frame."
    return {(u, i): n for n, (u, i) in enumerate(zip(frame.user_id.tolist(), frame.item_id.tolist(), strict=True))}


# ---- what must hold for every split ----


@quick
@given(st.data())
def test_every_interaction_plays_one_part_and_none_is_invented(data):
    frame, kind, _, split = made(data)
    everything = [pairs(split, part) for part in range(6)]
    assert sum(map(len, everything)) == len(split.part) == len(last_rows(frame))
    assert set().union(*everything) == set(last_rows(frame))
    x = split.interactions
    for u, i, w, p in zip(
        x.users[x.rows].tolist(),
        x.items[x.matrix.indices].tolist(),
        x.matrix.data.tolist(),
        x.position.tolist(),
        strict=True,
    ):
        assert p == last_rows(frame)[u, i] and w == (frame.weight.iloc[p] if "weight" in frame else 1)
        assert x.times is None or x.times[np.flatnonzero(x.position == p)[0]] == frame.timestamp.iloc[p]
    if kind != "strong":
        assert not (pairs(split, VALID_INPUT, TEST_INPUT))


@quick
@given(st.data())
def test_no_target_leaks(data):
    _, kind, _, split = made(data)
    for s in (split, split.merge_valid_into_train()):
        train = named(s.users, s.items, s.train)
        assert train == pairs(s, TRAIN)
        assert set(s.items.tolist()) == {i for _, i in train} and set(s.users.tolist()) == {u for u, _ in train}, (
            "vocabulary is of train alone"
        )
        for held_out, target, inputs in (
            (s.valid, VALID, (VALID_INPUT,) if kind == "strong" else (TRAIN,)),
            (s.test, TEST, (TEST_INPUT,) if kind == "strong" else (TRAIN, VALID)),
        ):
            if held_out is None:
                continue
            seen = named(held_out.users, s.items, held_out.input)
            target_pairs = named(held_out.users, s.items, held_out.target)
            known = set(s.items.tolist())
            with_history = set(held_out.users.tolist())
            assert not target_pairs & seen and not target_pairs & train and not pairs(s, target) & train
            assert target_pairs == {(u, i) for u, i in pairs(s, target) if i in known and u in with_history}
            assert seen == {(u, i) for u, i in pairs(s, *inputs) if i in known and u in with_history}
            assert (np.diff(held_out.input.indptr) > 0).all() and (held_out.n_targets > 0).all()
            targets_by_user = pd.Series([u for u, _ in pairs(s, target)]).value_counts()
            assert held_out.n_targets.tolist() == [targets_by_user[u] for u in held_out.users.tolist()]
            # who is not target_pairs is counted
            cold = set(targets_by_user.index) - {u for u, i in pairs(s, *inputs) if i in known}
            idle = {u for u, _ in pairs(s, *inputs)} - set(targets_by_user.index)
            assert (held_out.n_without_history, held_out.n_without_target, held_out.n_dropped_targets) == (
                len(cold),
                len(idle),
                int(targets_by_user[list(cold)].sum()),
            )
            assert with_history == set(targets_by_user.index) - cold
            if kind == "strong":
                assert not with_history & set(s.users.tolist())
        table = split_table(s).set_index("part")
        assert (
            table.interactions["test"] == s.test.n_targets.sum()
            and table.unknown_targets["test"] == s.test.n_targets.sum() - s.test.target.nnz
        )
        assert ("left out" in table.index) == (s.part == UNUSED).any()


@quick
@given(st.data())
def test_merging_moves_exactly_the_targets_of_validation(data):
    _, kind, _, split = made(data)
    merged = split.merge_valid_into_train()
    if kind == "strong":
        assert merged is split
        return
    assert merged.valid is None and pairs(merged, TEST) == pairs(split, TEST)
    assert pairs(merged, TRAIN) == pairs(split, TRAIN) | pairs(split, VALID)
    assert pairs(merged, UNUSED) == pairs(split, UNUSED)
    assert merged.fingerprint != split.fingerprint


@quick
@given(st.data())
def test_same_seed_same_split_and_kept_as_it_was(data):
    frame, kind, arguments, split = made(data)
    assert split_interactions(frame.copy(), kind, **arguments).fingerprint == split.fingerprint
    with __import__("tempfile").TemporaryDirectory() as d:
        split.save(d)
        back = Split.load(d)
    assert (
        back.fingerprint == split.fingerprint
        and repr(back) == repr(split)
        and split_table(back).equals(split_table(split))
    )
    assert back.interactions.users.tolist() == split.interactions.users.tolist()
    assert all((getattr(back.test, m) != getattr(split.test, m)).nnz == 0 for m in ("input", "target"))


@pytest.mark.parametrize("kind", SPLITS)
def test_another_seed_is_another_split_where_anything_is_drawn(kind):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "user_id": random.integers(50, size=3000),
            "item_id": random.integers(100, size=3000),
            "timestamp": np.arange(3000),
        }
    ).drop_duplicates(["user_id", "item_id"])
    parts = [pairs(split_interactions(frame, kind, seed=seed), TEST) for seed in (1, 2, 1)]
    assert parts[0] == parts[2] and (parts[0] == parts[1]) == (kind in TIMED)


@quick
@given(st.data())
def test_in_time_nothing_is_learned_from_the_future(data):
    frame, _, arguments, split = made(data, times=True, kinds=("temporal",))
    times = split.interactions.times
    valid, test = split.split_times

    def of(part):
        return times[split.part == part]

    assert of(TRAIN).max() < valid <= of(VALID).min() and of(VALID).max() < test <= of(TEST).min()
    n = max(1, int(arguments["holdout_fraction"] * len(times)))
    assert (split.part == TEST).sum() >= n and (times > test).sum() < n, "the share, and the rest of its first second"
    assert (split.part == VALID).sum() >= n and ((times > valid) & (times < test)).sum() < n
    again = split_interactions(frame, "temporal", test_start=int(test), valid_start=int(valid))
    assert (again.part == split.part).all() and again.split_times == split.split_times


@quick
@given(st.data())
def test_leave_last_takes_the_latest_of_each_user(data):
    frame, _, _, split = made(data, times=True, kinds=("leave_last",))
    x = split.interactions
    for user in range(x.n_users):
        of = np.flatnonzero(x.rows == user)
        in_time = split.part[of[np.lexsort((x.position[of], x.times[of]))]]
        rank = np.select([in_time == VALID, in_time == TEST], [1, 2], 0)
        assert (np.diff(rank) >= 0).all()
        n_test = (in_time == TEST).sum()
        n_valid = (in_time == VALID).sum()
        assert n_test == n_valid and (n_test >= 1) == (len(of) >= 3) and n_test + n_valid < max(1, len(of))


@quick
@given(st.data())
def test_the_order_of_the_file_does_not_matter_where_times_decide(data):
    frame, kind, arguments, split = made(data, times=True, unique_times=True, kinds=TIMED)
    other = split_interactions(frame.sample(frac=1, random_state=data.draw(st.integers(0, 99))), kind, **arguments)
    for part in (TRAIN, VALID, TEST, UNUSED):
        assert pairs(other, part) == pairs(split, part)


# ---- slow constructions, after the rules' own words ----


def slow_lecture(frame, n, seed):
    "Test pairs by the lecture's loop over users in order of first appearance."
    np.random.seed(seed)
    held_out = set()
    for user in frame.user_id.drop_duplicates().tolist():
        items = np.array(frame[frame.user_id == user].item_id.tolist(), dtype=object)
        if len(items) > n:
            held_out |= {(user, i) for i in np.random.choice(items, n, replace=False)}
    return held_out


def slow_strong(frame, n_heldout, seed):
    "train, valid and test of Liang et al. (2018), with sets: (train pairs, (input, target), (input, target))."
    users = sorted(set(frame.user_id.tolist()))
    np.random.seed(seed)
    users = [users[k] for k in np.random.permutation(len(users))]
    train = users[: -2 * n_heldout]
    valid = users[-2 * n_heldout : -n_heldout]
    test = users[-n_heldout:]
    rows = list(zip(frame.user_id.tolist(), frame.item_id.tolist(), strict=True))
    learned = {(u, i) for u, i in rows if u in train}
    known = {i for _, i in learned}
    folds = []
    for held_out in (valid, test):
        np.random.seed(seed)
        seen = set()
        target = set()
        for user in sorted(held_out):
            items = [i for u, i in rows if u == user and i in known]
            drawn = (
                set(np.random.choice(len(items), size=int(0.2 * len(items)), replace=False).tolist())
                if len(items) >= 5
                else set()
            )
            seen |= {(user, i) for k, i in enumerate(items) if k not in drawn}
            target |= {(user, i) for k, i in enumerate(items) if k in drawn}
        folds.append((seen, target))
    return learned, *folds


def once(frame):
    "One row a pair, the last, without categories."
    frame = frame.astype(dict.fromkeys(("user_id", "item_id"), object)) if frame.user_id.dtype == "category" else frame
    return frame[~frame.duplicated(["user_id", "item_id"], keep="last")]


@quick
@given(st.data())
def test_lecture_holds_out_what_the_lecture_holds_out(data):
    # of a repeated pair the last row stays, at its place; users and items keep their numbers by the first
    frame = once(data.draw(frames()))
    n = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 999))
    try:
        split = split_interactions(frame, "lecture", valid_sample_size=n, seed=seed)
    except AerecError:
        assume(False)
    tested = slow_lecture(frame, n, seed)
    rest = frame[[p not in tested for p in zip(frame.user_id, frame.item_id, strict=True)]]
    assert pairs(split, TEST) == tested and split.seeds == {"test": seed, "valid": seed + 1}
    order = (
        frame.user_id.drop_duplicates().tolist()
    )  # a user whom test took wholly does not exist: test leaves at least one item
    assert order == rest.user_id.drop_duplicates().tolist() or set(order) == set(rest.user_id)
    assert pairs(split, VALID) == slow_lecture(
        rest.assign(user_id=pd.Categorical(rest.user_id, order))
        .sort_values("user_id", kind="stable")
        .assign(user_id=lambda f: f.user_id.astype(object)),
        n,
        seed + 1,
    )
    ae = AEDataSet(frame)
    ae.train_valid_split(valid_sample_size=n, seed=seed)
    assert {(ae.idx2user[u], ae.idx2item[i]) for u, v in ae.valid_dict.items() for i in v} == tested


@quick
@given(st.data())
def test_strong_is_the_one_of_liang(data):
    frame = once(data.draw(frames()))
    n = data.draw(st.integers(1, 2))
    seed = data.draw(st.integers(0, 999))
    try:
        split = split_interactions(frame, "strong", n_test_users=n, seed=seed)
    except AerecError:
        assume(False)
    train, (valid_in, valid_out), (test_in, test_out) = slow_strong(frame, n, seed)
    assert pairs(split, TRAIN) == train
    assert (pairs(split, VALID_INPUT), pairs(split, VALID), pairs(split, TEST_INPUT), pairs(split, TEST)) == (
        valid_in,
        valid_out,
        test_in,
        test_out,
    )


# ---- matrices of other libraries ----


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    done = subprocess.run(
        [sys.executable, real_data("reference/splits.py"), folder], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return lambda name: (
        sparse.load_npz(folder / f"{name}.npz") if not name.endswith("ids") else np.load(folder / f"{name}.npz")
    )


def read(name):
    frame = pd.read_csv(real_data("data") / name, usecols=["userId", "movieId", "rating"]).rename(
        columns={"userId": "user_id", "movieId": "item_id"}
    )
    return frame.assign(size=frame.groupby("user_id").item_id.transform("size"))


def same(a, b):
    return a.shape == b.shape and (a != b).nnz == 0


@pytest.mark.data
@pytest.mark.xdist_group("reference")
@pytest.mark.parametrize("name, n", [("P1", 10), ("P1b", 5)])
def test_lecture_gives_the_matrices_of_the_reference(reference, name, n):
    frame = read("ml-latest-small/ratings.csv")
    if name == "P1b":
        frame = frame[frame.rating >= 3]
        frame = frame[frame.groupby("user_id").item_id.transform("size") >= 15]
    split = split_interactions(frame[["user_id", "item_id"]], "lecture", valid_sample_size=n)
    x = split.interactions
    ids = reference(f"{name}_ids")
    train = reference(f"{name}_train")
    test = reference(f"{name}_test")
    assert (x.users == ids["users"]).all() and (x.items == ids["items"]).all()

    def only(*parts):
        return sparse.csr_matrix(
            (np.isin(split.part, parts).astype(np.float32), x.matrix.indices, x.matrix.indptr), x.matrix.shape
        )

    assert same(only(TEST), test) and same(only(TRAIN, VALID), train)
    merged = split.merge_valid_into_train()
    known = np.asarray(train.sum(0)).ravel() > 0
    assert (
        same(merged.train, train[:, known])
        and same(merged.test.input, train[:, known])
        and same(merged.test.target, test[:, known])
    )
    assert (merged.test.n_targets == n).all() and merged.test.n_targets.sum() - merged.test.target.nnz == test[
        :, ~known
    ].nnz


@pytest.mark.data
@pytest.mark.xdist_group("reference")
def test_strong_gives_the_matrices_of_the_reference(reference):
    frame = read("ml-1m/ratings.csv.gz")
    frame = frame[frame.rating >= 4]
    frame = frame[frame.groupby("user_id").item_id.transform("size") >= 5]
    split = split_interactions(frame[["user_id", "item_id"]], "strong", n_test_users=500, seed=98765)
    ids = reference("P3_ids")
    assert (split.users == ids["train"]).all() and (split.items == ids["items"]).all()
    assert (split.valid.users == np.sort(ids["val"])).all() and (split.test.users == np.sort(ids["test"])).all()
    for ours, theirs in (
        (split.train, "train"),
        (split.valid.input, "val_in"),
        (split.valid.target, "val_out"),
        (split.test.input, "test_in"),
        (split.test.target, "test_out"),
    ):
        assert same(ours, reference(f"P3_{theirs}")), theirs


# ---- matrices, vocabularies, batches ----


@quick
@given(frames(), st.integers(0, 2**31))
def test_vocabularies_grow_without_moving(frame, seed):
    random = np.random.default_rng(seed)
    first = frame.iloc[: random.integers(1, len(frame))]
    old = Interactions.from_frame(first)
    new = Interactions.from_frame(frame, users=old.users, items=old.items)
    assert (
        new.users[: old.n_users].tolist() == old.users.tolist()
        and new.items[: old.n_items].tolist() == old.items.tolist()
    )
    plain = Interactions.from_frame(frame)
    assert (
        named(new.users, new.items, new.matrix)
        == named(plain.users, plain.items, plain.matrix)
        == set(last_rows(frame))
    )
    assert new.users.tolist() == plain.users.tolist() and new.items.tolist() == plain.items.tolist(), (
        "a beginning of the file is the beginning of its vocabulary"
    )
    assert sorted(map(repr, new.users.tolist())) == sorted(map(repr, plain.users.tolist()))
    shifted = Interactions.from_frame(first, users=plain.users[::-1], items=plain.items[::-1])
    assert shifted.users.tolist() == plain.users[::-1].tolist() and named(
        shifted.users, shifted.items, shifted.matrix
    ) == set(last_rows(first))


@quick
@given(frames(), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_batches_are_the_rows(frame, batch_size, shuffle, seed):
    m = Interactions.from_frame(frame).matrix
    got = list(iter_batches(m, batch_size, shuffle, seed))
    rows = [
        (i[a:b].tolist(), w[a:b].tolist())
        for i, o, w in got
        for a, b in zip(o.tolist(), [*o.tolist()[1:], len(i)], strict=True)
    ]
    order = np.random.default_rng(seed).permutation(m.shape[0]) if shuffle else range(m.shape[0])
    assert rows == [
        (m.indices[m.indptr[r] : m.indptr[r + 1]].tolist(), m.data[m.indptr[r] : m.indptr[r + 1]].tolist())
        for r in order
    ]
    assert [len(o) for _, o, _ in got] == [min(batch_size, m.shape[0] - s) for s in range(0, m.shape[0], batch_size)]


# ---- a temporal split through the process ----


def test_temporal_split_is_evaluated_and_audited():
    from aerec_nb.data_import import load_ratings
    from aerec_nb.models.registry import create_model
    from aerec_nb.validation import METRICS, audit_leaks, bounds, evaluate

    split = split_interactions(load_ratings("sample"), "temporal")
    for s, on in ((split, "valid"), (split.merge_valid_into_train(), "test")):
        model = create_model("ease", lam=50.0).fit(s.train)
        found = evaluate(model, s, 10, on)
        ends = bounds(s.train, getattr(s, on), 10, on)
        values = [found.metrics[m] for m in METRICS]
        assert all(np.isfinite(v).all() and (v >= 0).all() and (v <= 1).all() for v in values)
        assert ends["random"].mean() < found.mean() < ends["oracle"].mean() <= 1
        assert not audit_leaks(s, model=model, on=on).leaks.any()


def test_stage_makes_the_configured_split_and_features(tmp_path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    from aerec_nb.core.artifacts import open_run
    from aerec_nb.data_import import load_items, load_ratings

    runs = {"env": "test", "runs_dir": str(tmp_path / "runs")}
    items = load_items("sample")
    times = load_ratings("sample").timestamp
    tags = tmp_path / "tags.csv"
    cut = int(times.quantile(0.8))
    pd.DataFrame(
        {
            "userId": 1,
            "movieId": items.item_id.iloc[[0, 0, 1, 1]],
            "tag": ["slow", "late", "Slow", "late"],
            "timestamp": [0, 2**31, 0, 2**31],
        }
    ).to_csv(tags, index=False)
    run = open_run(**runs, split="temporal", test_start=str(cut), tags_file=str(tags), max_categories=3)
    run.quiet = True
    stage = run.execute("model_preprocessing")
    split = Split.load(stage / "split")
    features = ItemFeatures.load(stage / "features")
    assert (
        split.kind == "temporal"
        and split.split_times[1] == cut
        and split.interactions.times[split.part == TRAIN].max() < split.split_times[0]
    )
    assert set(features.items.tolist()) == set(items.item_id) | set(split.interactions.items.tolist()), (
        "cold items have features, too"
    )
    assert "tag=slow" in features.names and "tag=late" not in features.names, "tags of the future are not known"
    assert sum(n.startswith("genres=") for n in features.names) == 4 and "genres=other" in features.names
    assert features.reindex_items(split.items).matrix.shape[0] == split.train.shape[1]
    assert (
        pd.read_parquet(stage / "report.parquet").set_index("part").users_without_history["test"]
        == split.test.n_without_history
    )
    assert run.manifest("model_preprocessing")["settings"]["split.test_start"]["value"] == str(cut)
    no_tags = open_run(**runs, tags_file="nowhere.csv")
    test_error(lambda: no_tags.execute("model_preprocessing"), "missing_file", "split.tags_file")
    too_early = open_run(**runs, split="temporal", test_start="1900-01-01")
    test_error(lambda: too_early.execute("model_preprocessing"), "out_of_range", "split.test_start")


# ---- every registered splitter ----


@quick
@given(st.data())
@pytest.mark.parametrize("kind", SPLITS)
def test_every_splitter_labels_every_interaction_once(kind, data):
    frame = data.draw(frames(times=True if kind in TIMED else None))
    kind, arguments = data.draw(rules(frame, (kind,)))
    interactions = Interactions.from_frame(frame)
    splitter = make_splitter(kind, arguments)
    try:
        split = splitter.split(interactions)
    except AerecError:
        assume(False)

    labels = splitter.label(interactions)
    assert labels.shape == (interactions.nnz,) and labels.dtype == np.int8
    assert set(labels.tolist()) <= {TRAIN, VALID, TEST, VALID_INPUT, TEST_INPUT, UNUSED}
    by_row = dict(zip(interactions.position.tolist(), labels.tolist(), strict=True))
    assert by_row == dict(zip(split.interactions.position.tolist(), split.part.tolist(), strict=True))

    train = pairs(split, TRAIN)
    for held_out, target, inputs in (
        (split.valid, VALID, splitter.valid_input),
        (split.test, TEST, splitter.test_input),
    ):
        targets = pairs(split, target)
        shown = named(held_out.users, split.items, held_out.input)
        scored = named(held_out.users, split.items, held_out.target)
        assert not targets & train and not targets & pairs(split, *inputs)
        assert not scored & shown and scored <= targets and shown <= pairs(split, *inputs)
    assert set(split.items.tolist()) == {item for _, item in train}
    if splitter.is_user_split:
        assert not {user for user, _ in train} & {user for user, _ in pairs(split, VALID, TEST)}
    if splitter.is_time_split:
        times = split.interactions.times
        valid, test = split.split_times
        assert times[split.part == TRAIN].max() < valid <= times[split.part == VALID].min()
        assert times[split.part == VALID].max() < test <= times[split.part == TEST].min()


@quick
@given(st.data())
def test_rolling_folds_follow_one_another(data):
    frame = data.draw(frames(times=True))
    n_folds = data.draw(st.integers(2, 4))
    try:
        folds = [split_interactions(frame, "rolling", n_folds=n_folds, fold=k) for k in range(n_folds)]
    except AerecError:
        assume(False)
    assert (folds[-1].part == split_interactions(frame, "temporal").part).all()
    for earlier, later in zip(folds, folds[1:], strict=False):
        assert ((earlier.part == TEST) == (later.part == VALID)).all()
        assert (np.isin(earlier.part, [TRAIN, VALID]) == (later.part == TRAIN)).all()
        assert (earlier.part[np.isin(later.part, [TEST, UNUSED])] == UNUSED).all()
