"Cornac: VAECF and EASE."

import cornac.models.vaecf.vaecf as vaecf
import numpy as np
import torch
from common import in_blocks, serve
from cornac.data import Dataset
from cornac.models import EASE, VAECF

torch.set_num_threads(1)


def prepare(train):
    rows = np.repeat(np.arange(train.shape[0]), np.diff(train.indptr))
    ratings = list(zip(rows.tolist(), train.indices.tolist(), train.data.tolist(), strict=True))
    data = Dataset.from_uir(ratings, seed=42)
    items = np.array([data.iid_map[i] for i in range(train.shape[1])])  # Cornac's column of each of ours
    return data, items, np.array([data.uid_map[u] for u in range(train.shape[0])])


def fit_ease(data, setting, look):
    look((EASE(verbose=False, **setting).fit(data[0]), data))


def fit_vaecf(data, setting, look):
    model = VAECF(seed=42, **setting)

    class Epochs:  # in place of the bar over the epochs that `learn` runs along
        def __init__(self, first, end, **_):
            self.range = range(first, end)

        def set_postfix(self, **_):
            pass

        def __iter__(self):
            for epoch in self.range:
                yield epoch
                if not look((model, data), epoch, epoch == self.range[-1]):
                    return

    vaecf.trange = Epochs
    model.fit(data[0])


def rank(fitted, histories, users, k):
    model, (_, items, rows) = fitted

    def known(histories, users):
        return np.stack([np.asarray(model.score(rows[u])).ravel()[items] for u in users])

    def unknown(histories, users):
        ours = np.argsort(items)  # our column of each of Cornac's
        theirs = histories[:, ours]
        if isinstance(model, EASE):
            return np.asarray(theirs @ model.B)[:, items]
        with torch.no_grad():
            return model.vae.decode(model.vae.encode(torch.from_numpy(theirs.toarray()))[0]).numpy()[:, items]

    return in_blocks(unknown if (users < 0).any() else known, histories, users, k)


serve("cornac", prepare, {"EASE": (fit_ease, rank), "VAECF": (fit_vaecf, rank)})
