"""Business rules against a slow construction in plain Python; what is refused, and when; what a dry run leaves behind;
explicit negatives down to the list.
"""

import json
import math
from collections import Counter

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import papermill, real_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from short import stage_notebook

from aerec_nb import data_import
from aerec_nb.business_preprocessing import apply_rules, dry_run_rules, register_rule, run_rules
from aerec_nb.core.artifacts import open_run
from aerec_nb.core.errors import AerecError
from aerec_nb.core.plugins import registry
from aerec_nb.data.rules import rule_params
from aerec_nb.inference import Recommender, pair_matrix
from aerec_nb.models.registry import create_model
from aerec_nb.packaging import load_bundle, save_bundle

quick = settings(
    max_examples=80,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

# --- the rules once more, a row at a time ---


def slow_deduplicate(rows, deduplicate="last"):
    if deduplicate == "off":
        return rows
    pairs = {}
    for r in rows:
        pairs.setdefault((r["user"], r["item"]), []).append(r)
    stay = {}
    for same in pairs.values():
        same = sorted(same, key=lambda r: (r.get("time", 0), r["row"]))
        chosen = same[0] if deduplicate == "first" else same[-1]
        if len(same) > 1 and deduplicate in ("max", "mean", "sum"):
            how = {"max": max, "sum": sum, "mean": lambda v: sum(v) / len(v)}[deduplicate]
            chosen = {
                **chosen,
                **{
                    c: how([r[c] for r in same])
                    for c in (["rating"] if "rating" in chosen else [c for c in ("count", "weight") if c in chosen])
                },
            }
        stay[chosen["row"]] = chosen
    return [stay[r["row"]] for r in rows if r["row"] in stay]


def slow_bots(rows, max_interactions_per_window=None, interaction_window_hours=24.0, over_limit_policy="drop"):
    if max_interactions_per_window is None:
        return rows
    gone = set()
    bots = set()
    for r in rows:
        earlier = [
            o
            for o in rows
            if o["user"] == r["user"]
            and (o["time"], o["row"]) < (r["time"], r["row"])
            and r["time"] - o["time"] < 3600 * interaction_window_hours
        ]
        if len(earlier) >= max_interactions_per_window:
            gone.add(r["row"])
            bots.add(r["user"])
    return [r for r in rows if (r["user"] not in bots if over_limit_policy == "drop" else r["row"] not in gone)]


def slow_cap(rows, max_interactions_per_user=None, max_interactions_per_user_keep="latest"):
    if max_interactions_per_user is None:
        return rows
    stay = set()
    for user in {r["user"] for r in rows}:
        own = sorted((r for r in rows if r["user"] == user), key=lambda r: (r.get("time", 0), r["row"]))
        stay |= {
            r["row"]
            for r in (
                own[-max_interactions_per_user:]
                if max_interactions_per_user_keep == "latest"
                else own[:max_interactions_per_user]
            )
        }
    return [r for r in rows if r["row"] in stay]


def slow_minimum(of):
    return lambda rows, **knob: [r for r in rows if sum(o[of] == r[of] for o in rows) >= next(iter(knob.values()), 1)]


def slow_core(rows, k_core=None, k_core_users=None, k_core_items=None):
    while True:  # one row at a time, the last that has too few
        poor = [
            r
            for r in rows
            if sum(o["user"] == r["user"] for o in rows) < (k_core_users or k_core or 1)
            or sum(o["item"] == r["item"] for o in rows) < (k_core_items or k_core or 1)
        ]
        if not poor:
            return rows
        rows = [r for r in rows if r["row"] != poor[-1]["row"]]


def slow_threshold(rows, min_positive_rating="auto", scale=None):
    if scale is None or min_positive_rating == "off":
        return rows
    least = min_positive_rating
    if min_positive_rating == "auto":
        least = 3 if 4 < scale[1] <= 5 else 0.6 * scale[1]
    return [r for r in rows if r["rating"] >= least]


def slow_window(rows, time_from=None, time_to=None):
    return [
        r for r in rows if (time_from is None or r["time"] >= time_from) and (time_to is None or r["time"] < time_to)
    ]


def slow_rating_weight(rows, weight_by_rating=False, scale=None):
    return [{**r, "weight": r["weight"] * r["rating"] / scale[1]} for r in rows] if weight_by_rating else rows


def slow_decay(rows, half_life_days=None):
    if half_life_days is None or not rows:
        return rows
    last = max(r["time"] for r in rows)
    return [
        {
            **r,
            "weight": max(
                r["weight"] * 2 ** ((r["time"] - last) / 86400 / half_life_days), float(np.finfo(np.float32).tiny)
            ),
        }
        for r in rows
    ]


SLOW = {
    "deduplicate": slow_deduplicate,
    "bots": slow_bots,
    "max_interactions_per_user": slow_cap,
    "min_user_interactions": slow_minimum("user"),
    "min_item_interactions": slow_minimum("item"),
    "k_core": slow_core,
    "min_positive_rating": slow_threshold,
    "time_window": slow_window,
    "weight_by_rating": slow_rating_weight,
    "time_decay": slow_decay,
    "excluded_users": lambda rows, excluded_users=(): [
        r for r in rows if str(r["user"]) not in map(str, excluded_users)
    ],
    "excluded_items": lambda rows, excluded_items=(): [
        r for r in rows if str(r["item"]) not in map(str, excluded_items)
    ],
    "min_count": lambda rows, min_count=0: (
        [r for r in rows if r["count"] > min_count] if rows and "count" in rows[0] else rows
    ),
}


def slow_run(frame, knobs):
    "Rows that are left, and the rule of each that is not."
    names = {"user_id": "user", "item_id": "item", "timestamp": "time"}
    rows = [
        {**{names.get(k, k): v for k, v in r.items()}, "row": n, "weight": r.get("count", 1.0)}
        for n, r in enumerate(frame.to_dict("records"))
    ]
    scale = (frame.rating.min(), frame.rating.max()) if "rating" in frame else None
    gone = {}
    for name in knobs.get("rules", rule_params()):
        given = {k: v for k, v in knobs.items() if k in rule_params()[name]} | (
            {"scale": scale} if name in ("min_positive_rating", "weight_by_rating") else {}
        )
        left = SLOW[name](rows, **given)
        gone |= dict.fromkeys({r["row"] for r in rows} - {r["row"] for r in left}, name)
        rows = left
    return rows, gone


# --- made-up ratings and settings ---

HOURS = [0, 1, 4, 8, 20, 24, 25, 28, 48, 60, 64]
GROUPS = [
    {"deduplicate": ["first", "max", "mean", "sum", "off"]},
    {"excluded_users": [[10], ["10", 99], [11, "12"]]},
    {"excluded_items": [[20], ["20", "21", "x"]]},
    {"max_interactions_per_user": [1, 2, 4], "max_interactions_per_user_keep": ["latest", "first"]},
    {"min_user_interactions": [2, 4]},
    {"min_item_interactions": [2, 4]},
    {"k_core": [2, 3]},
    {"k_core_users": [2, 3], "k_core_items": [2, 3]},
]
RATED = [{"min_positive_rating": ["off", 3.0]}, {"weight_by_rating": [True]}]
COUNTED = [{"min_count": [0.0, 1.0]}]
TIMED = [
    {
        "max_interactions_per_window": [1, 2, 3],
        "interaction_window_hours": [4.0, 24.0],
        "over_limit_policy": ["drop", "cap"],
    },
    {"half_life_days": [0.5, 30.0]},
    {"time_from": [0, 3600 * 4], "time_to": [3600 * 28, 3600 * 60]},
]


@st.composite
def frames(draw, values=("rating", "count", None), times=None):
    n = draw(st.integers(4, 30))

    def column(options):
        return draw(st.lists(st.sampled_from(options), min_size=n, max_size=n))

    frame = pd.DataFrame({"user_id": column([10, 11, 12]), "item_id": column([20, 21, 22, 23, 24])})
    value = draw(st.sampled_from(values))
    if value:
        frame[value] = [
            1.0,
            5.0,
            *(float(v) for v in column([1, 2, 3, 4, 5] if value == "rating" else [0, 1, 2, 7])[2:]),
        ]
    if draw(st.booleans()) if times is None else times:
        frame["timestamp"] = [3600 * h for h in column(HOURS)]
    return frame


@st.composite
def knobs_for(draw, frame, first=None):
    "A few rules that act, in their usual order or in another; `first` is among them."
    groups = GROUPS + RATED * ("rating" in frame) + TIMED * ("timestamp" in frame) + COUNTED * ("count" in frame)
    chosen = draw(
        st.lists(st.sampled_from(groups), min_size=first is None, max_size=2, unique_by=lambda g: next(iter(g)))
    ) + [first or {}]
    knobs = {name: draw(st.sampled_from(options)) for group in chosen for name, options in group.items()}
    if "k_core" in knobs:
        knobs = {k: v for k, v in knobs.items() if k not in ("k_core_users", "k_core_items")}
    if max(knobs.get(k, 1) for k in ("min_user_interactions", "k_core", "k_core_users")) > knobs.get(
        "max_interactions_per_user", 9
    ):
        knobs["max_interactions_per_user"] = 4
    return knobs | ({"rules": draw(st.permutations(list(rule_params())))} if draw(st.booleans()) else {})


def attempt(frame, knobs):
    "The result, or None where the rules leave nothing."
    try:
        return run_rules(frame, knobs)
    except AerecError as e:
        assert e.code == "no_interactions" and "\n" not in str(e), e
        return None


@pytest.mark.parametrize("group", GROUPS + RATED + COUNTED + TIMED, ids=lambda g: next(iter(g)))
@settings(quick, max_examples=30)
@given(st.data())
def test_rules_do_what_the_slow_ones_do(group, data):
    values = ["rating", "count", None]
    if group in RATED:
        values = ["rating"]
    elif group in COUNTED:
        values = ["count"]
    frame = data.draw(frames(values, True if group in TIMED else None))
    knobs = data.draw(knobs_for(frame, group))
    left, gone = slow_run(frame, knobs)
    result = attempt(frame, knobs)
    report = dry_run_rules(frame, knobs)
    if result is None:
        assert not left and report.kept.iloc[-1] == 0
        return
    made = result.interactions
    assert made.user_id.tolist() == [r["user"] for r in left] and made.item_id.tolist() == [r["item"] for r in left]
    np.testing.assert_allclose(made.weight, np.float32([r["weight"] for r in left]), rtol=1e-5)
    if "timestamp" in frame:
        assert made.timestamp.tolist() == [r["time"] for r in left]
    assert dict(zip(result.dropped.row, result.dropped.rule.astype(str), strict=True)) == gone
    counts = Counter(gone.values())
    assert {r.rule: r.dropped for r in report[1:].itertuples() if r.dropped} == counts
    assert (report.kept + report.dropped == report.rows_before).all() and report.kept.iloc[-1] == len(made)
    assert (report.users.iloc[-1], report["items"].iloc[-1]) == (made.user_id.nunique(), made.item_id.nunique())
    assert report.equals(result.report)
    assert result.dropped.row.is_unique and len(result.dropped) + len(made) == len(
        frame
    )  # every row is an interaction, or dropped once

    def pairs(f):
        return Counter(zip(f.user_id, f.item_id, strict=True))

    assert pairs(frame.iloc[result.dropped.row]) == pairs(result.dropped)
    low = {(frame.user_id[r], frame.item_id[r]) for r, rule in gone.items() if rule == "min_positive_rating"}
    negatives = {(u, i) for u, i in low if u in set(made.user_id)} - set(zip(made.user_id, made.item_id, strict=True))
    assert pairs(result.negatives) == dict.fromkeys(negatives, 1)


@quick
@given(st.data())
def test_categorical_ids_give_the_same(data):
    frame = data.draw(frames())
    knobs = data.draw(knobs_for(frame))
    if data.draw(st.booleans()):
        frame = frame.assign(user_id=frame.user_id.astype(str), item_id="i" + frame.item_id.astype(str))
    both = []
    for f in (
        frame,
        frame.assign(
            **{c: pd.Categorical(frame[c], categories=[*dict.fromkeys(frame[c])][::-1]) for c in ("user_id", "item_id")}
        ),
    ):
        result = attempt(f, knobs)
        if result is None:
            both.append(None)
            continue
        ids = {c: frame[c].dtype for c in ("user_id", "item_id")}
        both.append([part.astype(ids if "user_id" in part else {}) for part in vars(result).values()])
    if both[0] is None:
        assert both[1] is None
    else:
        for plain, categorical in zip(*both, strict=True):
            pd.testing.assert_frame_equal(plain, categorical)


@quick
@given(frames(), st.sampled_from([{"k_core": 2}, {"k_core_users": 2, "k_core_items": 3}]), st.integers(0, 9))
def test_k_core_is_idempotent_and_knows_no_order(frame, knobs, seed):
    knobs = dict(rules=["k_core"], **knobs)
    first = attempt(frame, knobs)
    if first is None:
        return
    again = run_rules(first.interactions, knobs)
    pd.testing.assert_frame_equal(again.interactions, first.interactions)
    assert again.report.note.iloc[-1] == "0 rounds"
    shuffled = run_rules(frame.sample(frac=1, random_state=seed), knobs).interactions

    def pairs(f):
        return Counter(zip(f.user_id, f.item_id, strict=True))

    assert pairs(shuffled) == pairs(first.interactions)


@quick
@given(st.data())
def test_rules_that_look_at_one_row_commute(data):
    frame = data.draw(frames(values=["rating"], times=True))
    knobs = {
        "excluded_users": [10],
        "excluded_items": [20, 21],
        "time_from": 3600 * 10,
        "time_to": 3600 * 70,
        "min_positive_rating": float(frame.rating.median()),
    }
    rules = ["excluded_users", "excluded_items", "time_window", "min_positive_rating"]
    one, other = (attempt(frame, dict(knobs, rules=order)) for order in (rules, data.draw(st.permutations(rules))))
    assert (one is None) == (other is None)
    if one is not None:
        pd.testing.assert_frame_equal(one.interactions, other.interactions)


def test_longer_histories_with_many_ties_in_time():
    random = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "user_id": random.integers(3, size=300),
            "item_id": np.arange(300) % 250,
            "rating": random.integers(1, 6, 300).astype(float),
            "timestamp": 3600 * random.integers(0, 40, 300),
        }
    )
    for rule, knobs in {
        "max_interactions_per_user": {"max_interactions_per_user": 40},
        "bots": {"max_interactions_per_window": 5, "interaction_window_hours": 2.0, "over_limit_policy": "cap"},
        "deduplicate": {
            "deduplicate": "first",
            "max_interactions_per_user": 40,
            "max_interactions_per_user_keep": "first",
        },
    }.items():
        result = run_rules(frame, knobs)
        _, gone = slow_run(frame, knobs)
        assert (
            dict(zip(result.dropped.row, result.dropped.rule.astype(str), strict=True)) == gone
            and rule in gone.values()
        )


def test_a_capped_window_never_has_more_and_weights_never_vanish():
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "user_id": random.integers(5, size=400),
            "item_id": np.arange(400),
            "timestamp": random.integers(0, 10**6, 400),
        }
    )
    left = apply_rules(
        frame,
        {
            "max_interactions_per_window": 3,
            "interaction_window_hours": 10,
            "over_limit_policy": "cap",
            "half_life_days": 1e-4,
        },
    )[0]
    for _, times in left.groupby("user_id").timestamp:
        assert max(((times >= t) & (times < t + 36000)).sum() for t in times) <= 3
    assert 0 < len(left) < 400 and (left.weight > 0).all() and left.weight.max() == 1


@pytest.mark.data
def test_the_lectures_rule_on_the_lectures_data():
    ratings = data_import.load_ratings(real_data("data/ml-latest-small"))
    result = run_rules(ratings)
    assert round(result.report.kept_fraction.iloc[-1], 6) == 0.810851 and result.report.rule.tolist() == [
        "ratings",
        "min_positive_rating",
    ]
    expected = ratings[ratings.rating >= 3]
    assert (
        result.interactions[["user_id", "item_id", "timestamp"]].equals(
            expected[["user_id", "item_id", "timestamp"]].reset_index(drop=True)
        )
        and (result.interactions.weight == 1).all()
    )
    assert len(result.negatives) == len(result.dropped) - (~ratings.user_id.isin(expected.user_id)).sum()


# --- what is refused, and when ---

BAD = [
    ({"rules": ["min_positive_rating", "no_reruns"]}, "unknown_plugin", "rules.rules"),
    ({"rules": ["my_rules:missing"]}, "missing_name", "rules.rules"),
    ({"rules": ["other:rule"]}, "missing_file", "rules.rules"),
    ({"rules": ["broken:rule"]}, "plugin_failed", "rules.rules"),
    ({"min_positive_rating": 5.5}, "out_of_range", "rules.min_positive_rating"),
    ({"excluded_users_file": "none.txt"}, "missing_file", "none.txt"),
    ({"excluded_users_file": "empty.txt"}, "empty_data", "empty.txt"),
    ({"excluded_items_file": "latin.txt"}, "wrong_encoding", "latin.txt:2"),
    ({"excluded_items_file": "odd.csv"}, "missing_value", "odd.csv:3"),
    (
        {"rules": ["my_rules:every_other"], "rule_options": {"my_rules:every_other": {"stepp": 2}}},
        "unknown_option",
        "my_rules:every_other",
    ),
    ({"time_from": "2020-01-02", "time_to": "2020-01-01"}, "conflict", "rules.time_to"),
    ({"time_to": "soon"}, "not_a_time", "rules.time_to"),
    ({"k_core": 0}, "greater_than_equal", "rules.k_core"),
    ({"half_life_days": 0}, "greater_than", "rules.half_life_days"),
    ({"k_core": 2, "k_core_items": 3}, "conflict", "rules.k_core_items"),
    ({"max_interactions_per_user": 2, "min_user_interactions": 3}, "conflict", "rules.min_user_interactions"),
    ({"rules": ["k_core"], "min_item_interactions": 3}, "unused_setting", "rules.min_item_interactions"),
]


@pytest.fixture
def own_project(tmp_path, monkeypatch):
    "A project of somebody's own: a rule in a file, and list files of every bad kind."
    (tmp_path / "my_rules.py").write_text(
        "def every_other(ratings, step=2):\n    return [n % step == 0 for n in range(len(ratings))]\n"
    )
    (tmp_path / "broken.py").write_text("def rule(ratings):\n    return ratings.\n")
    (tmp_path / "empty.txt").write_text("# nobody\n")
    (tmp_path / "latin.txt").write_bytes(b"7\nJos\xe9\n")
    (tmp_path / "odd.csv").write_text("why,movieId\nspoiler,7\nstaff,\n")
    for name in ("AEREC_RUNS_DIR", "AEREC_ENV", "IN_TEST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AEREC_PROJECT", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("knobs, code, place", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_settings_are_refused_before_data_are_read(knobs, code, place, own_project, monkeypatch):
    monkeypatch.setattr(data_import, "build_data_import", lambda run, folder: pytest.fail("data were read"))
    monkeypatch.setattr(data_import, "source_files", lambda settings: pytest.fail("data were looked at"))
    for begin in ("execute", "ensure"):
        with pytest.raises(AerecError) as e:
            getattr(open_run(env="test", source="sample", runs_dir=str(own_project / "runs"), **knobs), begin)(
                "business_preprocessing"
            )
        assert e.value.code == code and e.value.where.endswith(place) and "\n" not in str(e.value), e.value
    assert not (own_project / "runs").exists()


def test_a_threshold_off_a_scale_that_only_the_data_know(own_project, monkeypatch):
    (own_project / "ratings.csv").write_text(
        "user,item,rating\n" + "".join(f"{u},{i},{(u + i) % 10 + 1}\n" for u in range(6) for i in range(6))
    )

    def begin(**kw):
        return open_run(env="test", source=str(own_project / "ratings.csv"), runs_dir=str(own_project / "runs"), **kw)

    begin().ensure("data_import")
    monkeypatch.setattr(pd, "read_parquet", lambda *a, **kw: pytest.fail("ratings were read"))
    for knobs, code in (({"min_positive_rating": 11}, "out_of_range"), ({"half_life_days": 3}, "needs_times")):
        with pytest.raises(AerecError) as e:
            begin(**knobs).execute("business_preprocessing")
        assert (e.value.code, e.value.where) == (code, f"rules.{next(iter(knobs))}")
    assert len(list((own_project / "runs").iterdir())) == 1


def test_a_rule_of_ones_own_file_and_a_list_are_part_of_the_fingerprint(own_project):
    (own_project / "abuse.txt").write_text("1\n")
    knobs = {
        "rules": ["excluded_users", "min_positive_rating", "my_rules:every_other"],
        "rule_options": {"my_rules:every_other": {"step": 3}},
        "excluded_users_file": "abuse.txt",
    }

    def kept():
        opened = open_run(env="test", source="sample", runs_dir=str(own_project / "runs"), **knobs)
        opened.quiet = True
        report = pd.read_parquet(opened.ensure("business_preprocessing") / "filter_report.parquet").set_index("rule")
        dropped = pd.read_parquet(opened.folder / "business_preprocessing" / "dropped.parquet")
        assert dropped.rule.value_counts().to_dict() == report.dropped[1:].to_dict()
        return report.kept.tolist(), opened.fingerprint("business_preprocessing")

    a, first = kept()
    b, again = kept()
    assert (a, first) == (b, again) and a[-1] == math.ceil(a[-2] / 3)
    (own_project / "my_rules.py").write_text(
        "def every_other(ratings, step=2):\n    return [n % (2*step) == 0 for n in range(len(ratings))]\n"
    )
    (c, changed) = kept()
    assert changed != first and c[-1] == math.ceil(a[-2] / 6)
    (own_project / "abuse.txt").write_text("1\n2\n")
    (d, listed) = kept()
    assert listed not in (first, changed) and d[1] < c[1]


@pytest.mark.parametrize(
    "rule, code",
    [
        (lambda r: [True], "shape_mismatch"),
        (lambda r: pd.concat([r, r]), "added_rows"),
        (lambda r: r.nothing, "rule_failed"),
        (lambda r: None, "wrong_type"),
        (lambda r: r.assign(user_id=1), "changed_ids"),
        (lambda r: r.assign(weight=-1.0), "weight_not_positive"),
        (lambda r: r.rating, "wrong_type"),
        (lambda r: r.drop(columns="rating"), "missing_column"),
        (lambda r: r[1:].reset_index(drop=True), "changed_ids"),
        (lambda r: 1 / 0, "rule_failed"),
    ],
)
def test_a_rule_that_misbehaves_is_named(rule, code, monkeypatch):
    monkeypatch.setattr(registry("rules"), "added", {})  # what is registered here is gone afterwards
    register_rule("mine")(rule)
    frame = pd.DataFrame({"user_id": ["a", "b", "c"], "item_id": ["x", "y", "z"], "rating": [1.0, 2.0, 3.0]})
    with pytest.raises(AerecError) as e:
        apply_rules(frame, {"rules": ["mine"]})
    assert (e.value.code, e.value.where) == (code, "mine") and "\n" not in str(e.value)
    assert list(frame) == ["user_id", "item_id", "rating"]


def test_a_rule_that_is_known_here_only_is_refused_for_a_pipeline(monkeypatch, tmp_path):
    monkeypatch.setattr(registry("rules"), "added", {})
    from aerec_nb.pipeline import run_pipeline

    register_rule("mine")(lambda ratings: ratings.user_id > 0)
    with pytest.raises(AerecError) as e:
        run_pipeline(env="test", runs_dir=str(tmp_path / "runs"), rules=["mine"])
    assert e.value.code == "not_in_subprocess" and "module:function" in str(e.value)
    assert not (tmp_path / "runs").exists()


# --- through the notebook ---


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    return stage_notebook("01a_business_preprocessing", tmp_path_factory.mktemp("short"))


def test_the_notebook_refuses_in_one_line(notebook, environ, tmp_path):
    missing = ["-p", "excluded_users_file", str(tmp_path / "nobody.txt")]
    done = papermill(notebook, tmp_path / "out.ipynb", *missing, env=environ, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("DataError: ")]
    assert done.returncode != 0 and len(said) == 1 and f"{tmp_path}/nobody.txt" in said[0], done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_funnel_and_writes_nothing(notebook, environ, tmp_path):
    done = papermill(
        notebook,
        tmp_path / "out.ipynb",
        "-p",
        "dry_run",
        "True",
        "-p",
        "min_item_interactions",
        "5",
        "-y",
        "{rules: [min_positive_rating, min_item_interactions]}",
        env=environ,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    shown = json.dumps(outputs)
    assert (
        "would be interactions" in shown
        and "this was a dry run, nothing is written" in shown
        and "min_item_interactions" in shown
    )
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb"]


# --- explicit negatives, down to the list ---


@pytest.fixture(scope="module")
def disliking():
    "A recommender of sixty users, half of whose items are rated too low."
    random = np.random.default_rng(3)
    ratings = pd.DataFrame(
        [(f"u{u}", i, float(random.integers(1, 6))) for u in range(60) for i in random.choice(40, 14, replace=False)],
        columns=["user_id", "item_id", "rating"],
    )
    result = run_rules(ratings, {"min_positive_rating": 4})
    users = result.interactions.user_id.unique()
    items = result.interactions.item_id.unique()
    history = csr_matrix(pair_matrix(result.interactions, users, items), dtype=np.float32)
    return Recommender(
        create_model("ease", lam=5.0).fit(history),
        items,
        users,
        history,
        negatives=pair_matrix(result.negatives, users, items),
    ), ratings


def test_nobody_is_recommended_what_they_rated_too_low(disliking, tmp_path):
    r, ratings = disliking
    low = set(zip(*ratings[ratings.rating < 4][["user_id", "item_id"]].to_numpy().T, strict=True))
    for recommender in (r, load_bundle(save_bundle(r, tmp_path / "bundle"))):
        lists = recommender.recommend_batch(k=40)
        assert (
            not set(zip(lists.user_id, lists.item_id, strict=True)) & low
            and len(lists) == recommender.n_users * recommender.n_items - r.histories.nnz - r.negatives.nnz
        )
        for user in r.users[:8]:
            assert recommender.recommend(user, k=40).item_ids == lists[lists.user_id == user].item_id.tolist()
        everything = recommender.recommend_batch(k=40, exclude_seen=False)
        assert (
            len(everything) == recommender.n_users * recommender.n_items
            and set(zip(everything.user_id, everything.item_id, strict=True)) & low
        )
    lists_without = Recommender(r.model, r.items, r.users, r.histories).recommend_batch(k=5)
    assert set(zip(lists_without.user_id, lists_without.item_id, strict=True)) & low, "or this test would show nothing"


def test_a_run_hands_its_negatives_down_to_the_recommender(environ, tmp_path, monkeypatch):
    for name, value in environ.items():
        if name.startswith("AEREC_"):
            monkeypatch.setenv(name, value)
    from aerec_nb.inference import load_recommender

    opened = open_run(env="test", source="sample", models=["popularity"], model="popularity", max_users=60)
    opened.quiet = True
    opened.ensure("inference")
    r = load_recommender(opened)
    negatives = pd.read_parquet(opened.artifact_dir("business_preprocessing") / "negatives.parquet")
    known = negatives[negatives.item_id.isin(r.items)]
    assert r.negatives.nnz == len(known) > 0
    candidates = pd.read_parquet(opened.artifact_dir("inference") / "candidates.parquet").merge(known)
    assert len(candidates) and candidates.seen.all()
    lists = r.recommend_batch(k=50)
    assert not len(lists.merge(known))
