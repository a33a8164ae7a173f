"RecBole: MultiVAE, RecVAE and EASE."

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from common import in_blocks, serve
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.utils import get_model, get_trainer, init_seed

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def config(model, folder, **setting):
    # which RecBole would read as its own
    arguments = sys.argv
    sys.argv = sys.argv[:1]
    try:
        return Config(
            model=model,
            dataset="ml",
            config_dict={
                "data_path": folder,
                "load_col": {"inter": ["user_id", "item_id"]},
                "use_gpu": False,
                "state": "ERROR",
                "show_progress": False,
                "reproducibility": True,
                "seed": 42,
            }
            | setting,
        )
    finally:
        sys.argv = arguments


def prepare(train):
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "ml").mkdir()
    rows = np.repeat(np.arange(train.shape[0]), np.diff(train.indptr))
    with open(Path(folder.name) / "ml" / "ml.inter", "w") as f:
        f.write("user_id:token\titem_id:token\n")
        f.writelines(f"{u}\t{i}\n" for u, i in zip(rows.tolist(), train.indices.tolist(), strict=True))
    data = create_dataset(config("MultiVAE", folder.name))
    data._change_feat_format()  # tables of tensors, as after RecBole's own split; here all of it is for training
    # RecBole's column of each of ours; its column 0 is padding
    items = np.array([data.token2id("item_id", str(i)) for i in range(train.shape[1])])
    return data, folder, items, np.array([data.token2id("user_id", str(u)) for u in range(train.shape[0])])


def net(name):
    def fit(data, setting, look):
        c = config(name, data[1].name, **setting)
        init_seed(c["seed"], True)
        model = get_model(name)(c, data[0]).to("cpu")
        loader = get_dataloader(c, "train")(c, data[0], None, shuffle=True)
        trainer = get_trainer(c["MODEL_TYPE"], name)(c, model)
        for epoch in range(1, c["epochs"] + 1):
            model.train()
            trainer._train_epoch(loader, epoch - 1)
            model.eval()
            if not look((model, data), epoch, epoch == c["epochs"]):
                break

    return fit, rank


def fit_ease(data, setting, look):
    look((get_model("EASE")(config("EASE", data[1].name, **setting), data[0]), data))


def rank(fitted, histories, users, k):
    model, (dataset, _, items, rows) = fitted

    @torch.no_grad()
    def known(histories, users):
        return (
            model.full_sort_predict(Interaction({"user_id": torch.from_numpy(rows[users])}))
            .numpy()
            .reshape(len(users), -1)[:, items]
        )

    @torch.no_grad()
    def unknown(histories, users):
        x = np.zeros((len(users), dataset.item_num), np.float32)
        x[:, items] = histories.toarray()
        if hasattr(model, "item_similarity"):
            return np.asarray(x @ model.item_similarity)[:, items]
        x = torch.from_numpy(x)
        return (model(x, 0.0) if hasattr(model, "prior") else model(x))[0].numpy()[:, items]

    return in_blocks(unknown if (users < 0).any() else known, histories, users, k)


serve("recbole", prepare, {"MultiVAE": net("MultiVAE"), "RecVAE": net("RecVAE"), "EASE": (fit_ease, rank)})
