"""Record what the package does on given data, and compare two records.

    python tests/record_behaviour.py record before.json sample path/to/ml-100k
    python tests/record_behaviour.py compare before.json after.json

A record holds, for each data set: the sha256 of every artifact file, the metrics of every stage, the OpenAPI document,
the events of the simulated traffic, and 1,000 lists from the packed bundle. Times, ids that are drawn at random,
measured seconds and the hashes of files that hold such values are left out. Two records of the same code on the same
machine are equal.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BIN = Path(sys.executable).parent
MEASURED = re.compile(
    r"(^|_)(ms|seconds|s|mib|rss|memory|time|latency|version|at|request_id|event_id|reasons)($|_)|run$"
)
TIMED_STAGES = ("configuration", "serving", "monitoring")  # their files hold paths or times
N_LISTS = 1000


def run_pipeline(data: str, folder: Path) -> Path:  # the run's folder
    "Run the twelve stages on one data set, with all stores in `folder`."
    env = {name: value for name, value in os.environ.items() if not name.startswith("AEREC_")}
    env |= {"AEREC_RUNS_DIR": str(folder / "runs"), "AEREC_PATHS__VAR_DIR": str(folder / "var"), "OMP_NUM_THREADS": "1"}
    command = [str(BIN / "aerec"), "run", "--data", data, "--run", "recorded"]
    subprocess.run(command, env=env, check=True, stdout=sys.stderr)
    return folder / "runs" / "recorded"


def without_measurements(value):
    "Drop the entries of nested dicts whose name says that they are measured or drawn at random."
    if isinstance(value, dict):
        return {k: without_measurements(v) for k, v in value.items() if not MEASURED.search(k)}
    if isinstance(value, list):
        return [without_measurements(v) for v in value]
    return value


def record_stages(run: Path) -> dict:  # stage -> metrics and file hashes
    "Read metrics and file hashes from the manifests of a run."
    found = {}
    for path in sorted(run.glob("*/manifest.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stage = path.parent.name
        outputs = manifest["outputs"]
        hashes = {name: None if stage in TIMED_STAGES else entry["sha256"] for name, entry in outputs.items()}
        found[stage] = {"metrics": without_measurements(manifest["metrics"]), "files": hashes}
    return found


def record_lists(recommender) -> dict:  # request -> ids, scores, and whether it was a fallback
    "Ask for 1,000 lists: known users, given histories, with and without seen items, short and long."
    import numpy as np

    rng = np.random.default_rng(0)
    found = {}
    for n in range(N_LISTS):
        request = {"k": int(rng.choice([1, 5, 10, 50])), "exclude_seen": bool(rng.random() < 0.8)}
        if n % 2:
            size = min(int(rng.integers(0, 20)), len(recommender.items))
            chosen = rng.choice(len(recommender.items), size, replace=False)
            request["history"] = [recommender.items[i] for i in chosen]
        else:
            request["user_id"] = recommender.users[int(rng.integers(len(recommender.users)))]
        answer = recommender.recommend(**request)
        scores = [float(f"{item['score']:.5g}") for item in answer]
        found[f"{n} {json.dumps(request, default=str)}"] = [answer.item_ids, scores, answer.fallback_used]
    return found


def record_events(run: Path) -> list:  # [kind, user, item, value, simulated], sorted
    "Read the events of the simulated traffic, without ids and times."
    import pandas as pd

    events = pd.read_parquet(run / "serving" / "events.parquet")
    kept = events[["kind", "user_id", "item_id", "value", "simulated"]].astype(object)
    rows = kept.where(kept.notna(), None).values.tolist()
    return sorted(rows, key=lambda row: json.dumps(row, default=str))


def record(data: str) -> dict:  # see the text at the top
    "Run one data set and collect what the package did."
    from aerec_nb.packaging import load_bundle
    from aerec_nb.serving import create_app

    with tempfile.TemporaryDirectory(prefix="aerec-record-") as folder:
        run = run_pipeline(data, Path(folder))
        os.environ["AEREC_PATHS__VAR_DIR"] = str(Path(folder) / "var")
        recommender = load_bundle(run / "packaging" / "bundle")
        return {
            "stages": record_stages(run),
            "events": record_events(run),
            "openapi": json.loads(json.dumps(create_app(recommender).openapi())),
            "lists": record_lists(recommender),
        }


def differences(before, after, path: str = "", tolerance: float = 1e-6) -> list:
    "List the places where two records differ; floats may differ by a relative `tolerance`."
    if isinstance(before, dict) and isinstance(after, dict):
        found = [f"{path}/{k}: only before" for k in sorted(before.keys() - after.keys())]
        found += [f"{path}/{k}: only after" for k in sorted(after.keys() - before.keys())]
        for k in sorted(before.keys() & after.keys()):
            found += differences(before[k], after[k], f"{path}/{k}", tolerance)
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for n, (a, b) in pairs for line in differences(a, b, f"{path}[{n}]", tolerance)]
    if isinstance(before, float) and isinstance(after, float):
        both_nan = math.isnan(before) and math.isnan(after)
        close = both_nan or abs(before - after) <= tolerance * max(abs(before), abs(after))
        return [] if close else [f"{path}: {before!r} -> {after!r}"]
    return [] if before == after else [f"{path}: {str(before)[:80]} -> {str(after)[:80]}"]


def main() -> int:  # exit code: `compare` gives 1 where records differ
    "Record or compare."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("data", nargs="+", help="what `aerec run --data` accepts")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        found = {Path(data).name: record(data) for data in args.data}
        args.file.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        print(f"{args.file}: sha256 {hashlib.sha256(args.file.read_bytes()).hexdigest()}")
        return 0
    found = differences(*(json.loads(p.read_text(encoding="utf-8")) for p in (args.before, args.after)))
    print("\n".join(found[:200]) or "no differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
