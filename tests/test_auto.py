"""auto and tune on the real thing: nothing is decided by test, the same seed decides the same, a killed search goes on,
and the stage does both.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from conftest import STRESS, variables

from aerec_nb.core.artifacts import open_run
from aerec_nb.core.files import read_json
from aerec_nb.data.splits import Split, split_interactions
from aerec_nb.models.ensemble import Blend
from aerec_nb.models.registry import create_model, load_model, save_model
from aerec_nb.testing import test_error
from aerec_nb.training import auto, build_training, describe_search, tune
from aerec_nb.validation import evaluate


def people(n_users=120, n_items=60, seed=0):
    "Interactions of people with one of three tastes, and some noise, at times."
    random = np.random.default_rng(seed)
    likes = random.random((n_users, n_items)) < np.where(
        np.arange(n_users)[:, None] % 3 == np.arange(n_items) % 3, 0.4, 0.06
    )
    users, items = np.nonzero(likes)
    order = random.permutation(len(users))
    return pd.DataFrame({"user_id": users[order], "item_id": items[order], "timestamp": np.arange(len(users))})


NO_HURRY = 1e6  # seconds: what is tried then depends on no clock


class Blind(Split):
    "A split whose test nobody may look at."

    @property
    def test(self):
        raise AssertionError("test was looked at")


@pytest.fixture(scope="module", params=["lecture", "leave_last", "strong"] if STRESS else ["leave_last"])
def split(request):
    return split_interactions(
        people(),
        request.param,
        **({"n_test_users": 30} if request.param == "strong" else {"valid_sample_size": 3}),
    )


def test_auto_decides_without_test_and_the_same_every_time(split, tmp_path):
    model = auto(split, NO_HURRY, progress=False)
    blind = auto(Blind(**{f.name: getattr(split, f.name) for f in fields(split)}), NO_HURRY, progress=False)
    assert blind.candidates.drop(columns="seconds").equals(model.candidates.drop(columns="seconds"))
    np.testing.assert_array_equal(blind.score(split.test.input), model.score(split.test.input))

    table = model.candidates
    assert abs(table.weight.sum() - 1) < 1e-9 and {"ease", "rdlae", "item_knn", "mult_dae"} <= set(table.model)
    if isinstance(model, Blend):
        assert sorted(m["name"] for m in model.hyperparameters["members"]) == sorted(table.model[table.weight > 0])
    save_model(model, tmp_path)
    np.testing.assert_array_equal(load_model(tmp_path).score(split.test.input), model.score(split.test.input))

    again = create_model(model.name, **model.hyperparameters).fit(split.train_and_valid)  # what it says it is
    np.testing.assert_allclose(again.score(split.test.input), model.score(split.test.input), atol=1e-5)
    popular = evaluate(create_model("popularity").fit(split.train), split, on="test")
    assert evaluate(model, split, on="test").mean() > popular.mean() + 2 * popular.se(), "tastes are found"


def test_auto_keeps_to_its_time(split):
    began = time.monotonic()
    auto(split, 5, progress=False)
    assert (
        time.monotonic() - began < 60
    )  # a trial that has begun is ended: a bound for a hanging search, not a measurement


def test_auto_on_a_catalogue_too_large_for_the_time():
    "Thousands of items, thin data, a second: the closed forms take the most popular items, or none."
    random = np.random.default_rng(1)
    n = 30_000
    frame = pd.DataFrame(
        {
            "user_id": random.integers(0, 2_000, n),
            "item_id": (6_000 * random.random(n) ** 3).astype(int),
            "timestamp": np.arange(n),
        }
    ).drop_duplicates(["user_id", "item_id"])
    split = split_interactions(frame, "leave_last", valid_sample_size=1)
    model = auto(split, 2, progress=False)
    closed = model.candidates[model.candidates.model.isin(["ease", "rdlae", "closed forms"])]
    assert len(closed) and all(
        row.left_out is not None or row.hyperparameters["max_items"] < split.train.shape[1]
        for row in closed.itertuples()
    ), model.candidates  # the very slow leave them out
    assert model.score(split.valid.input[:2]).shape == (2, split.train.shape[1])


SEARCH = """
import sys
sys.path.insert(0, sys.argv[2])
from test_auto import people
from aerec_nb.model_preprocessing import split_interactions
from aerec_nb.training import tune
split = split_interactions(people(), 'leave_last', valid_sample_size=3)
found = tune('mult_dae', split, 8, storage=sys.argv[1], progress=False, num_epoch=8, batch_size=32)
print(found.value)
"""


@pytest.mark.stress
def test_a_killed_search_goes_on(tmp_path):
    path = tmp_path / "kept" / "tuning.db"

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", SEARCH, str(path), os.path.dirname(__file__)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables(tmp_path),
        )

    def finished():
        try:
            return dict(
                sqlite3.connect(path, timeout=5)
                .execute(
                    "select number, value from trials join trial_values using (trial_id) where state in ('COMPLETE', "
                    "'PRUNED')"
                )
                .fetchall()
            )
        except sqlite3.Error:
            return {}

    search = start()
    while search.poll() is None and len(finished()) < 3:
        time.sleep(0.02)
    search.send_signal(signal.SIGKILL)
    assert search.wait() == -signal.SIGKILL
    before = finished()
    assert 3 <= len(before) < 8
    said, wrong = start().communicate()
    after = finished()
    assert len(after) == 8, wrong
    assert before.items() <= after.items() and float(said) == max(after.values())


def test_the_stage_tunes_and_looks(tmp_path, monkeypatch):
    for k, v in variables(tmp_path).items():
        monkeypatch.setenv(k, v)
    (path := tmp_path / "ratings.csv").write_text(people().to_csv(index=False))
    from aerec_nb.business_preprocessing import build_business_preprocessing
    from aerec_nb.data_import import build_data_import
    from aerec_nb.model_preprocessing import build_model_preprocessing
    from aerec_nb.modeling import build_modeling

    run = open_run(
        None,
        env="test",
        source=str(path),
        models=["ease", "auto", "mult_dae", "popularity"],
        time_budget_s=20,
        n_trials=3,
        lr=0.01,
    )
    for stage, build in (
        ("data_import", build_data_import),
        ("business_preprocessing", build_business_preprocessing),
        ("model_preprocessing", build_model_preprocessing),
        ("modeling", build_modeling),
    ):
        run.execute(stage, build=build)
    folder = run.execute("training", build=build_training)
    trained = {m["name"]: m for m in read_json(folder / "summary.json")}
    assert len(trained) >= 3 and {"mult_dae", "popularity"} - set(trained) <= {"mult_dae"}
    searched = describe_search(folder)
    assert set(searched["searched by"]) == {"auto", "tune"} and abs(searched["weight in the blend"].sum() - 1) < 0.01
    for name, m in trained.items():
        assert (
            evaluate(
                load_model(folder / name), Split.load(run.artifact_dir("model_preprocessing") / "split"), m["k"]
            ).mean()
            == m["valid_ndcg"]
        )
    tuned = [m for name, m in trained.items() if (folder / name / "trials.parquet").exists()]
    assert tuned and all(m["hyperparameters"].get("lr", 0.01) == 0.01 for m in tuned), "what was given is not searched"


def test_the_stages_use_item_features_where_asked(tmp_path, monkeypatch):
    for k, v in variables(tmp_path).items():
        monkeypatch.setenv(k, v)
    from aerec_nb.business_preprocessing import build_business_preprocessing
    from aerec_nb.data_import import build_data_import
    from aerec_nb.model_preprocessing import build_model_preprocessing
    from aerec_nb.modeling import build_modeling
    from aerec_nb.validation import build_validation

    (folder := tmp_path / "data").mkdir()
    people().to_csv(folder / "ratings.csv", index=False)
    figures = {}
    for asked, items in ((False, True), (True, True), (True, False)):
        if items:
            pd.DataFrame(
                {
                    "item_id": range(60),
                    "title": [f"film {i}" for i in range(60)],
                    "genres": [f"taste {i % 3}" for i in range(60)],
                }
            ).to_csv(folder / "items.csv", index=False)
        else:
            (folder / "items.csv").unlink()
        run = open_run(
            None,
            env="test",
            source=str(folder),
            models=["ease", "mult_dae"],
            use_item_features=asked,
            lecture_replay="off",
        )
        for stage, build in (
            ("data_import", build_data_import),
            ("business_preprocessing", build_business_preprocessing),
            ("model_preprocessing", build_model_preprocessing),
            ("modeling", build_modeling),
        ):
            run.execute(stage, build=build)
        if not items:
            test_error(lambda run=run: run.execute("training", build=build_training), "missing_file", "items.csv")
            continue
        trained = {
            m["name"]: m["valid_ndcg"]
            for m in read_json(run.execute("training", build=build_training) / "summary.json")
        }
        board = (
            pd.read_parquet(run.execute("validation", build=build_validation) / "leaderboard.parquet")
            .set_index("model")
            .test_ndcg
        )
        figures[asked] = trained, board
    for name in ("ease", "mult_dae"):
        assert figures[True][0][name] != figures[False][0][name], "features change what is learned"
        assert figures[True][1][name] != figures[False][1][name], "and what is refitted"


def test_errors_have_a_code_and_a_place():
    split = split_interactions(people(), "leave_last", valid_sample_size=3)
    test_error(lambda: auto(split.merge_valid_into_train()), "not_found", "split.valid")
    test_error(lambda: tune("popularity", split), "missing_value", "space")
    test_error(lambda: tune("ease", split, 2, lamda=3), "unknown_parameter", "lamda")
