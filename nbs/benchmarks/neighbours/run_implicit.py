"implicit: its alternating least squares and its BM25 neighbours."

import numpy as np
from common import serve
from implicit.als import AlternatingLeastSquares
from implicit.nearest_neighbours import BM25Recommender


def fit_als(train, setting, look):
    model = AlternatingLeastSquares(random_state=42, num_threads=1, **setting)
    model.fit(train, show_progress=False)
    look(model)


def fit_bm25(train, setting, look):
    model = BM25Recommender(num_threads=1, **setting)
    model.fit(train, show_progress=False)
    look(model)


def rank_als(model, histories, users, k):  # recalculate_user solves for the factors of somebody unknown
    unknown = bool((users < 0).any())
    return model.recommend(np.arange(len(users)) if unknown else users, histories, N=k, recalculate_user=unknown)[
        0
    ].astype(np.int64)


def rank_bm25(model, histories, users, k):  # looks at the histories only
    found, scores = model.recommend(np.arange(len(users)), histories, N=k)
    return np.where(scores > 0, found, -1).astype(np.int64)


serve("implicit", lambda train: train, {"ALS": (fit_als, rank_als), "BM25": (fit_bm25, rank_bm25)})
