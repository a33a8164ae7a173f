"""The `aerec` command as a person or a script uses it: help, JSON, exit codes, completion, the doctor, the plain
papermill command.
"""

import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading

import pytest
from conftest import BIN, ROOT, STRESS, run, variables

from aerec_nb import pipeline
from aerec_nb.core.artifacts import all_runs, open_run
from aerec_nb.core.files import FileError
from aerec_nb.core.stages import STAGES


@pytest.fixture
def here(tmp_path, monkeypatch):
    "Stores of its own and an unrelated working folder, for commands that are called in this process."
    for name in [n for n in os.environ if n.startswith("AEREC_")]:
        monkeypatch.delenv(name)
    for name, value in variables(tmp_path).items():
        if name.startswith("AEREC_"):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def met(monkeypatch):
    "The errors that commands called in this process have reported."
    found = []
    report = pipeline._report

    def noted(error):
        found.append(error)
        return report(error)

    monkeypatch.setattr(pipeline, "_report", noted)
    return found


def aerec(capsys, *words):
    try:
        code = pipeline.main([str(w) for w in words])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


COMMANDS = [
    "run",
    "stage",
    "sweep",
    "runs",
    "config",
    "data",
    "recommend",
    "models",
    "serve",
    "monitor",
    "new",
    "doctor",
]


def test_help_names_every_command_and_shows_examples(capsys):
    code, out, _ = aerec(capsys, "--help")
    assert code == 0 and all(re.search(rf"(?m)^    {c}\b", out) for c in COMMANDS) and "exit codes" in out
    for words in (
        [[c] for c in COMMANDS]
        + [["runs", w] for w in ("list", "show", "compare", "prune")]
        + [["models", w] for w in ("list", "show", "diff", "verify", "promote", "rollback", "history", "archive", "gc")]
    ):
        code, out, _ = aerec(capsys, *words, "--help")
        assert code == 0 and f"aerec {' '.join(words)}" in out[out.index("examples:") :], words


@pytest.mark.parametrize(
    "words, code, where",
    [
        (["recommend"], "missing_value", "USER"),
        (["stage", "train"], "unknown_name", "train"),
        (["run", "--from", "training", "--to", "01"], "empty_range", "training"),
        (["run", "--only", "training", "--from", "03"], "conflict", "--only"),
        (["run", "--resume"], "not_found", "test"),
        (["run", "--resume", "--run", "x"], "conflict", "--resume"),
        (["runs", "show", "nope"], "not_found", "nope"),
        (["sweep", "-p", "lr", "0.1"], "missing_value", "-p"),
        (["models", "promote", "x", "live"], "not_a_number", "x"),
        (["run", "--env", "live"], "not_allowed", "training.training_enabled"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, code, where, here, capsys, met):
    assert_one_line(capsys, words, here)
    assert [(e.code, e.where) for e in met] == [(code, where)]


# Refused by the settings and by the import: the line holds the name that was given.
@pytest.mark.parametrize("words", [["sweep", "-p", "lrr", "1,2"], ["data", "nowhere"], ["config", "--env", "prod"]])
def test_a_mistake_found_below_is_one_line_and_exit_code_2(words, here, capsys, met):
    given = next(w for w in words if w in ("lrr", "nowhere", "prod"))
    assert given in assert_one_line(capsys, words, here)
    assert len(met) == 1


def assert_one_line(capsys, words, folder):
    code, out, err = aerec(capsys, *words)
    assert code == 2 and len(err.strip().splitlines()) == 1, (code, out, err)
    assert not (folder / "runs").exists()
    return err


def test_what_argparse_refuses_is_exit_code_2(capsys):
    assert (
        aerec(capsys, "nonsense")[0] == 2
        and aerec(capsys)[0] == 2
        and aerec(capsys, "models", "promote", "1", "moon")[0] == 2
    )


def test_config(here, capsys):
    code, out, _ = aerec(capsys, "config", "training.lr")
    assert code == 0 and "learning rate" in out and "topk" not in out
    rows = json.loads(aerec(capsys, "config", "--diff", "dev", "live", "--json")[1])
    assert any(r["setting"] == "training.training_enabled" for r in rows)


def test_data(here, capsys):
    code, out, _ = aerec(capsys, "data", "--json")
    assert code == 0 and json.loads(out)["source"] == "sample" and json.loads(out)["users"] > 0
    (here / "mine").mkdir()
    (here / "mine" / "ratings.csv").write_text("user,item\na,1\nb,1\nb,2\n")
    assert json.loads(aerec(capsys, "data", "mine", "--json")[1])["interactions"] == 3


def test_dry_run_says_why_and_writes_nothing(here, capsys):
    code, out, _ = aerec(capsys, "run", "--dry-run", "--to", "02", "--commands")
    assert code == 0 and out.count("papermill ") == 5
    rows = json.loads(aerec(capsys, "run", "--dry-run", "--to", "02", "--json")[1])
    reasons = ["never_run"] * 2 + ["input_made_anew"] * 3 + ["not_asked"] * 7
    assert [r["reason"] for r in rows] == reasons and all(r["why"] in out for r in rows)
    assert not (here / "runs").exists()


def test_the_plain_papermill_command_runs_the_stage(here, capsys, environ):
    code, out, _ = aerec(capsys, "stage", "00", "--print")
    words = shlex.split(out)
    assert code == 0 and words[0] == "papermill" and words[-1] == "00_configuration.out.ipynb"
    done = run(BIN / "papermill", "--no-progress-bar", *words[1:], env=environ, cwd=here)
    assert done.returncode == 0, done.stderr
    name = all_runs(here / "runs")[0].name
    code, out, _ = aerec(capsys, "stage", "configuration", "--run", name, "--print")
    assert shlex.split(out)[-3:] == ["-p", "run", name] and f"{name}/notebooks/00_configuration.ipynb" in out


def test_runs(here, capsys):
    for lr in (0.1, 0.2):
        opened = open_run(lr=lr)
        opened.quiet = True
        opened.ensure("configuration")
    listed = json.loads(aerec(capsys, "runs", "list", "--json")[1])
    assert [r["given"] for r in listed] == ["lr 0.2", "lr 0.1"] and listed[0]["state"] == "in part"
    shown = json.loads(aerec(capsys, "runs", "show", listed[0]["run"], "--json")[1])
    assert [r["state"] for r in shown[:2]] == ["done", "missing"]
    assert aerec(capsys, "runs", "compare", listed[0]["run"], listed[1]["run"])[1].strip() == "nothing"
    assert json.loads(aerec(capsys, "runs", "prune", "--keep", "1", "--json")[1]) == [listed[1]["run"]]
    assert [p.name for p in all_runs(here / "runs")] == [listed[0]["run"]]


def test_doctor(here, capsys, monkeypatch):
    code, out, _ = aerec(capsys, "doctor", "--json")
    rows = {r["check"]: r for r in json.loads(out)}
    assert code == 0 and rows["notebooks"]["state"] == "fine" and rows["registry"]["state"] == "note", out
    assert not (here / "var").exists(), "looking makes nothing"
    monkeypatch.setenv("AEREC_TRAINING__LR", "-1")
    code, out, _ = aerec(capsys, "doctor")
    assert code == 1 and "FAULT" in out and "training.lr" in out
    monkeypatch.delenv("AEREC_TRAINING__LR")
    (here / "empty").mkdir()
    monkeypatch.setenv("AEREC_PROJECT", str(here / "empty"))
    code, out, _ = aerec(capsys, "doctor", "--json")
    rows = {r["check"]: r for r in json.loads(out)}
    assert code == 1 and rows["notebooks"]["state"] == "fault" and "aerec new" in rows["notebooks"]["fix"], out


# --- what the machine refuses: one line, exit code 1, and nothing half-written

UNPRIVILEGED = (
    ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
)  # so that file modes count for root as well


def refused(*words, env, cwd, code=1):
    "Run the command without privileges; return the one line that it says."
    done = run(*UNPRIVILEGED, BIN / "aerec", *words, env=env, cwd=cwd, timeout=100)
    assert done.returncode == code and len(done.stderr.strip().splitlines()) == 1, (words, done.stdout, done.stderr)
    return done.stderr.strip()


@pytest.fixture
def closed(tmp_path):
    "Take write permission from a folder until the test ends."
    taken = []

    def close(folder, mode=0o555):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(mode)
        taken.append(folder)
        return folder

    yield close
    for folder in taken:
        folder.chmod(0o755)


def test_stores_that_may_not_be_written(closed, environ, tmp_path):
    var = closed(tmp_path / "var")
    for words in (["models", "list"], ["serve", "--port", "0"], ["run", "--data", "sample"]):
        assert str(var) in refused(*words, env=environ, cwd=tmp_path), words
    assert list(var.iterdir()) == [] and not (tmp_path / "runs").exists()


def test_the_doctor_never_fails_itself(closed, environ, tmp_path):
    closed(tmp_path / "var", 0o000)
    closed(tmp_path / "runs", 0o000)
    done = run(*UNPRIVILEGED, BIN / "aerec", "doctor", "--json", env=environ, cwd=tmp_path)
    assert done.returncode == 1 and not done.stderr, done.stderr
    rows = {r["check"]: r for r in json.loads(done.stdout)}
    for check in ("folder runs_dir", "folder var_dir", "runs", "registry", "event log"):
        assert rows[check]["state"] == "fault" and str(tmp_path) in rows[check]["found"] and rows[check]["fix"], rows[
            check
        ]
    assert rows["notebooks"]["state"] == rows["settings of dev"]["state"] == "fine" and "memory" in rows


def test_a_run_that_may_not_be_read_stops_no_other(closed, here, environ, tmp_path):
    for lr in (0.1, 0.2):
        opened = open_run(lr=lr)
        opened.quiet = True
        opened.ensure("configuration")
    newest, oldest = all_runs(tmp_path / "runs")
    closed(newest, 0o000)
    done = run(*UNPRIVILEGED, BIN / "aerec", "runs", "list", "--json", env=environ, cwd=tmp_path)
    assert done.returncode == 0 and [r["run"] for r in json.loads(done.stdout)] == [oldest.name]
    assert len(done.stderr.splitlines()) == 1 and newest.name in done.stderr, done.stderr
    newest.chmod(0o555)
    done = run(*UNPRIVILEGED, BIN / "aerec", "runs", "prune", "--keep", "0", "--json", env=environ, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout) == [oldest.name] and newest.name in done.stderr, done.stderr


def test_a_download_that_may_not_be_kept(closed, environ, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        cache = closed(tmp_path / "dataset") / ".cache"
        said = refused(
            "data",
            f"http://127.0.0.1:{server.server_port}/ratings.csv",
            env={**environ, "AEREC_PATHS__DATASET_DIR": str(tmp_path / "dataset")},
            cwd=tmp_path,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert str(cache) in said, said


def test_output_on_a_full_disk(environ, tmp_path):
    done = subprocess.run(
        f"{BIN}/aerec config > /dev/full", shell=True, env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("content", ["garbage", "truncated", "folder"])
def test_a_registry_that_is_none(content, here, capsys, met):
    var = here / "var"
    var.mkdir()
    if content == "folder":
        (var / "registry.db").mkdir()
    elif content == "garbage":
        (var / "registry.db").write_bytes(b"garbage" * 1000)
    else:
        import sqlite3

        with sqlite3.connect(var / "whole.db") as db:
            db.execute(
                "CREATE TABLE a AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n LIMIT 9000) SELECT x "
                "FROM n"
            )
        (var / "registry.db").write_bytes((var / "whole.db").read_bytes()[:5000])
    for words in (
        ["models", "list"],
        ["recommend", "1"],
        ["serve", "--port", "0"],
        ["monitor"],
        ["run", "--data", "sample"],
        ["models", "promote", "1", "dev"],
    ):
        code, _, err = aerec(capsys, *words)
        assert code == 1 and len(err.strip().splitlines()) == 1 and "registry.db" in err, (words, err)
        assert isinstance(met.pop(), FileError)
    rows = {r["check"]: r for r in json.loads(aerec(capsys, "doctor", "--json")[1])}
    assert rows["registry"]["state"] == "fault" and "registry.db" in rows["registry"]["found"]


def test_an_event_log_that_is_none(here, capsys, met):
    (here / "var").mkdir()
    (here / "var" / "events.db").write_bytes(b"garbage" * 1000)
    for words in (["serve", "--port", "0"], ["monitor"], ["monitor", "--once"]):
        code, _, err = aerec(capsys, *words)
        assert code == 1 and len(err.strip().splitlines()) == 1 and "events.db" in err, err
        assert isinstance(met.pop(), FileError)


def test_a_damaged_run_is_named_and_left_out(here, capsys, caplog, met, monkeypatch):
    monkeypatch.setenv("AEREC_RUN__LOG_LEVEL", "WARNING")  # the environment test only tells of errors
    for lr in (0.1, 0.2, 0.3):
        opened = open_run(lr=lr)
        opened.quiet = True
        opened.ensure("configuration")
    good, manifest, about = all_runs(here / "runs")
    (manifest / "configuration" / "manifest.json").write_text('{"stage": ')
    (about / "run.json").write_bytes(b"\xff\xfe")
    rows = json.loads(aerec(capsys, "runs", "list", "--json")[1])
    assert [(r["run"], r["state"], r["stages"]) for r in rows] == [
        (good.name, "in part", "1 of 12"),
        (manifest.name, "damaged", "0 of 12"),
    ]
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 2 and all("\n" not in line for line in warned), warned
    assert any(manifest.name in line and "configuration" in line for line in warned) and any(
        about.name in line and "run.json" in line for line in warned
    )
    shown = json.loads(aerec(capsys, "runs", "show", manifest.name, "--json")[1])
    assert shown[0]["state"] == "damaged"
    code, _, err = aerec(capsys, "runs", "show", about.name)
    assert code == 1 and about.name in err and len(err.splitlines()) == 1, err
    assert isinstance(met.pop(), FileError)
    for words in (
        ["runs", "compare", good.name, manifest.name],
        ["run", "--resume", "--dry-run"],
        ["run", "--dry-run", "--to", "data_import"],
    ):
        assert aerec(capsys, *words)[0] == 0, words
    rows = {r["check"]: r for r in json.loads(aerec(capsys, "doctor", "--json")[1])}
    assert (
        rows["runs"]["state"] == "note"
        and manifest.name in rows["runs"]["found"]
        and about.name in rows["runs"]["found"]
    )


def test_an_interrupted_command_is_one_line(environ, tmp_path):
    process = subprocess.Popen(
        [
            BIN / "python",
            "-c",
            "from unittest.mock import patch\nfrom aerec_nb import pipeline\nimport signal, time\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it\n"
            "def waits(args):\n    print('here', flush=True)\n    time.sleep(60)\n"
            "with patch.object(pipeline, '_cmd_config', waits): raise SystemExit(pipeline.main(['config']))",
        ],
        env=environ,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=30)[1], process.returncode) == ("interrupted\n", 130)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_tab_completion(environ, tmp_path):
    asked = [
        ("aerec", "swe"),
        ("aerec", "run", "-p", "num_ep"),
        ("aerec", "run", "--from", "train"),
        ("aerec", "models", "roll"),
        ("aerec", "run", "--re"),
    ]
    script = [f'eval "$({BIN}/aerec completion bash)"']
    for words in asked:
        script.append(f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); _aerec")
        script.append('echo "${COMPREPLY[@]}"')
    done = run("bash", "-c", "\n".join(script), env=environ, cwd=tmp_path)
    found = [line.split() for line in done.stdout.splitlines()]
    assert found[:4] == [["sweep"], ["num_epoch"], ["training"], ["rollback"]], done.stdout + done.stderr
    assert "--resume" in found[4]


def test_a_reader_that_goes_away(environ, tmp_path):
    done = subprocess.run(
        f"{BIN}/aerec config | head -1", shell=True, env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr


def test_every_stage_is_declared_with_what_it_leaves():
    assert all(s.outputs and s.timeout > 0 for s in STAGES.values())


def test_the_tutorial_on_ones_own_data(environ, tmp_path):
    (tmp_path / "mine.csv").write_text(
        "\n".join(
            [
                "person;thing;stars",
                *(f"p{u};t{(u * i) % 23};{1 + (u + i) % 5}" for u in range(40) for i in range(1, 12)),
            ]
        )
    )
    for given in (
        *([[]] if STRESS else []),
        ["-p", "data", tmp_path / "mine.csv", "-y", "{columns: {person: user_id, thing: item_id, stars: rating}}"],
    ):
        done = run(
            BIN / "papermill",
            "--no-progress-bar",
            ROOT / "nbs" / "tutorials" / "own_data.ipynb",
            tmp_path / "out.ipynb",
            *given,
            env=environ,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-2000:]
