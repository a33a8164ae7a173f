"""What the runners beside it share.

A runner lives in its library's own environment, is started with a folder that holds a job, and then answers lines of
JSON: it is told a setting, fits it, and shows the ranked lists it has come to. It chooses nothing, since only the
notebook knows the held-out items and the clock."""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from scipy import sparse

answers = os.fdopen(os.dup(1), "w")  # libraries print where they like; the notebook reads only this
os.dup2(2, 1)


def say(**what):
    print(json.dumps(what), file=answers, flush=True)


def memory(field):  # VmRSS: now; VmHWM: at most so far
    "MiB of this process alone."
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(field))) / 1024


def best(scores, history, k):  # [n, n_items], CSR [n, n_items] -> int64 [n, k]
    "The k best items of every row, best first and without the history; -1 where fewer can be scored."
    scores = np.array(scores, np.float32)
    scores[np.isnan(scores)] = -np.inf
    scores[np.repeat(np.arange(len(scores)), np.diff(history.indptr)), history.indices] = -np.inf
    k = min(k, scores.shape[1])
    top = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)  # of equal scores the lower index comes first
    top = np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable"), 1)
    return np.where(np.isfinite(np.take_along_axis(scores, top, 1)), top, -1)


def in_blocks(score, histories, users, k, size=200):
    "The lists of all rows, where `score(histories, users)` gives dense scores of a block."
    return np.concatenate(
        [
            best(score(histories[i : i + size], users[i : i + size]), histories[i : i + size], k)
            for i in range(0, len(users), size)
        ]
    )


def due(epoch):  # 2, 4, ..., 10, 15, 20, 30, ...
    "Whether a net is looked at after this epoch."
    if epoch <= 10:
        return epoch % 2 == 0
    if epoch <= 20:
        return epoch % 5 == 0
    return epoch % 10 == 0


def serve(package, prepare, models):
    """Do the job in the folder that is named on the command line; `models` has a pair of functions by name: fit(data,
    setting, look), rank(model, histories, users, k).
    """
    # CPU seconds of all threads: what else the machine does is not counted
    resting = memory("VmRSS")
    folder = Path(sys.argv[1])
    clock = time.process_time
    job = json.loads((folder / "job.json").read_text())
    train, histories = (sparse.load_npz(folder / f"{name}.npz") for name in ("train", "histories"))
    users = np.load(folder / "users.npy")  # rows of train, -1 for somebody who is not in it
    fit, rank = models[job["model"]]
    start = clock()
    data = prepare(train)
    say(version=importlib.metadata.version(package), data_s=clock() - start)

    def fit_one(line):
        "Fit one setting, and show its lists."
        # setting; epoch: only this one is looked at, None: all that are due; repeats: rankings that are timed
        asked = json.loads(line)
        start = clock()
        aside = 0.0

        def look(model, epoch=0, last=True):
            "Show the lists of a model; whether to go on."
            nonlocal aside
            if not (epoch == asked["epoch"] if asked["epoch"] else last or due(epoch)):
                return True
            began = clock()
            seconds = []
            for _ in range(asked["repeats"]):
                again = clock()
                top = rank(model, histories, users, job["k"])
                seconds.append(clock() - again)
                if sum(seconds) > 10:
                    break
            np.save(folder / "top.npy", top)
            say(
                epoch=epoch,
                fit_s=began - start - aside,
                score_s=float(np.median(seconds)),
                spent_s=clock() - start,
                peak_mib=memory("VmHWM") - resting,
            )
            go_on = sys.stdin.readline().strip() == "on"
            aside += clock() - began
            return go_on

        try:
            fit(data, asked["setting"], look)
        except Exception as e:
            say(failed=f"{type(e).__name__}: {e}".splitlines()[0][:200], spent_s=clock() - start)
        else:
            say(done=True, spent_s=clock() - start)

    for line in iter(sys.stdin.readline, ""):
        fit_one(line)
