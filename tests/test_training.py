"Training as a process: kill -9 at random moments and go on, to the last bit; the experiment log in MLflow."

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import STRESS, run

from aerec_nb.testing import test_error
from aerec_nb.training import ExperimentLog

TRIALS = 10 if STRESS else 1  # `make stress` kills ten times as often

# One process imports everything and forks: each attempt costs what it trains, not what Python imports. It computes
# nothing itself, so forking is safe.
KILLED = textwrap.dedent("""
    import json, os, random, signal, sys, time
    from pathlib import Path
    import numpy as np, pandas as pd
    from safetensors.numpy import save
    from aerec_nb.model_preprocessing import split_interactions
    from aerec_nb.modeling import create_model
    from aerec_nb.training import train
    folder, name, hp = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    seed, kills = int(sys.argv[4]), int(sys.argv[5])
    dice = random.Random(seed)

    def attempt(checkpoints, result):
        rng = np.random.default_rng(0)
        rows, cols = np.nonzero(rng.random((300, 80)) < .2*np.linspace(2, .2, 80))
        split = split_interactions(pd.DataFrame(dict(user_id=rows, item_id=cols)), 'holdout', seed=1)
        model = create_model(name, **hp)
        checkpoint_interval_s = 0 if checkpoints else 60
        history = train(model, split, patience=99, progress=False, checkpoints=checkpoints,
                        checkpoint_interval_s=checkpoint_interval_s)
        (folder/result).write_bytes(save(model.state()) + json.dumps(history.to_dict('list')).encode())

    def child(*args, after=None):
        "Exit status of an attempt, killed after so many seconds."
        pid = os.fork()
        if not pid:
            try: attempt(*args); os._exit(0)
            except BaseException as e: print(repr(e), file=sys.stderr, flush=True); os._exit(1)
        if after is not None: time.sleep(after); os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    assert child(None, 'whole') == 0
    began = time.perf_counter(); assert child(folder/'timing', 'timed') == 0; took = time.perf_counter()-began
    killed = [child(folder/'kept', 'resumed', after=dice.uniform(.02, .5)*took) for _ in range(kills)]
    assert child(folder/'kept', 'resumed') == 0
    same = (folder/'resumed').read_bytes() == (folder/'whole').read_bytes() == (folder/'timed').read_bytes()
    failed = [k for k in killed if k and not os.WIFSIGNALED(k)]
    print(json.dumps(dict(killed=sum(os.WIFSIGNALED(k) for k in killed), failed=failed, same=same,
                          left=sorted(p.suffix for p in (folder/'kept').iterdir()))))
""")


NETS = {
    "mult_vae": {"hidden_dim": 24, "latent_dim": 8, "batch_size": 50, "num_epoch": 6, "anneal_steps": 20},
    "recvae": {
        "hidden_dim": 16,
        "latent_dim": 6,
        "batch_size": 100,
        "num_epoch": 3,
        "cosine_epochs": 3,
        "clip_norm": 1.0,
    },
}


@pytest.mark.parametrize("name", NETS if STRESS else ["mult_vae"])
@pytest.mark.slow
def test_killed_at_any_moment_training_goes_on_to_the_last_bit(name, tmp_path, environ):
    hp = NETS[name]
    for trial in range(TRIALS):
        folder = tmp_path / str(trial)
        folder.mkdir()
        done = run(sys.executable, "-c", KILLED, folder, name, json.dumps(hp), trial, 4, env=environ, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["same"] and not found["failed"] and found["killed"] >= 2, found
        assert found["left"] == [".json", ".safetensors"], found


STAGE = (
    "from aerec_nb.core.artifacts import open_run; "
    "r = open_run('r', env='test', model='mult_dae', hidden_dim=8, batch_size=16, "
    "num_epoch=40, patience=40, checkpoint_interval_s=0); "
)


@pytest.mark.slow
def test_a_killed_stage_goes_on_in_its_run_and_in_its_log(environ, tmp_path):
    environ["AEREC_TRAINING__TRACKING_URI"] = f"sqlite:///{tmp_path}/var/registry.db"

    def python(do):
        return [sys.executable, "-c", STAGE + do]

    assert (done := run(*python("r.ensure('modeling')"), env=environ, cwd=tmp_path)).returncode == 0, done.stderr[
        -3000:
    ]
    kept = Path(environ["AEREC_RUNS_DIR"]) / "r" / ".training" / "mult_dae" / "checkpoint.json"
    for reach in (1, 10)[: 1 if TRIALS == 1 else 2]:
        process = subprocess.Popen(
            python("r.execute('training')"),
            env=environ,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(1200):
            if process.poll() is not None:
                pytest.fail(f"ended before it was killed: {process.stderr.read()[-3000:]}")
            if kept.exists() and json.loads(kept.read_text())["progress"]["epoch"] >= reach:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kept.exists()
    both = (
        "import json; print(json.dumps([json.loads((r.execute('training')/'manifest.json').read_text())['outputs'] "
        "for _ in range(2)])); "
    )
    look = (
        "from mlflow.tracking import MlflowClient; import os; c = "
        "MlflowClient(os.environ['AEREC_TRAINING__TRACKING_URI']); e = c.get_experiment_by_name('aerec'); "
        "print(json.dumps([[t.info.status, t.data.params['hidden_dim'], t.data.tags['data.fingerprint'][:4], [m.step "
        "for m in c.get_metric_history(t.info.run_id, 'ndcg')], "
        "[a.path for a in c.list_artifacts(t.info.run_id)]] for t in c.search_runs([e.experiment_id], "
        "order_by=['attributes.start_time'])]))"
    )
    done = run(
        *python(both + look), env=environ, cwd=tmp_path
    )  # goes on to the end; then once more from the beginning, uninterrupted
    assert done.returncode == 0, done.stderr[-3000:]
    outputs, logged = (json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[[", "[{")))
    assert outputs[0] == outputs[1] and "mult_dae/model.safetensors" in outputs[0]
    assert not kept.parent.parent.exists()
    assert len(logged) == 2, logged  # the killed training is one run of the log, not two
    for status, width, _fingerprint, steps, pictures in logged:
        assert (status, width, sorted(steps), pictures) == ("FINISHED", "8", list(range(1, 41)), ["curves.png"]), logged


def test_an_experiment_log_that_is_no_database(tmp_path):
    (path := tmp_path / "registry.db").write_bytes(b"no database" * 100)
    test_error(lambda: ExperimentLog(f"sqlite:///{path}"), "cannot_open", "training.tracking_uri")
    assert path.read_bytes() == b"no database" * 100
