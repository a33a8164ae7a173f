"Our own models, as strangers to the notebook as everybody else's."

import numpy as np
import torch
from common import serve

from aerec_nb.modeling import create_model
from aerec_nb.models.ranking import mask_history, score_blocks, top_k

torch.set_num_threads(1)


def closed_form(name):
    def fit(train, setting, look):
        look(create_model(name, **setting).fit(train))

    return fit, rank


def net(name):
    def fit(train, setting, look):
        model = create_model(name, **setting)
        rows = model.prepare(train)
        for epoch in range(1, model.num_epoch + 1):
            model.train_epoch(rows, epoch)
            if not look(model, epoch, epoch == model.num_epoch):
                break

    return fit, rank


def rank(model, histories, users, k):
    return np.concatenate(
        [top_k(mask_history(scores, histories[rows]), k)[0] for rows, scores in score_blocks(model, histories)]
    )


serve(
    "aerec_nb",
    lambda train: train,
    {name: closed_form(name) for name in ("ease", "rdlae")} | {name: net(name) for name in ("mult_dae", "recvae")},
)
