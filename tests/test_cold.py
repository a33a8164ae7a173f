"""Cold items are recommended by their features, on MovieLens latest-small with a tenth of its items made cold, and the
other items lose nothing.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import real_data
from scipy import sparse

from aerec_nb import training
from aerec_nb.data.features import item_features
from aerec_nb.data.splits import split_interactions
from aerec_nb.models.registry import create_model, load_model, save_model
from aerec_nb.testing import test_error

DATA = real_data("data/ml-latest-small")
pytestmark = [pytest.mark.data, pytest.mark.xdist_group("cold")]
NETS = {
    "autoencoder": {"hidden_dim": 12},
    "mult_dae": {"hidden_dim": 12},
    "mult_vae": {"hidden_dim": 12, "latent_dim": 6, "anneal_steps": 20},
    "recvae": {"hidden_dim": 12, "latent_dim": 6},
    "elsa": {"rank": 8},
}


@pytest.fixture(scope="module")
def data():
    """Return the lecture's split without a tenth of the items in any history, and features of all items from genres,
    year and tags.
    """
    ratings, movies, tags = (
        pd.read_csv(DATA / f"{name}.csv").rename(columns={"userId": "user_id", "movieId": "item_id"})
        for name in ("ratings", "movies", "tags")
    )
    split = split_interactions(ratings, "lecture", 10, seed=42)
    fold = split.test
    n_items = len(split.items)
    cold = np.zeros(n_items, bool)
    cold[np.random.default_rng(1).choice(n_items, n_items // 10, replace=False)] = True

    def only(matrix, columns):
        kept = sparse.csr_matrix(matrix @ sparse.diags(columns.astype(np.float32)), dtype=np.float32)
        kept.eliminate_zeros()
        return kept

    return SimpleNamespace(
        cold=cold,
        history=only(fold.input, ~cold),
        warm_targets=only(fold.target, ~cold),
        cold_targets=only(fold.input + fold.target, cold),
        targets=sparse.csr_matrix(fold.target),
        features=item_features(movies, split.items, tags=tags).matrix,
    )


def best(scores, k, seed=0):
    """Return the k best items of each row.

    Ties are broken at random: item indices follow first appearance, so by index they would favour popular items.
    """
    shuffled = np.random.default_rng(seed).permutation(scores.shape[1])
    return shuffled[np.argsort(-scores[:, shuffled], 1, kind="stable")[:, :k]]


def recall(scores, targets, k=20):
    "Return the mean recall@k of users with a target, and that of a random order."
    hits = np.take_along_axis(targets.toarray() > 0, best(scores, k), 1).sum(1)
    n = np.diff(targets.indptr)
    some = n > 0
    least = np.minimum(k, np.maximum(n, 1))
    return (hits / least)[some].mean(), (n * k / targets.shape[1] / least)[some].mean()


def ndcg(scores, targets, k=10):
    "Return the NDCG@k of each user with a target."
    hits = np.take_along_axis(targets.toarray() > 0, best(scores, k), 1)
    n = np.diff(targets.indptr)
    gains = 1 / np.log2(np.arange(k) + 2)
    return (hits @ gains)[n > 0] / np.cumsum(gains)[np.minimum(k, n[n > 0]) - 1]


def measure(data, model, features):
    "Measure a model on the cold items and on the others."
    scores = model.fit(data.history, features).score(data.history)
    cold, chance = recall(scores[:, data.cold], data.cold_targets[:, data.cold])
    unseen = np.where(data.history.toarray() > 0, -np.inf, scores)
    return SimpleNamespace(
        model=model,
        cold=cold,
        chance=chance,
        warm=ndcg(np.where(data.cold, -np.inf, unseen), data.warm_targets),
        every=ndcg(unseen, data.targets),
        cold_listed=data.cold[best(unseen, 20)].mean(),
    )


# Settings, and the models' defaults, were chosen on the validation fold of other splits with other items made cold.
@pytest.mark.parametrize(
    "name,hp", [("rlae", {"lam": 300.0, "xi": 0.3}), ("mult_dae", {"preset": "small", "lr": 0.003, "num_epoch": 40})]
)
def test_cold_items_are_found_and_warm_items_are_not_lost(name, hp, data):
    with_features, without = (measure(data, create_model(name, **hp), features) for features in (data.features, None))
    error = without.warm.std() / len(without.warm) ** 0.5  # of the mean over users
    found = (
        f"{name}: recall@20 among the cold {with_features.cold:.4f} (without features {without.cold:.4f}, by chance "
        f"{with_features.chance:.4f}); warm NDCG@10 {with_features.warm.mean():.4f} "
        f"(without {without.warm.mean():.4f}, standard error {error:.4f}); all targets "
        f"{with_features.every.mean():.4f} (without {without.every.mean():.4f}); "
        f"cold items in lists of 20: {with_features.cold_listed:.1%} (without {without.cold_listed:.1%})"
    )
    print(found)
    assert with_features.cold > 4 * with_features.chance, found
    assert with_features.cold > 2 * without.cold, found
    assert with_features.warm.mean() > without.warm.mean() - error, found
    assert with_features.every.mean() > without.every.mean() - 1.5 * error, (
        found
    )  # ranked among all items: cold items displace warm ones
    assert with_features.cold_listed > 0, found
    # histories of cold items only
    own = data.cold_targets
    rng = np.random.default_rng(0)
    others = own[rng.permutation(own.shape[0])]
    informed, misled = (
        ndcg(
            np.where(data.cold, -np.inf, np.where(data.history.toarray() > 0, -np.inf, with_features.model.score(h))),
            data.warm_targets,
        ).mean()
        for h in (own, others)
    )
    assert informed > misled, (
        f"{name}: NDCG@10 of the warm from own cold items alone {informed:.4f}, from another user's {misled:.4f}"
    )


def test_only_features_reveal_cold_items(data):
    """Check that cold items are in no history and have no score without features, and that a random order finds as many
    as expected.
    """
    assert not data.history[:, data.cold].nnz and data.cold_targets.nnz > 5_000
    scores = np.random.default_rng(0).random((data.history.shape[0], data.cold.sum()))
    found, chance = recall(scores, data.cold_targets[:, data.cold])
    assert abs(found - chance) < 0.01 and 0.02 < chance < 0.04
    ease = create_model("ease").fit(data.history)
    assert np.abs(ease.score(data.history[:50])[:, data.cold]).max() < 1e-5


class Killed(Exception):
    "Raised instead of a kill -9."


@pytest.mark.parametrize("name,hp", NETS.items())
def test_interrupted_training_with_features_gives_the_same_bytes(name, hp, tmp_path, monkeypatch):
    """Interrupt training every few batches and resume with a new model: history, scores and bytes are those of one
    uninterrupted training, and a saved model scores like the trained one.
    """
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((120, 40)) < 0.3 * np.linspace(1.6, 0.4, 40))
    split = split_interactions(pd.DataFrame({"user_id": users, "item_id": items}), "holdout", seed=1)
    features = sparse.csr_matrix(rng.random((len(split.items), 5)) < 0.3, dtype=np.float32)

    def trained(folder=None):
        model = create_model(name, **hp, batch_size=32, num_epoch=4, lr=0.01, clip_norm=1.0)
        return model, training.train(
            model,
            split,
            patience=99,
            progress=False,
            item_features=features,
            checkpoints=folder,
            checkpoint_interval_s=0,
        )

    whole, history = trained()
    saved = training.Checkpoints.save
    kills = 0

    def save(self, *args):
        saved(self, *args)
        save.left -= 1
        if not save.left:
            raise Killed

    monkeypatch.setattr(training.Checkpoints, "save", save)
    while True:
        save.left = 5
        try:
            resumed, again = trained(tmp_path / "kept")
        except Killed:
            kills += 1
            continue
        break
    assert kills >= 3
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    assert {k: a.tobytes() for k, a in resumed.state().items()} == {k: a.tobytes() for k, a in whole.state().items()}
    assert {k: a.tobytes() for k, a in resumed.checkpoint().items()} == {
        k: a.tobytes() for k, a in whole.checkpoint().items()
    }
    save_model(whole, tmp_path / "saved")
    assert np.array_equal(load_model(tmp_path / "saved").score(split.test.input), whole.score(split.test.input))


@pytest.mark.parametrize("name,hp", NETS.items())
def test_memory_of_features_is_checked_before_it_is_allocated(name, hp):
    X, F = (
        sparse.random(*shape, 0.05, "csr", np.float32, np.random.default_rng(0))
        for shape in ((60, 2_000), (2_000, 9_000))
    )
    plain = create_model(name, **hp, num_epoch=1)
    featured = create_model(name, **hp, num_epoch=1)
    n_bytes = plain.cost(*X.shape, X.nnz)[1]
    more = create_model(name, **hp, num_epoch=1).fit(X, F).cost(*X.shape, X.nnz)[1]
    assert more > n_bytes + 16 * 9_000 * next(
        v for k, v in hp.items() if k in ("hidden_dim", "rank")
    )  # weights, gradients and two moments of the features
    plain.max_memory_gib = featured.max_memory_gib = (n_bytes + more) / 2 / 2**30 + 0.02
    assert plain.fit(X).n_items == 2_000
    test_error(lambda: featured.fit(X, F), "no_memory", name)
    assert featured.net is None
