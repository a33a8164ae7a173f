"RecTools: EASE."

import warnings

import numpy as np
import pandas as pd
from common import serve
from rectools.dataset import Dataset, IdMap, Interactions
from rectools.models import EASEModel
from scipy import sparse

warnings.filterwarnings("ignore")


def table(matrix):
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    return pd.DataFrame(
        {"user_id": rows, "item_id": matrix.indices, "weight": matrix.data, "datetime": pd.Timestamp("2000-01-01")}
    )


def dataset(matrix):  # ids are the matrix's own rows and columns, so that a second dataset has the same items
    n_users, n_items = matrix.shape
    return Dataset(IdMap(np.arange(n_users)), IdMap(np.arange(n_items)), Interactions(table(matrix)))


def fit(data, setting, look):
    look((EASEModel(recommend_n_threads=1, **setting).fit(data), data))


def rank(fitted, histories, users, k):  # somebody unknown is a user more in the dataset that `recommend` is given
    model, data = fitted
    if (users < 0).any():
        train = data.get_user_item_matrix()
        data = dataset(sparse.vstack([train, histories], format="csr"))
        users = train.shape[0] + np.arange(len(users))
    found = model.recommend(users, data, k=k, filter_viewed=True)
    at = pd.Series(np.arange(len(users)), users)[found.user_id].to_numpy()
    top = np.full((len(users), k), -1, np.int64)
    top[at, found["rank"].to_numpy() - 1] = found.item_id.to_numpy()
    return top


serve("rectools", dataset, {"EASE": (fit, rank)})
