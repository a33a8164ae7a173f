"Every built-in model passes the conformance suite, and a model is imported only when it is used."

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import sparse

from aerec_nb.core.plugins import built_ins
from aerec_nb.models.cold_start import ColdStartWrapper
from aerec_nb.models.ensemble import Blend
from aerec_nb.models.planning import plan
from aerec_nb.models.registry import create_model, hyperparameters, load_model, model_class, save_model
from aerec_nb.testing import check_fitted, check_model, toy_histories

SMALL = {
    "autoencoder": {"hidden_dim": 6, "num_epoch": 2},
    "mult_dae": {"hidden_dim": 6, "num_epoch": 2},
    "mult_vae": {"hidden_dim": 6, "latent_dim": 4, "num_epoch": 2},
    "recvae": {"hidden_dim": 6, "latent_dim": 4, "num_epoch": 2},
    "elsa": {"rank": 4, "num_epoch": 2},
    "ials": {"factors": 4},
    "blend": {"members": ["popularity", "ease", {"name": "elsa", "hyperparameters": {"rank": 4, "num_epoch": 1}}]},
}
NAMES = list(built_ins("models"))
SHAPES = {"more users": (60, 20), "more items": (15, 40)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("with_features", [False, True], ids=["plain", "features"])
@pytest.mark.parametrize("name", NAMES)
def test_built_in_models_conform(name, with_features, shape):
    if name == "ials" and not importlib.util.find_spec("implicit"):
        pytest.skip("implicit is not installed")
    features = None
    if with_features:
        features = sparse.csr_matrix(np.random.default_rng(1).random((shape[1], 4)) < 0.4, dtype=np.float32)
    check_model(name, toy_histories(*shape), features, **SMALL.get(name, {}))


def test_wrapped_and_blended_models_conform(tmp_path):
    train = toy_histories(40, 20)
    features = sparse.csr_matrix(np.random.default_rng(1).random((23, 4)) < 0.4, dtype=np.float32)
    wrapped = [ColdStartWrapper.wrap(create_model(name).fit(train), features) for name in ("ease", "popularity")]
    histories = sparse.csr_matrix((train.data, train.indices, train.indptr), (40, 23))
    for model in (*wrapped, Blend.from_models(wrapped, [2, 1])):
        check_fitted(model, histories)
        save_model(model, tmp_path / model.name)
        assert np.array_equal(load_model(tmp_path / model.name).score(histories), model.score(histories))


@pytest.mark.parametrize("name", NAMES)
def test_built_in_models_are_described_and_planned(name):
    assert model_class(name).__doc__ and model_class(name).name == name
    assert set(model_class(name).tune_space) <= set(hyperparameters(name))
    for preset in model_class(name).presets:
        assert create_model(name, preset).hyperparameters.items() >= model_class(name).presets[preset].items()
    assert plan(name, 100, 50, 1000, 10**6).n_bytes > 0


def test_torch_is_imported_with_the_first_model_that_uses_it():
    script = """
import sys
import numpy as np
from scipy import sparse
from aerec_nb.modeling import Blend, create_model, load_model, model_names, plan, save_model
X = sparse.csr_matrix(np.eye(4, dtype=np.float32))
model = create_model("blend", members=["popularity", "item_knn"]).fit(X)
model.score(X)
plan("popularity", 10, 10, 10)
print("torch" in sys.modules)
from aerec_nb.modeling import AutoEncoder
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True"]
