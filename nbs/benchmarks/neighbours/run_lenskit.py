"LensKit: EASE, item neighbours and implicit matrix factorization."

import warnings

import numpy as np
import pandas as pd
import torch
from common import in_blocks, serve
from lenskit.als import ImplicitMFScorer
from lenskit.data import ItemList, RecQuery, from_interactions_df
from lenskit.knn import ItemKNNScorer
from lenskit.knn.ease import EASEScorer
from lenskit.training import TrainingOptions

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def prepare(train):
    rows = np.repeat(np.arange(train.shape[0]), np.diff(train.indptr))
    data = from_interactions_df(pd.DataFrame({"user_id": rows, "item_id": train.indices}))
    assert (data.items.ids() == np.arange(train.shape[1])).all()  # sorted ids: LensKit's columns are ours
    return data


def scorer(kind, **always):
    def fit(data, setting, look):
        model = kind(**always, **setting)
        model.train(data, TrainingOptions(rng=42, device="cpu"))
        look((model, data.items))

    return fit, rank


def rank(fitted, histories, users, k):  # a query brings the history, known or not
    model, items = fitted
    everything = ItemList(item_nums=np.arange(len(items)), vocabulary=items)

    def one(history, user):
        query = RecQuery(
            user_id=int(user) if user >= 0 else None,
            history_items=ItemList(item_nums=history.indices, vocabulary=items),
        )
        return model(query, everything).scores()

    def score(histories, users):
        return np.stack([one(histories[i], users[i]) for i in range(len(users))])

    return in_blocks(score, histories, users, k)


serve(
    "lenskit",
    prepare,
    {
        "EASE": scorer(EASEScorer),
        "ItemKNN": scorer(ItemKNNScorer, feedback="implicit"),
        "ImplicitMF": scorer(ImplicitMFScorer),
    },
)
