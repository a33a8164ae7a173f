"Validation against other implementations, and what outlives a run."

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from conftest import STRESS, variables
from scipy import sparse, stats

from aerec_nb.data.splits import EvalSet, split_interactions
from aerec_nb.models.ranking import top_k
from aerec_nb.models.registry import create_model
from aerec_nb.testing import test_error
from aerec_nb.validation import Evaluation, audit_leaks, compare, evaluate, get_hit, get_ndcg, list_metrics, slices


def random_fold(n, n_items, seed=0, tied=False):
    "Histories, targets beside them, targets that nobody can know, and scores."
    random = np.random.default_rng(seed)
    kind = random.choice(3, (n, n_items), p=(0.9, 0.05, 0.05))
    kind[np.arange(n), random.integers(0, n_items, n)] = 2
    scores = (
        random.integers(0, 4, (n, n_items)).astype(np.float32)
        if tied
        else random.standard_normal((n, n_items)).astype(np.float32)
    )
    history, target = (sparse.csr_matrix((kind == c).astype(np.float32)) for c in (1, 2))
    return EvalSet(np.arange(n), history, target, np.diff(target.indptr) + random.integers(0, 3, n), 0), scores


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.slow
def test_metrics_equal_an_independent_librarys(tied):
    ranx = pytest.importorskip("ranx")
    n_users = 10_000 if STRESS else 1_000
    fold, scores = random_fold(n_users, 80, 1, tied)
    found = evaluate(scores, fold, (1, 5, 10, 60))
    best = [
        np.lexsort((np.arange(80), -np.where(h > 0, -np.inf, s)))[: (h == 0).sum()]
        for s, h in zip(scores, fold.input.toarray(), strict=True)
    ]  # ties by item index, histories out
    targets = [
        t.indices.tolist() + [f"unknown {j}" for j in range(n - t.nnz)]
        for t, n in zip(fold.target, fold.n_targets, strict=True)
    ]
    qrels = ranx.Qrels({f"u{i:05}": {str(t): 1 for t in items} for i, items in enumerate(targets)})
    run = ranx.Run(
        {f"u{i:05}": {str(item): float(80 - place) for place, item in enumerate(order)} for i, order in enumerate(best)}
    )
    theirs = ranx.evaluate(
        qrels,
        run,
        [f"{m}@{k}" for m in ("ndcg", "recall", "hit_rate", "precision", "map", "mrr") for k in (1, 5, 10, 60)],
        return_mean=False,
    )
    for k in (1, 5, 10, 60):
        cut = fold.n_targets / np.minimum(k, fold.n_targets)
        expected = {
            "ndcg": theirs[f"ndcg@{k}"],
            "hit": theirs[f"recall@{k}"],
            "recall": theirs[f"recall@{k}"] * cut,
            "hit_rate": theirs[f"hit_rate@{k}"],
            "precision": theirs[f"precision@{k}"],
            "map": theirs[f"map@{k}"] * cut,
            "mrr": theirs[f"mrr@{k}"],
        }  # theirs divides by all targets, ours by as many as fit into the list
        for metric, values in expected.items():
            np.testing.assert_allclose(
                found.metrics[f"{metric}@{k}"], values, atol=1e-6, rtol=0, err_msg=f"{metric}@{k}"
            )
    for i in range(0, n_users, 501):  # and the lecture's own
        assert found.metrics["ndcg@10"][i] == pytest.approx(get_ndcg(best[i].tolist(), targets[i], 10), abs=1e-12)
        assert found.metrics["hit@10"][i] == pytest.approx(get_hit(best[i].tolist(), targets[i], 10), abs=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_block_size_changes_nothing_on_given_scores(tied):
    fold, scores = random_fold(300, 150, 2, tied)
    features = sparse.random(150, 8, 0.3, "csr", random_state=0, dtype=np.float32)
    whole = evaluate(scores, fold, (10, 20, 100), block_size=300, item_features=features)
    for block_size in (1, 7, 64):
        found = evaluate(scores, fold, (10, 20, 100), block_size=block_size, item_features=features)
        for metric in whole.metrics:
            np.testing.assert_allclose(found.metrics[metric], whole.metrics[metric], atol=1e-9, rtol=0, err_msg=metric)
        assert found.catalogue == whole.catalogue
    before = scores.copy()
    evaluate(scores, fold, 10)
    assert np.array_equal(before, scores), "given scores stay as they are"


def test_list_metrics_equal_plain_loops():
    random = np.random.default_rng(3)
    counts = random.integers(0, 50, 70)
    features = random.random((70, 5)) * (random.random((70, 5)) < 0.4)
    top = np.argsort(random.random((40, 70)), axis=1)[:, :12]
    top[3, 5:] = -1
    top[4] = -1
    found = list_metrics(top, counts, 60, sparse.csr_matrix(features), k=(4, 12))
    order = np.argsort(-counts, kind="stable")
    held = 0
    head = set()
    for item in order:  # the fewest items that hold 80 %
        if held < 0.8 * counts.sum():
            head.add(item)
            held += counts[item]
    for i, row in enumerate(top):
        for k in (4, 12):
            items = [j for j in row[:k] if j >= 0]
            unit = [features[j] / np.linalg.norm(features[j]) for j in items if features[j].any()]
            pairs = [1 - a @ b for a, b in combinations(unit, 2)]
            expected = {
                "novelty": np.mean([np.log2(60 / max(1, counts[j])) for j in items]) if items else np.nan,
                "popularity": np.mean(counts[items]) if items else np.nan,
                "long_tail": np.mean([j not in head for j in items]) if items else np.nan,
                "diversity": np.mean(pairs) if pairs else np.nan,
            }
            for metric, value in expected.items():
                np.testing.assert_allclose(
                    found[f"{metric}@{k}"][i], value, atol=1e-6, err_msg=f"{metric}@{k} of list {i}"
                )


def test_top_k_equals_a_full_stable_sort():
    random = np.random.default_rng(4)
    for n_items in (1, 2, 9, 200):
        for scores in (
            random.standard_normal((30, n_items)),
            random.integers(0, 3, (30, n_items)),
            np.where(random.random((30, n_items)) < 0.5, -np.inf, random.random((30, n_items))),
        ):
            for k in (1, 2, 8, 199, 500):
                assert np.array_equal(
                    top_k(scores.astype(np.float32), k)[0],
                    np.argsort(-scores.astype(np.float32), axis=1, kind="stable")[:, :k],
                )


def ratings(n_users=120, n_items=90, seed=5):
    random = np.random.default_rng(seed)
    rows = []
    for u, taste in enumerate(random.integers(0, 3, n_users)):
        liked = np.where(np.arange(n_items) % 3 == taste, 5.0, 1.0) / (5 + np.arange(n_items))
        rows += [
            (u, int(i), t + u % 7)
            for t, i in enumerate(random.choice(n_items, 30, replace=False, p=liked / liked.sum()))
        ]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


def test_intervals_hold_what_they_promise():
    "Of two hundred comparisons of equals about 95 % of the intervals hold zero, and their p is spread evenly."
    random = np.random.default_rng(6)
    inside = []
    p = []
    for i in range(200):
        d = compare(
            [Evaluation(name, "valid", 10, np.arange(150), {"ndcg": random.beta(0.5, 2, 150)}) for name in "ab"],
            n_bootstrap=300,
            seed=i,
        ).iloc[0]
        inside.append(d.low <= 0 <= d.high)
        p.append(d.p)
    assert 0.90 <= np.mean(inside) <= 0.985
    assert stats.kstest(p, "uniform").pvalue > 0.001


@pytest.mark.parametrize("kind", ["lecture", "holdout", "leave_last", "temporal", "strong"])
def test_slices_and_comparison_on_every_split(kind):
    split = split_interactions(ratings(), kind)
    found = [evaluate(create_model(m).fit(split.train), split, (5, 20)) for m in ("popularity", "ease")]
    parts = slices(found, split)
    groups = {"history length", "item popularity"} | (
        {"last active"} if kind != "temporal" else set()
    )  # at one cut everybody was last active at about one time
    assert set(parts.by) == groups
    for e in found:
        for by in groups - {"item popularity"}:
            mine = parts[(parts.by == by) & (parts.model == e.model)]
            assert mine.n.sum() == len(e.users)
            assert (mine.n * mine.value).sum() / mine.n.sum() == pytest.approx(e.mean(), abs=1e-12)
    pairs = compare(found, "recall@20", n_bootstrap=200)
    assert {"random", "oracle", "popularity", "ease"} == set(pairs.better) | set(pairs.worse)
    assert (
        (pairs.difference >= 0).all()
        and (pairs.low <= pairs.difference).all()
        and (pairs.difference <= pairs.high).all()
    )


def test_seeds_are_compared_person_by_person():
    """Three splits, two models: the difference is that of all of them, and people who are in each of them are drawn
    once.
    """
    splits = [split_interactions(ratings(), "lecture", valid_sample_size=4, seed=s) for s in (1, 2, 3)]
    found = [evaluate(create_model(m).fit(s.train), s, 5) for s in splits for m in ("ease", "popularity")]
    d = compare(found).iloc[0]
    by_hand = np.concatenate(
        [a.metrics["ndcg"] - b.metrics["ndcg"] for a, b in zip(found[::2], found[1::2], strict=True)]
    )
    assert abs(d.difference) == pytest.approx(abs(by_hand.mean()), abs=1e-12)
    test_error(lambda: compare(found[:-1]), "not_comparable", "popularity")


def test_nothing_leaks_on_twenty_clean_splits():
    for seed in range(4):
        for kind in ("lecture", "holdout", "leave_last", "temporal", "strong"):
            split = split_interactions(ratings(seed=seed), kind, seed=seed)
            for s in (split, split.merge_valid_into_train()):
                model = create_model("popularity").fit(s.train)
                found = audit_leaks(s, model=model)
                assert not found.leaks.any(), (kind, seed, found.to_dict("records"))


def test_the_second_reading_of_test_is_said(tmp_path, monkeypatch):
    """Two runs of the stage over the same data: the second says that it is the second; a run on other rows says that it
    is the first.
    """
    from aerec_nb.core.artifacts import open_run
    from aerec_nb.core.files import read_json
    from aerec_nb.validation import build_validation, say_reading, say_which

    for k, v in variables(tmp_path).items():
        monkeypatch.setenv(k, v)
    (folder := tmp_path / "data").mkdir()
    ratings().to_csv(folder / "ratings.csv", index=False)
    readings = []
    for seed in (42, 42, 7):
        run = open_run(
            None,
            env="test",
            source=str(folder),
            models=["popularity", "ease"],
            split="holdout",
            random_seed=seed,
            lecture_replay="off",
        )
        stage = run.execute("validation", build=build_validation)
        readings.append(read_json(stage / "measured.json")["readings"])
        choice = read_json(stage / "choice.json")
        assert choice["n_test_reads"] == 2
        assert choice["model"] in say_which(stage)
    assert [len(r) for r in readings] == [1, 2, 1]
    assert say_reading(readings[0]) == say_reading(readings[2]) != say_reading(readings[1])
    log = next(tmp_path.rglob("test_readings.jsonl"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 3 and lines[0]["rows"] == lines[1]["rows"] != lines[2]["rows"]
    assert lines[0]["models"] == ["popularity", "ease"]
