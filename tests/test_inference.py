"The recommender under a great many random requests; lists of all users into files, killed and gone on with; new items."

import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, STRESS, variables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from aerec_nb.core.errors import AerecError
from aerec_nb.inference import Recommender, Segments, unrated_items, with_cold_items
from aerec_nb.models.registry import create_model
from aerec_nb.postprocessing import Chain
from aerec_nb.testing import test_error

N_USERS = 300
N_ITEMS = 240
PARTS = 4
REQUESTS = (1_000_000 if STRESS else 12_000) // PARTS
GENRES = ["A", "B", "A|B", "C", "B|C", None, "D"]
FILTERS = {
    None: lambda g, year: True,
    "any": lambda g, year: bool({"A", "C"} & g),
    "all": lambda g, year: year >= 1980,
    "none": lambda g, year: "B" not in g and year < 2005,
    "empty": lambda g, year: "D" in g and year < 1900,
}
SPECS = {
    None: None,
    "any": {"any": [{"genres": ["A", "C"]}]},
    "all": {"all": [{"year": {"ge": 1980}}]},
    "none": {"none": [{"genres": "B"}], "all": [{"year": {"lt": 2005}}]},
    "empty": {"all": [{"genres": "D"}, {"year": {"lt": 1900}}]},
}


def world(model, seed, **kw):
    rng = np.random.default_rng(seed)
    x = csr_matrix((rng.random((N_USERS, N_ITEMS)) < rng.beta(0.4, 3, N_ITEMS)).astype(np.float32))
    x = csr_matrix(
        x.toarray() * (np.arange(N_USERS) > 0)[:, None].astype(np.float32)
    )  # one user of whom nothing is known
    table = pd.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(N_ITEMS)],
            "title": None,
            "genres": [GENRES[n % 7] for n in range(N_ITEMS)],
            "year": [1960 + n % 60 for n in range(N_ITEMS)],
        }
    )
    negatives = csr_matrix((rng.random((N_USERS, N_ITEMS)) < 0.03) & (x.toarray() == 0))
    people = pd.DataFrame({"user_id": [f"u{n}" for n in range(N_USERS)], "country": rng.choice(["KR", "DE"], N_USERS)})
    users = people.user_id.tolist()
    return (
        Recommender(
            model.fit(x),
            table.item_id.tolist(),
            users,
            x,
            item_table=table,
            negatives=negatives,
            segments=Segments.of(x, users, people),
            **kw,
        ),
        table,
        rng,
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_random_requests(part):
    """No banned, seen, filtered or repeated item, never more than k, never fewer than there are: a model and a chain a
    part.
    """
    model = [
        create_model("ease", lam=20.0),
        create_model("item_knn"),
        create_model("mult_dae", hidden_dim=8, num_epoch=2),
        create_model("ials", factors=8),
    ][part]
    steps = [
        ["exclude_seen", "ban_list"],
        ["exclude_seen", "ban_list", "mmr"],
        ["exclude_seen", "ban_list", "calibrate", "explore"],
        ["exclude_seen", "ban_list", "boost", "temper_popularity"],
    ][part]
    options = {
        "mmr": {"pool": 20},
        "calibrate": {"pool": 15},
        "explore": {"slots": [2], "pool": 5},
        "boost": {"rules": [{"items": ["i3", "i9"], "factor": 2.0}]},
        "temper_popularity": {"pool": 30},
    }
    r, table, rng = world(model, part)
    genres = [set(g.split("|")) if isinstance(g, str) else set() for g in table.genres]
    passes = {
        name: np.array([rule(g, y) for g, y in zip(genres, table.year, strict=True)]) for name, rule in FILTERS.items()
    }
    seen = (r.histories.toarray() > 0) | r.negatives.toarray()
    checked = short = 0
    while checked < REQUESTS:
        banned = rng.random(N_ITEMS) < rng.choice([0, 0.05, 0.5])
        r.chain = Chain(
            steps,
            [r.items[n] for n in np.flatnonzero(banned)],
            r.catalogue,
            {s: options[s] for s in steps if s in options},
        )
        batch = []
        expected = []
        for _ in range(250):
            user = int(rng.integers(N_USERS + 5))
            k = int(rng.integers(1, 40))
            name = list(SPECS)[rng.integers(len(SPECS))]
            may = ~banned & passes[name]
            q = {"k": k, "filter": SPECS[name], "draw": int(rng.integers(99))}
            kind = rng.integers(4)
            if kind:
                q["user_id"] = f"u{user}"  # from N_USERS on: unknown
            history = rng.integers(0, N_ITEMS, rng.integers(0, 9)) if kind != 1 else np.array([], int)
            if len(history):
                q["history"] = [f"i{n}" for n in history] + ["unknown"]
            if kind == 0:
                q["context"] = {"country": "KR"}
            left = rng.integers(0, N_ITEMS, 5)
            among = rng.integers(0, N_ITEMS, 60)
            if rng.random() < 0.2:
                q["exclude"] = [f"i{n}" for n in left]
                may = may & ~np.isin(np.arange(N_ITEMS), left)
            if rng.random() < 0.1:
                q["candidates"] = [f"i{n}" for n in among]
                may = may & np.isin(np.arange(N_ITEMS), among)
            if rng.random() < 0.2:
                q["exclude_seen"] = False
            else:
                may = may.copy()
                may[history] = False
                if kind and user < N_USERS:
                    may &= ~seen[user]
            if rng.random() < 0.1:
                q["pins"] = [f"i{rng.integers(N_ITEMS)}"]
            batch.append(q)
            expected.append(may)
        answers = r.recommend_each(batch[:125]) + [r.recommend(**q) for q in batch[125:]]
        for q, may, answer in zip(batch, expected, answers, strict=True):
            ids = answer.item_ids
            assert len(ids) == len(set(ids)) == min(q["k"], int(may.sum())), (q, answer.warnings)
            assert all(may[int(item[1:])] for item in ids), q
            assert (len(ids) < q["k"]) == any(w.code == "fewer_than_k" for w in answer.warnings)
            if "pins" in q and ids and may[int(q["pins"][0][1:])]:
                assert ids[0] == q["pins"][0]
            short += len(ids) < q["k"]
        checked += len(batch)
    assert short > checked / 50  # the hard cases were among them


def nested(depth):
    found = []
    for _ in range(depth):
        found = [found]
    return found


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["\ud800", "\0", "i1", "u1", "x" * 5000, 10**400, 2**63, 1e308, -1e308, 5e-324, float("nan"), float("inf")]
    )
    | st.builds(lambda: 10**5000)
)
ANYTHING = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.lists(st.sampled_from([f"i{n}" for n in range(9)]), max_size=4),
    st.dictionaries(st.text(max_size=3) | st.integers(), SCALARS, max_size=3),
    st.builds(nested, st.sampled_from([3, 50_000])),
    st.sampled_from(
        [
            np.array([1, 2]),
            np.array("i1"),
            np.array([["i1"]]),
            np.array(["?", "??"]),
            np.float32(0.5),
            np.int64(3),
            pd.Series(["i1", "i2"]),
            {"i1", "i2"},
            b"i1",
            object(),
            range(3),
            ("i1", "i2"),
            {1: "i1", "b": "i2"},
            {2**62: "i1"},
            "popular",
            {"country": "KR"},
            {"country": 10**400},
            {"all": [{"year": {"ge": "9999999-01-01"}}]},
            {"any": [{"genres": "A"}]},
            pd.Timestamp(0),
        ]
    ),
)
ARGUMENTS = [
    "user_id",
    "history",
    "k",
    "exclude_seen",
    "exclude",
    "fallback",
    "candidates",
    "filter",
    "pins",
    "diversity",
    "max_per_category",
    "min_score",
    "explain",
    "context",
    "now",
    "draw",
]


@pytest.fixture(scope="module")
def answering():
    "A recommender with every kind of step."
    steps = [
        "exclude_seen",
        "ban_list",
        "available",
        "boost",
        "temper_popularity",
        "freshness",
        "mmr",
        "calibrate",
        "explore",
    ]
    options = {
        "available": {"start": None, "end": None},
        "boost": {"rules": [{"items": ["i3"], "factor": 3, "add": 1.0}]},
        "explore": {"slots": [2], "pool": 5, "temperature": 1e-9},
        "mmr": {"pool": 20},
    }
    return world(create_model("ease", lam=20.0), 0, chain=Chain(steps, ["i5"], None, options))[0]


@settings(
    max_examples=10_000 if STRESS else 100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    given=st.dictionaries(st.sampled_from(ARGUMENTS), ANYTHING, min_size=1, max_size=4),
    how=st.sampled_from(["recommend", "popular", "rank", "similar_items", "each"]),
    what=ANYTHING,
)
def test_any_arguments_give_a_list_of_finite_numbers_or_an_error_of_one_line(answering, given, how, what):
    begin = time.perf_counter()
    r = answering
    if how == "rank":
        given = {name: value for name, value in given.items() if name not in ("k", "candidates")}
    if how == "similar_items":
        given.pop("history", None)
    ask = {
        "recommend": lambda: r.recommend(**given),
        "popular": lambda: r.popular(what, **given),
        "rank": lambda: r.rank(what, **given),
        "similar_items": lambda: r.similar_items(what, **given),
        "each": lambda: r.recommend_each([given])[0],
    }[how]
    try:
        answer = ask()
        json.dumps([answer.items, answer.steps, list(answer.trails.values())], allow_nan=False)
        said = [w.message for w in answer.warnings]
        assert all(re.fullmatch("[a-z_]+", w.code) for w in answer.warnings)
    except AerecError as e:
        said = [str(e)]
    assert all(len(s) < 1000 and "\n" not in s and s.encode() for s in said)
    assert time.perf_counter() - begin < 2


JOB = """
import time
from pathlib import Path
from aerec_nb.packaging import load_bundle
r = load_bundle(Path({bundle!r}))
def progress(n): print(n, flush=True); time.sleep(.004)
r.recommend_batch(k=5, folder=Path({folder!r}), shard_users=7, progress=progress)
"""


@pytest.mark.slow
def test_a_killed_batch_goes_on_where_it_was(tmp_path):
    "kill -9 at many moments: no half shard, finished ones stay, and in the end the lists of the undisturbed job."
    env = {**os.environ, **variables(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rng = np.random.default_rng(0)
    kills = 40 if STRESS else 4
    from aerec_nb.packaging import load_bundle, save_bundle

    bundle = save_bundle(world(create_model("ease", lam=20.0), 0)[0], tmp_path / "bundle", k=5)
    first = []
    for _n in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", JOB.format(bundle=str(bundle), folder=str(tmp_path / "lists"))],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        process.stdout.readline()  # it has begun
        time.sleep(0.1 * rng.random())
        process.kill()
        process.wait()
        process.stdout.close()
        there = sorted(p.name for p in (tmp_path / "lists").glob("lists-*.parquet"))
        assert there[: len(first)] == first, "finished shards stay"
        for name in there:
            assert (
                pd.read_parquet(tmp_path / "lists" / name).user_id.nunique() == 7
                or name == f"lists-{(N_USERS - 1) // 7:05}.parquet"
            )
        first = there
    r = load_bundle(bundle)
    shards = r.recommend_batch(k=5, folder=tmp_path / "lists", shard_users=7)
    assert (shards.made == "earlier").sum() == len(first) and (tmp_path / "lists" / "manifest.json").exists()
    pd.testing.assert_frame_equal(
        pd.concat([pd.read_parquet(tmp_path / "lists" / f) for f in shards.file], ignore_index=True),
        r.recommend_batch(k=5),
        check_dtype=False,
    )
    assert not [
        p
        for p in (tmp_path / "lists").iterdir()
        if p.name.startswith(".lists") and not p.name.endswith(".lock") and p.stat().st_mtime > time.time() - 1
    ]


@pytest.mark.parametrize(
    "name,given",
    [
        ("ease", {"lam": 20.0}),
        ("item_knn", {}),
        ("ials", {"factors": 8}),
        ("mult_vae", {"hidden_dim": 8, "latent_dim": 4, "num_epoch": 2}),
        ("popularity", {}),
    ],
)
def test_new_items_with_every_kind_of_model_and_in_a_bundle(tmp_path, name, given):
    from aerec_nb.packaging import load_bundle, save_bundle

    r, table, _ = world(create_model(name, **given), 1)
    wide = with_cold_items(
        r,
        pd.DataFrame(
            {"item_id": ["new1", "new2"], "title": ["One", "Two"], "genres": ["A|B", None], "year": [1990, None]}
        ),
    )
    for user in ("u0", "u7", "u8", "nobody"):
        old = list(wide.recommend(user, k=20, exclude=["new1", "new2"]).item_ids)
        assert old == r.recommend(user, k=20).item_ids, "the known items keep their order"
    assert {"new1", "new2"} <= set(wide.recommend("u7", k=N_ITEMS + 2).item_ids) and wide.recommend(
        history=["new1"], k=3
    ).fallback_used is False
    back = load_bundle(save_bundle(wide, tmp_path / "b", k=4))
    for user in ("u7", "u8"):
        assert back.recommend(user, k=30).item_ids == wide.recommend(user, k=30).item_ids


def test_new_items_are_found_better_than_by_chance():
    "A tenth of the items is hidden from the model; those who have one of them shall find it above its like by chance."
    rng = np.random.default_rng(3)
    kind = rng.integers(0, 4, 200)  # of items; each person likes one kind
    likes = rng.integers(0, 4, 400)
    x = csr_matrix((rng.random((400, 200)) < np.where(likes[:, None] == kind, 0.3, 0.02)).astype(np.float32))
    table = pd.DataFrame({"item_id": range(200), "genres": [f"K{k}" for k in kind]})
    r = Recommender(
        create_model("ease", lam=10.0).fit(x[:, :180]),
        list(range(180)),
        list(range(400)),
        x[:, :180].tocsr(),
        item_table=table[:180],
    )
    scores = with_cold_items(r, table).model.score(
        csr_matrix((x[:, :180].data, x[:, :180].indices, x[:, :180].indptr), shape=(400, 200))
    )[:, 180:]
    has = x[:, 180:].toarray() > 0
    above = np.concatenate(
        [
            (s[h][:, None] > s[~h]).ravel() + 0.5 * (s[h][:, None] == s[~h]).ravel()
            for s, h in zip(scores, has, strict=True)
            if h.any() and not h.all()
        ]
    )
    assert above.mean() > 0.75


def test_segments_through_the_pipeline(environ, tmp_path):
    import aerec_nb.inference
    import aerec_nb.packaging
    from aerec_nb.core.artifacts import open_run
    from aerec_nb.inference import load_recommender
    from aerec_nb.packaging import load_bundle

    users = pd.read_csv(ROOT / "dataset" / "sample" / "ratings.csv").userId.drop_duplicates()
    (tmp_path / "people.csv").write_text(
        "user_id,country\n" + "\n".join(f"{u},{'KR' if n % 2 else 'DE'}" for n, u in enumerate(users)) + "\n"
    )
    opened = open_run(
        None, env="test", segments_file=str(tmp_path / "people.csv"), cold_items=True, models=["popularity", "ease"]
    )
    opened.execute("inference", build=aerec_nb.inference.build_inference)
    r = load_recommender(opened)
    assert (
        r.segments.names == ["country=DE", "country=KR"]
        and r.recommend("nobody", context={"country": "KR"}).items[0]["source"] == "segment"
    )
    cold = set(pd.read_parquet(opened.artifact_dir("inference") / "cold_items.parquet").item_id)
    assert r.n_items == r.model.model.n_items + len(cold)
    bundle = opened.execute("packaging", build=aerec_nb.packaging.build_packaging) / "bundle"
    served = load_bundle(bundle)
    assert (
        served.items == r.items
        and served.recommend("nobody", k=3, exclude=sorted(cold)).item_ids
        == r.recommend("nobody", k=3, exclude=sorted(cold)).item_ids
    )
    without = open_run(None, env="test", segments_file=str(tmp_path / "none.csv"))
    build = aerec_nb.inference.build_inference
    test_error(lambda: without.execute("inference", build=build), "missing_file", "none.csv")


# ---------------------------------------------------------------- arguments that a client chooses
IDS = [f"i{n}" for n in range(N_ITEMS)]
NUMBERS = [
    float("inf"),
    -float("inf"),
    float("nan"),
    1e999,
    10**400,
    -(10**400),
    2**31,
    2**63,
    2**64,
    -1,
    0,
    0.5,
    1,
    1e308,
    -1e308,
    1e-320,
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(NUMBERS + ["i3", "u5", "KR", "country", "x" * 2000, "\ud800", "9" * 5000])
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["country", "any", "all", "genres", "1", "2"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)
ids = st.lists(st.sampled_from(IDS) | scalars, max_size=9)
USUAL = {
    "user_id": st.sampled_from(["u3", "u9999", None]),
    "history": ids,
    "k": st.integers(1, 40),
    "exclude_seen": st.booleans(),
    "exclude": ids,
    "fallback": st.sampled_from(["popular", "none"]),
    "candidates": ids,
    "filter": st.sampled_from(list(SPECS.values())),
    "pins": ids | st.dictionaries(st.integers(-1, 9) | scalars, st.sampled_from(IDS) | scalars, max_size=4),
    "diversity": st.floats(0, 1),
    "max_per_category": st.integers(1, 3),
    "min_score": st.floats(),
    "explain": st.booleans(),
    "context": st.sampled_from([{"country": "KR"}, {"country": "KP"}]),
    "now": st.floats(0, 2e9),
    "draw": st.integers(),
}


@st.composite
def requests(draw):
    "Some arguments of `recommend`, each usual or anything."
    names = draw(st.lists(st.sampled_from(list(USUAL)), max_size=6, unique=True))
    return {name: draw(anything if draw(st.integers(0, 3)) == 0 else USUAL[name]) for name in names}


@pytest.fixture(scope="module")
def asked():
    return world(
        create_model("ease", lam=20.0),
        0,
        chain=Chain(["exclude_seen", "ban_list", "explore"], ["i5"], options={"explore": {"slots": [2], "pool": 5}}),
    )[0]


def answered(call, *args, **kw):
    "An answer that JSON can hold (RFC 8259), or None where it was refused in one short line."
    try:
        answer = call(*args, **kw)
    except AerecError as e:
        assert "\n" not in str(e) and len(str(e)) < 1500
        return None
    for a in answer if isinstance(answer, list) else [answer]:
        if not isinstance(a, AerecError):
            json.dumps([a.items, a.steps, list(a.trails.values())], allow_nan=False)
            assert all(len(w.message) < 1500 for w in a.warnings)
    return answer


@settings(max_examples=5_000 if STRESS else 150, deadline=None)
@given(requests())
def test_any_argument_is_answered_or_refused(asked, request):
    answer = answered(asked.recommend, **request)
    (each,) = asked.recommend_each([request], errors="return")
    assert isinstance(each, AerecError) if answer is None else each.item_ids == answer.item_ids
    more = {
        name: value
        for name, value in request.items()
        if name not in ("k", "history", "user_id", "candidates", "exclude_seen")
    }
    answered(asked.popular, "country=KR", **more)
    answered(asked.similar_items, "i3", **more)
    answered(asked.rank, ["i3", "i7", "i5"], **more)


@pytest.mark.parametrize("name", list(USUAL))
def test_numbers_too_long_to_print_are_refused_or_unknown(asked, name):
    for value in (10**5000, [10**5000], {"country": 10**5000}, {10**5000: "i3"}, [[10**5000]]):
        answered(asked.recommend, **{name: value})


@pytest.mark.parametrize("least", [-1e308, 1e308, -(2.0**62), 2.0**62, 5e-324])
def test_extreme_numbers_stay_finite(asked, least):
    answer = answered(asked.recommend, "u3", min_score=least, diversity=1, explain=True)
    assert answer is None or all(np.isfinite(i["score"]) for i in answer)
    assert all(
        0 < i.get("propensity", 1) <= 1
        for d in (0.0, 5e-324, 1.0)
        for i in answered(asked.recommend, "u3", diversity=d)
    )


def test_a_model_that_is_sure_gives_finite_answers():
    "Infinite scores and infinite contributions are the largest finite ones in an answer."
    r = world(create_model("ease", lam=20.0), 0)[0]
    r.model.B[:, :2] = np.inf, -np.inf
    assert np.isinf(r.model.score(csr_matrix(np.ones((1, N_ITEMS), np.float32)))).sum() == 2
    for explain in (False, True):
        answer = answered(r.recommend, history=["i7", "i8"], k=N_ITEMS, explain=explain, exclude_seen=False)
        assert len(answer) == N_ITEMS and all(np.isfinite(i["score"]) for i in answer)
    assert np.isfinite(r.recommend_batch(["u3"], k=N_ITEMS).score).all()


def test_infinite_numbers_of_the_items_are_unknown():
    table = pd.DataFrame({"item_id": IDS, "price": [np.inf, -np.inf, 1.5] * 80, "genres": None})
    x = csr_matrix(np.eye(N_ITEMS, dtype=np.float32))
    r = Recommender(create_model("popularity").fit(x), IDS, IDS, x, item_table=table)
    assert {json.dumps(i["metadata"], allow_nan=False) for i in answered(r.recommend, k=N_ITEMS)} == {
        "{}",
        '{"price": 1.5}',
    }


def test_parts_that_do_not_fit_are_refused(tmp_path):
    r = world(create_model("popularity"), 0)[0]
    people = Segments(["country=KR"], csr_matrix((1, 3), dtype=np.float32), np.array([1]))
    for wrong in ({"times": np.zeros(3)}, {"segments": people}):
        test_error(
            lambda wrong=wrong: Recommender(r.model, r.items, r.users, r.histories, **wrong), "shape_mismatch", *wrong
        )
    (tmp_path / "other.json").write_text("{}")
    test_error(lambda: r.recommend_batch(k=2, folder=tmp_path), "foreign_files", tmp_path.name)
    test_error(lambda: unrated_items(SimpleNamespace(artifact_dir=lambda stage: tmp_path)), "missing_file", "items.csv")
