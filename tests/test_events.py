"Test the event log: kill -9, a full disk, a locked or damaged file, a silent network, many writers, PostgreSQL."

import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from conftest import ROOT, STRESS, variables

from aerec_nb.core.errors import AerecError
from aerec_nb.core.settings import default_settings, load_settings
from aerec_nb.data import event_store
from aerec_nb.data.erasure import KEY_FILE
from aerec_nb.data.event_database import EventLogUnavailable, LogErrorCode, error_code, open_engine, sqlite_url
from aerec_nb.data.event_log import EventLog
from aerec_nb.data.events import load_events, new_event, save_events
from aerec_nb.testing import raised, test_error

on_postgres = pytest.mark.xdist_group("postgres")

WRITER = """
import sys, time
from aerec_nb.data.event_log import EventLog
from aerec_nb.data.events import new_event
name, url = sys.argv[1:3]
log = EventLog(url)
for n in range(10**6):
    ids = [f'{name}-{n}-{i}' for i in range(20)]
    log.append([new_event('request', event_id=id_, request_id=id_, payload={'items': list(range(10))}) for id_ in ids])
    print(n, flush=True)
"""


def writers(url, folder, n):
    "Start processes that append batches of twenty and print the accepted ones."
    env = {**variables(folder), "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen([sys.executable, "-c", WRITER, f"w{i}", url], stdout=subprocess.PIPE, text=True, env=env)
        for i in range(n)
    ]


def accepted(process, name, first):
    "Return the ids of the events that a process printed as accepted."
    lines = first + process.stdout.read().split("\n")[:-1]
    process.wait()
    process.stdout.close()
    return {f"{name}-{line.strip()}-{i}" for line in lines for i in range(20)}


def kill_each(url, folder, rounds):
    "Kill four writers and compare what they reported with what is stored."
    for r in range(rounds):
        running = writers(url, folder, 4)
        try:
            first = [[p.stdout.readline() for _ in range(3)] for p in running]
            time.sleep(0.05 * (r % 5))
        finally:
            for p in running:
                os.kill(p.pid, signal.SIGKILL)
        said = set().union(*(accepted(p, f"w{i}", first[i]) for i, p in enumerate(running)))
        log = EventLog(url)
        kept = log.read().event_id.tolist()
        assert len(kept) == len(set(kept)) and said <= set(kept), f"{len(said - set(kept))} accepted events are missing"
        batches = pd.Series([e.rsplit("-", 1)[0] for e in kept]).value_counts()
        assert (batches == 20).all(), "a batch is stored in part"
        assert log.append([new_event("request", event_id=e) for e in sorted(said)[:100]]) == 0, (
            "a batch that is sent again counts twice"
        )
        log.delete_older_than(time.time() + 1)
        log.close()


def test_kill_9_of_four_writers_keeps_each_event_once(tmp_path):
    kill_each(sqlite_url(tmp_path / "events.db"), tmp_path, 20 if STRESS else 1)
    assert sqlite3.connect(tmp_path / "events.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)


@on_postgres
def test_kill_9_on_postgres(fresh_database, tmp_path):
    kill_each(fresh_database, tmp_path, 5 if STRESS else 1)


@on_postgres
def test_threads_open_a_new_log_at_once(fresh_database):
    barrier = threading.Barrier(12)
    logs = []

    def open_log():
        barrier.wait()
        logs.append(EventLog(fresh_database))

    threads = [threading.Thread(target=open_log) for _ in range(barrier.parties)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(logs) == len(threads) and [log.count() for log in logs] == [0] * len(logs)
    for log in logs:
        log.close()


FULL = """
import json, resource, sys, time
from fastapi.testclient import TestClient
import numpy as np
from scipy.sparse import csr_matrix
from aerec_nb.configuration import load_settings
from aerec_nb.data.event_log import EventLog
from aerec_nb.inference import Recommender
from aerec_nb.modeling import create_model
from aerec_nb.serving import create_app
x = csr_matrix(np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], np.float32))
log = EventLog(sys.argv[1])
recommender = Recommender(create_model('popularity').fit(x), [10, 20, 30, 40, 50], list('abcd'), x)
app = create_app(recommender, load_settings('test'), log)
with TestClient(app) as client:
    ask = lambda: client.get('/v1/recommend/a?k=3').status_code
    liked = {'kind': 'feedback', 'user_id': 'a', 'item_id': 30, 'value': 1, 'payload': {'note': 'x'*2000}}
    post = lambda n: client.post('/v1/events', json={'event_id': f'p{n}', **liked}).status_code
    before = [(ask(), post(n)) for n in range(3)]
    time.sleep(.3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY)) # as a full disk
    during = [(ask(), post(n)) for n in range(10, 16)]
    waiting = app.state.service.writer.waiting
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)) # space was freed
    time.sleep(.5)
    after = [(ask(), post(n)) for n in range(10, 16)]
print(json.dumps({'before': before, 'during': during, 'after': after, 'waiting': waiting}))
"""


def test_a_full_disk_refuses_events_and_does_not_stop_recommending(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, sqlite_url(tmp_path / "events.db")],
        env={**variables(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert all(a == 200 for part in ("before", "during", "after") for a, _ in said[part]), said
    assert all(p < 300 for part in ("before", "after") for _, p in said[part]) and all(
        p == 503 for _, p in said["during"]
    ), said
    kept = EventLog(tmp_path / "events.db").read()
    assert sorted(kept[kept.kind == "feedback"].event_id) == sorted([f"p{n}" for n in (0, 1, 2, *range(10, 16))])
    assert said["waiting"] >= 6 and (kept.kind == "request").sum() == 15, "request events that waited are written later"
    assert sqlite3.connect(tmp_path / "events.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)


def refusal(call) -> LogErrorCode:
    "Return the code with which the log refuses a call; check that the message is one line."
    with pytest.raises(EventLogUnavailable) as refused:
        call()
    assert "\n" not in str(refused.value)
    return refused.value.code


def test_a_locked_file_is_refused_after_the_timeout(tmp_path):
    log = EventLog(tmp_path / "events.db")
    other = sqlite3.connect(tmp_path / "events.db", isolation_level=None, check_same_thread=False)
    events = [new_event("feedback", event_id=f"e{n}") for n in range(50)]
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, lambda: other.execute("ROLLBACK")).start()
    assert log.append(events[:10]) == 10, "a short lock is waited for"
    log.close()
    log = EventLog(tmp_path / "events.db", statement_timeout_s=0.1)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(EventLogUnavailable) as refused:
        log.append(events)
    assert refused.value.code == LogErrorCode.LOCKED and isinstance(refused.value.__cause__, sa.exc.OperationalError)
    assert len(log.read()) == 10, "reading never waits, and nothing is stored in part"
    test_error(lambda: EventLog(tmp_path / "events.db", statement_timeout_s=0.1), "locked", log.url)
    other.execute("ROLLBACK")
    assert log.append(events) == 40 and log.count() == 50
    other.close()


def test_a_write_that_hangs_does_not_block_the_others(tmp_path):
    log = EventLog(tmp_path / "events.db", connect_timeout_s=0.2)
    with log._lock:
        assert refusal(lambda: log.append([new_event("feedback")])) == LogErrorCode.LOCKED
    assert log.append([new_event("feedback")]) == 1


MANY = """
import sys
from aerec_nb.data.event_log import EventLog
from aerec_nb.data.events import new_event
url, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
log = EventLog(url)
for start in range(0, n, 50):
    numbers = range(start, start+50)
    log.append([new_event('feedback', event_id=f'{name}-{i}', user_id=name, item_id=i, value=1) for i in numbers])
log.append([new_event('feedback', event_id=f'shared-{i}', user_id='x', item_id=i) for i in range(20)])
"""


def writers_and_a_reader(url, folder, n):
    "Check that a reader sees every event of many writers once."
    log = EventLog(url)
    seen = []
    last = 0
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MANY, url, f"w{i}", "500"], env={**variables(folder), "PYTHONPATH": str(ROOT)}
        )
        for i in range(n)
    ]
    while True:
        alive = any(p.poll() is None for p in running)
        batch, last = log.feedback_since(last)
        seen += zip(batch.user_id, batch.item_id, strict=True)
        if not alive and not len(batch):
            break
        time.sleep(0.01)
    assert all(p.returncode == 0 for p in running)
    assert len(seen) == len(set(seen)) == log.count() == n * 500 + 20


def test_many_writers_sqlite(tmp_path):
    writers_and_a_reader(sqlite_url(tmp_path / "events.db"), tmp_path, 4)


@on_postgres
def test_many_writers_postgres(fresh_database, tmp_path):
    writers_and_a_reader(fresh_database, tmp_path, 3)


DAY = 86400.0
T = 1.7e9 // 86400 * 86400


def check_everything(url, folder):
    "Append, export, delete a user and delete older events, with two open logs."
    log = EventLog(url, folder / KEY_FILE)
    events = [
        new_event(
            "request",
            event_id=f"r{n}",
            time=T + DAY * (n // 4) + n,
            request_id=f"r{n}",
            user_id="äü" if n % 2 else "b",
            payload={"items": [1, "x"], "n": n},
        )
        for n in range(12)
    ]
    events += [
        new_event("impression", event_id=f"i{n}", time=T + DAY * (n // 4) + n, request_id=f"r{n}", item_id=1)
        for n in range(12)
    ]
    assert (
        log.append(events[:12], now=T + 2 * DAY) == 12
        and log.append(events, now=T + 2 * DAY + 10) == 12
        and log.append(events) == 0
    )
    files = log.export(folder / "archive", until=T + 2 * DAY)
    assert [f.name for f in files] == ["events-2023-11-14.parquet", "events-2023-11-15.parquet"] and log.export(
        folder / "archive", until=T + 2 * DAY
    ) == files
    both = pd.concat([load_events(f) for f in files], ignore_index=True)
    assert sorted(both.event_id) == sorted(log.read(until=T + 2 * DAY).event_id)
    table = next(iter(log.iter_batches("request", rows=100)))
    assert (
        table.num_rows == 12
        and [json.loads(p.as_py())["n"] for p in table["payload"]] == list(range(12))
        and table["simulated"].to_pylist() == [False] * 12
    )
    assert [len(t) for t in log.iter_batches(columns=["seq"], rows=10)] == [10, 10, 4]

    assert (
        log.append(
            [new_event("feedback", event_id="ahead", time=T + 3 * DAY, user_id="äü", item_id=1)], now=T + 2 * DAY + 15
        )
        == 1
    ), "the clock of a client may be ahead"
    assert log.delete_user("äü", now=T + 2 * DAY + 20) == 13, (
        "six requests, the six impressions that belong to them, and the event of the future"
    )
    late = [
        new_event("request", event_id="made before", time=T + 2 * DAY + 19, user_id="äü"),
        new_event("request", event_id="made after", time=T + 2 * DAY + 21, user_id="äü"),
        new_event("request", event_id="other", time=T + 2 * DAY + 19, user_id="b"),
        new_event("request", event_id="anonymous", time=T + 2 * DAY + 19),
    ]
    assert log.append(late, now=T + 2 * DAY + 22) == 3, (
        "a request event that waited in a queue while its user was deleted"
    )
    another = EventLog(url, folder / KEY_FILE)
    assert another.append(late[:1]) == 0, "another open log refuses it too"
    assert (
        log.append([new_event("feedback", event_id="new", time=T, user_id="äü", item_id=2)], now=T + 2 * DAY + 23) == 1
    ), "what arrives after the deletion is new, whatever its time"
    assert log.feedback_since()[0].item_id.tolist() == ["2"] and log.delete_user("unknown") == 0
    assert [
        user.has_many(["äü", "b", "unknown"]).tolist() for user in (log.erased_since()[0], another.erased_since()[0])
    ] == [[True, False, True]] * 2
    with log.engine.connect() as db:
        lines = db.execute(sa.select(log.table.metadata.tables["erased_users"])).all()
    assert [line.n_events for line in lines] == [13, 0] and not any(
        "äü" in str(value) for line in lines for value in line
    )

    assert log.delete_older_than(T + 2 * DAY + 1) == 6 and log.delete_older_than(T + 2 * DAY + 1) == 0, (
        "arrival decides, not the time of the event"
    )
    assert log.read("request").event_id.tolist() == ["made after", "other", "anonymous"]
    newest = log.feedback_since()[1]
    assert log.delete_older_than(time.time() + 1) == 10 and log.count() == 0
    assert log.append([new_event("feedback", user_id="b", item_id=1)]) == 1 and log.feedback_since()[1] > newest, (
        "a number is never used again"
    )
    log.check_writable()
    log.close()
    another.close()


def test_everything_sqlite(tmp_path):
    check_everything(sqlite_url(tmp_path / "events.db"), tmp_path)
    assert "äü".encode() not in b"".join(f.read_bytes() for f in tmp_path.glob("events.db*")), (
        "deleted events are not in the files"
    )


@on_postgres
def test_everything_postgres(fresh_database, tmp_path):
    check_everything(fresh_database, tmp_path)


def check_new_feedback(url):
    "Read feedback after a number, with every condition."
    log = EventLog(url)
    types = [{}, {"type": "click"}, {"type": "rating", "n": 1}, {"type": None}, {"type": 5}, {"a": {"type": "no"}}]
    log.append(
        [
            new_event(
                "feedback",
                event_id=f"f{n}",
                user_id=f"u{n % 3}",
                item_id=n,
                value=n or None,
                payload=types[n % 6],
                simulated=n % 4 == 3,
                time=T + n,
            )
            for n in range(24)
        ],
        now=T + 30,
    )
    log.append(
        [
            new_event("feedback", event_id="no user", item_id=1),
            new_event("feedback", event_id="no item", user_id="u1"),
            new_event("request", event_id="none", user_id="u1"),
        ]
    )
    batch, last = log.feedback_since()
    assert len(batch) == 24 and batch.type.tolist() == ["feedback", "click", "rating", "None", "5", "feedback"] * 4
    assert (
        batch.item_id.tolist() == [str(n) for n in range(24)]
        and np.isnan(batch.value[0])
        and batch.value[1:].tolist() == list(range(1, 24))
    )
    assert (
        batch.time.tolist() == [T + n for n in range(24)]
        and set(batch.received_at) == {T + 30}
        and batch.simulated.sum() == 6
        and (np.diff(batch.seq) > 0).all()
    )
    assert log.feedback_since(last)[1] == last == log.feedback_since(last - 1, simulated=True)[1], (
        "feedback that the conditions exclude counts as seen"
    )
    assert log.feedback_since(simulated=True)[0].item_id.tolist() == [str(n) for n in range(3, 24, 4)]
    assert log.feedback_since(max_per_user=2)[0].item_id.tolist() == [str(n) for n in range(18, 24)], (
        "the newest of each user"
    )
    assert [len(log.feedback_since(since=t)[0]) for t in (T + 30, T + 31, time.time() + 9)] == [24, 0, 0]
    seen = []
    seq = 0
    while (step := log.feedback_since(seq, limit=5))[1] != seq:
        seen += step[0].item_id.tolist()
        seq = step[1]
    assert seen == batch.item_id.tolist()
    log.close()


def test_new_feedback_sqlite(tmp_path):
    check_new_feedback(sqlite_url(tmp_path / "events.db"))


@on_postgres
def test_new_feedback_postgres(fresh_database):
    check_new_feedback(fresh_database)


def test_300_000_feedback_events_are_read_in_time(tmp_path):
    "Limit the processor time: well below a second for 300,000 events."
    n = 300_000 if STRESS else 60_000
    log = EventLog(tmp_path / "events.db")
    for start in range(0, n, 10_000):
        log.append(
            [
                new_event(
                    "feedback",
                    event_id=f"e{i}",
                    user_id="bot" if i % 10 == 0 else f"u{i % 5000}",
                    item_id=i % 1600,
                    value=1,
                    payload={"type": "click"},
                )
                for i in range(start, start + 10_000)
            ]
        )
    begun = time.process_time()
    batch = log.feedback_since(since=time.time() - DAY, limit=n, max_per_user=1000)[0]
    assert time.process_time() - begun < 1.0 * n / 300_000 + 0.1 and (batch.user_id == "bot").sum() == 1000


# --- logs of an earlier version ---------------------------------------------------------------------------------------

FIRST = (
    "CREATE TABLE events (seq INTEGER PRIMARY KEY, event_id VARCHAR(200) NOT NULL UNIQUE, kind VARCHAR(20) NOT NULL, "
    "time DOUBLE PRECISION NOT NULL, request_id VARCHAR(200), user_id VARCHAR(200), item_id VARCHAR(200), "
    "value DOUBLE PRECISION, payload TEXT NOT NULL, simulated BOOLEAN NOT NULL)"
)
FORGOTTEN = (
    "CREATE TABLE forgotten (seq INTEGER PRIMARY KEY, who VARCHAR(64) NOT NULL, salt VARCHAR(32) NOT NULL, "
    "until DOUBLE PRECISION NOT NULL, n_events INTEGER NOT NULL)"
)
SALT = bytes(range(16)).hex()


def make_legacy_log(url, autoincrement):
    "Make a log of an earlier version, with one deleted user."
    engine = open_engine(url)
    who = hashlib.blake2b(b"77", key=bytes.fromhex(SALT), digest_size=20).hexdigest()
    false = "false" if engine.dialect.name == "postgresql" else 0
    with engine.begin() as db:
        db.exec_driver_sql(FIRST.replace("INTEGER PRIMARY KEY", autoincrement))
        db.exec_driver_sql(FORGOTTEN)
        for n, when in enumerate((T, T + 5, time.time() * 1000)):
            db.exec_driver_sql(
                "INSERT INTO events (event_id, kind, time, request_id, user_id, item_id, value, payload, simulated) "
                f"VALUES ('old{n}', 'feedback', {when}, 'r', 'u', 'i{n}', 1, '{{}}', {false})"
            )
        db.exec_driver_sql(f"INSERT INTO forgotten VALUES (1, '{who}', '{SALT}', {T + 9}, 3)")
    engine.dispose()
    return who


def check_migration(url, folder):
    "Open a log of an earlier version twice."
    log = EventLog(url, folder / KEY_FILE)
    assert (
        not log.is_new
        and log.feedback_since()[0].item_id.tolist() == ["i0", "i1", "i2"]
        and log.append([new_event("feedback", event_id="old1")]) == 0
    )
    with log.engine.connect() as db:
        received = db.exec_driver_sql("SELECT received_at FROM events ORDER BY seq").scalars().all()
    assert received[:2] == [T, T + 5] and abs(received[2] - time.time()) < 60, "nothing arrived in the future"
    assert log.erased_since()[0].has_many(["77", "78"]).tolist() == [True, False]
    assert (
        log.append([new_event("request", time=T + 8, user_id="77"), new_event("request", time=T + 10, user_id="77")])
        == 1
    )
    with log.engine.begin() as db:
        db.exec_driver_sql(
            "INSERT INTO events (event_id, kind, time, payload, simulated) "
            "SELECT 'of an earlier version', kind, time, payload, simulated FROM events WHERE seq = 1"
        )
    again = EventLog(url, folder / KEY_FILE)
    assert again.erased_since()[0].has("77") and again.delete_older_than(T + 1) == 2, (
        "a process of an earlier version may still write"
    )
    assert again.delete_user("u") == 2 and len(again.erased_since()[0]) == 2
    log.close()
    again.close()


def test_a_log_of_an_earlier_version_is_migrated(tmp_path):
    who = make_legacy_log(sqlite_url(tmp_path / "events.db"), "INTEGER PRIMARY KEY")
    check_migration(sqlite_url(tmp_path / "events.db"), tmp_path)
    files = b"".join(f.read_bytes() for f in tmp_path.glob("events.db*"))
    assert SALT.encode() not in files and who.encode() not in files, "the salt is readable in the database"


@on_postgres
def test_a_log_of_an_earlier_version_is_migrated_on_postgres(fresh_database, tmp_path):
    make_legacy_log(fresh_database, "BIGSERIAL PRIMARY KEY")
    check_migration(fresh_database, tmp_path)


def test_the_ids_of_deleted_users_cannot_be_recovered_from_the_database(tmp_path):
    log = EventLog(tmp_path / "events.db")
    log.append([new_event("feedback", user_id=77, item_id=1)])
    log.delete_user(77)
    log.close()
    with sqlite3.connect(tmp_path / "events.db") as db:
        texts = {
            str(v)
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for row in db.execute(f"SELECT * FROM {name}")
            for v in row
        }
    keys = [
        b"",
        *(
            k
            for text in texts
            for k in (
                text.encode()[:64],
                text.encode()[:32],
                *([bytes.fromhex(text)[:64]] if len(text) % 2 == 0 and not set(text) - set("0123456789abcdef") else []),
            )
        ),
    ]
    hashes = {
        hashlib.blake2b(b"77", key=key, digest_size=size, person=person).hexdigest()
        for key in keys
        for size in (16, 20, 32, 64)
        for person in (b"", b"aerec user")
    }
    assert not hashes & texts, "a key is in the database"
    assert (
        hashlib.blake2b(
            b"77", key=bytes.fromhex((tmp_path / KEY_FILE).read_text()), digest_size=20, person=b"aerec user"
        ).hexdigest()
        in texts
    )


DELETERS = """
import sys, threading
from aerec_nb.data.event_log import EventLog
begin = threading.Barrier(2)
def delete(user):
    log = EventLog(sys.argv[1])
    begin.wait()
    log.delete_user(user)
threads = [threading.Thread(target=delete, args=(user,)) for user in sys.argv[2:]]
for t in threads: t.start()
for t in threads: t.join()
"""


def test_processes_that_delete_at_once_share_one_key(tmp_path):
    env = {**variables(tmp_path), "PYTHONPATH": str(ROOT)}
    url = sqlite_url(tmp_path / "events.db")
    running = [subprocess.Popen([sys.executable, "-c", DELETERS, url, f"u{n}", f"u{n + 1}"], env=env) for n in (0, 2)]
    assert [p.wait(120) for p in running] == [0, 0]
    erased = EventLog(tmp_path / "events.db").erased_since()[0]
    assert erased.has_many([f"u{n}" for n in range(5)]).tolist() == [True] * 4 + [False]
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600 and not list(tmp_path.glob(".erasure*"))


def test_the_key_of_deleted_users(tmp_path, monkeypatch):
    def settings(key=None):
        monkeypatch.delenv("AEREC_EVENTS__ERASURE_KEY", raising=False)
        if key:
            monkeypatch.setenv("AEREC_EVENTS__ERASURE_KEY", key)
        return load_settings("test", var_dir=str(tmp_path))

    secret = "x" * 20
    log = EventLog.from_settings(settings(secret))
    log.append([new_event("feedback", user_id="ann")])
    assert log.delete_user("ann") == 1 and not (tmp_path / KEY_FILE).exists()
    test_error(lambda: EventLog.from_settings(settings()), "erasure_key", str(tmp_path / KEY_FILE))
    test_error(lambda: EventLog.from_settings(settings("y" * 20)), "erasure_key", "AEREC_EVENTS__ERASURE_KEY")
    test_error(lambda: EventLog.from_settings(settings("short")), "out_of_range", "events.erasure_key")
    test_error(lambda: EventLog(tmp_path / "events.db", b"short"), "out_of_range", "events.erasure_key")
    plain = EventLog(tmp_path / "events.db")  # may be read without the key
    assert plain.count() == 0 and plain.append([new_event("feedback", user_id="bob")]) == 1
    for call in (
        lambda: plain.erased_since(),
        lambda: plain.delete_user("bob"),
        plain.check_writable,
        lambda: plain.append([new_event("request", user_id="bob")]),
    ):
        assert refusal(call) == LogErrorCode.ERASURE_KEY
    (tmp_path / KEY_FILE).write_text("no key")
    assert refusal(plain.erased_since) == LogErrorCode.ERASURE_KEY and plain.count() == 1
    same = EventLog(tmp_path / "events.db", secret.encode())
    assert same.erased_since()[0].has("ann")
    for open_log in (plain, log, same):
        open_log.close()


def test_a_log_in_memory_deletes_users():
    log = EventLog("sqlite://")
    log.append([new_event("feedback", user_id="ann", item_id=1)])
    log.check_writable()
    assert log.delete_user("ann") == 1 and log.erased_since()[0].has("ann") and log.count() == 0


def test_a_new_log_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="aerec_nb"):
        EventLog.from_settings(default_settings(var_dir=str(tmp_path / "a"))).close()
        EventLog.from_settings(default_settings(var_dir=str(tmp_path / "a"))).close()
        EventLog(tmp_path / "b.db").close()
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING", "INFO"]


def test_a_deletion_reports_a_reader_that_keeps_the_data(tmp_path):
    log = EventLog(tmp_path / "events.db", statement_timeout_s=0.2)
    log.append([new_event("feedback", user_id="secret-user", item_id=1)])
    reader = sqlite3.connect(tmp_path / "events.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM events").fetchall()
    with pytest.raises(EventLogUnavailable) as refused:
        log.delete_user("secret-user")
    assert (refused.value.code, refused.value.where) == (LogErrorCode.LOCKED, f"{log.path}-wal")
    reader.close()
    assert log.delete_user("secret-user") == 0
    assert not any(b"secret-user" in f.read_bytes() for f in tmp_path.iterdir())


# --- a log that was moved, replaced, truncated or damaged -----------------------------------------------------------


def event(name):
    return new_event("feedback", event_id=name, user_id=1, item_id=50, value=1)


def checkpoint(path):
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def overwrite(start, data):
    def harm(path):
        checkpoint(path)
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(data)

    return harm


def truncate(part):
    def harm(path):
        checkpoint(path)
        os.truncate(path, int(path.stat().st_size * part))

    return harm


def remove(pattern):
    def harm(path):
        for found in path.parent.glob(pattern):
            found.unlink()

    return harm


def another_log(path):
    other = path.with_name("other.db")
    log = EventLog(other)
    log.append([event(f"z{n}") for n in range(600)])
    log.close()
    return other


def statement(sql):
    def harm(path):
        with sqlite3.connect(path) as db:
            db.execute(sql)

    return harm


def copy_over(path):
    checkpoint(path)
    path.write_bytes(another_log(path).read_bytes())


HARM = {
    "pages of ones": (overwrite(4096, b"\xff" * 20_000), {"damaged"}),
    "pages of zeros": (overwrite(4096, bytes(20_000)), {"damaged"}),
    "truncated to nothing": (truncate(0), {"damaged"}),
    "truncated to a half": (truncate(0.5), {"damaged"}),
    "last pages cut off": (lambda path: os.truncate(path, path.stat().st_size - 8192), {"damaged"}),
    "deleted": (remove("events.db*"), {"missing"}),
    "journal deleted": (remove("events.db-wal"), {"missing"}),
    "index deleted": (remove("events.db-shm"), {"missing"}),
    "folder moved": (lambda path: path.parent.rename(path.parent.with_name("moved")), {"missing"}),
    "replaced": (lambda path: os.replace(another_log(path), path), {"replaced"}),
    "copied over": (copy_over, {"replaced", "damaged"}),
    "another identity": (statement("UPDATE events_meta SET value = 'x' WHERE name = 'log_id'"), {"replaced"}),
    "table dropped": (statement("DROP TABLE events"), {"schema"}),
    "identity dropped": (statement("DROP TABLE events_meta"), {"schema"}),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_changed_log_accepts_no_event(harm, tmp_path):
    (tmp_path / "var").mkdir()
    path = tmp_path / "var" / "events.db"
    damage, codes = HARM[harm]
    log = EventLog(path, statement_timeout_s=0.5)
    log.append([event(f"a{n}") for n in range(500)])
    checkpoint(path)
    log.append([event("last")])
    log.check_writable()
    log.feedback_since()
    damage(path)
    for _ in range(2):
        for call in (lambda: log.append([event("b")]), log.check_writable, lambda: log.delete_user(1)):
            assert refusal(call) in codes, harm
    log.close()


def test_a_log_can_be_moved_back_and_vacuumed(tmp_path):
    log = EventLog(tmp_path / "events.db")
    log.append([event(f"a{n}") for n in range(3000)])
    checkpoint(tmp_path / "events.db")
    log.append([event("b")])
    (tmp_path / "events.db").rename(tmp_path / "away.db")
    assert refusal(lambda: log.append([event("c")])) == LogErrorCode.MISSING
    (tmp_path / "away.db").rename(tmp_path / "events.db")
    assert log.append([event("c")]) == 1
    with sqlite3.connect(tmp_path / "events.db") as db:
        db.execute("DELETE FROM events WHERE seq > 10")
    before = (tmp_path / "events.db").stat().st_size
    with sqlite3.connect(tmp_path / "events.db") as db:
        db.execute("VACUUM")
    checkpoint(tmp_path / "events.db")
    assert (
        log.append([event("d")]) == 1
        and log.append([event("e")]) == 1
        and (tmp_path / "events.db").stat().st_size < before
    )
    log.close()


def test_a_log_without_a_write_ahead_log_gets_one(tmp_path):
    EventLog(tmp_path / "events.db").close()
    with sqlite3.connect(tmp_path / "events.db") as db:
        assert db.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
    reader = sqlite3.connect(tmp_path / "events.db", isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM events").fetchall()
    test_error(lambda: EventLog(tmp_path / "events.db", statement_timeout_s=0.1), "locked")
    threading.Timer(0.3, lambda: reader.execute("ROLLBACK")).start()
    log = EventLog(tmp_path / "events.db")
    assert log.append([event("a")]) == 1
    log.close()
    reader.close()


def test_opening_a_large_log_does_not_read_all_of_it(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "events.db")
    log.append([event(f"a{n}") for n in range(3000)])
    overwrite(4096 * 40, b"\xff" * 8192)(tmp_path / "events.db")
    log.close()
    monkeypatch.setattr(event_store, "QUICK_CHECK_BYTES", 10_000)
    EventLog(tmp_path / "events.db").close()


def journal_alone(path):
    log = EventLog(path)
    log.append([event("a")])
    journal = Path(f"{path}-wal").read_bytes()
    log.close()
    path.unlink()
    Path(f"{path}-wal").write_bytes(journal)


UNUSABLE = {  # name -> how it is made, code, place (None: the log)
    "garbage": (lambda path: path.write_bytes(b"garbage" * 1000), "damaged", None),
    "empty": (lambda path: path.write_bytes(b""), "damaged", "{path}"),
    "a folder": (lambda path: path.mkdir(), "permission", None),
    "another schema": (statement("CREATE TABLE events (a INT)"), "schema", "events.seq"),
    "no unique ids": (statement(FIRST.replace(" UNIQUE", "")), "schema", None),
    "another meta": (statement("CREATE TABLE events_meta (a INT)"), "schema", None),
    "journal alone": (journal_alone, "missing", "{path}"),
    "damaged far from its ends": (
        lambda path: [
            EventLog(path).append([event(f"a{n}") for n in range(3000)]),
            overwrite(4096 * 40, b"\xff" * 8192)(path),
        ],
        "damaged",
        None,
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_file_that_is_no_log_is_refused_in_one_line(what, tmp_path):
    make, code, where = UNUSABLE[what]
    make(tmp_path / "events.db")
    where = where.format(path=tmp_path / "events.db") if where else sqlite_url(tmp_path / "events.db")
    before = (tmp_path / "events.db").read_bytes() if (tmp_path / "events.db").is_file() else None
    for _ in range(2):
        refused = raised(lambda: EventLog(tmp_path / "events.db", connect_timeout_s=0.1))
        assert (refused.code, refused.where) == (code, where) and "\n" not in str(refused)
    if before is not None:
        assert (tmp_path / "events.db").read_bytes() == before, "the file is changed"


LIMITED = """
import json, resource, sqlite3, sys
from pathlib import Path
from aerec_nb.core.errors import AerecError
from aerec_nb.data.event_database import EventLogUnavailable
from aerec_nb.data.event_log import EventLog
from aerec_nb.data.events import new_event

folder, results = Path(sys.argv[1]), {}

def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY)) # as a full disk

def tried(name, call):
    try: results[name] = call()
    except EventLogUnavailable as e: results[name] = str(e.code)
    except AerecError as e: results[name] = f'AerecError {e.code}' if chr(10) not in str(e) else str(e)
"""

FULL_DISK = (
    LIMITED
    + """
log = EventLog(folder/'events.db')
log.append([new_event('feedback') for _ in range(50)])
with sqlite3.connect(log.path) as db:
    db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall() # so that a small row fits
limit(60_000)
tried('nearly full', log.check_writable)
limit(4096)
tried('ready', log.check_writable)
tried('append', lambda: log.append([new_event('feedback')]))
tried('delete', lambda: log.delete_user('u'))
limit(1)
tried('open', lambda: EventLog(folder/'other.db'))
results['left behind'] = (folder/'other.db').exists()
limit(resource.RLIM_INFINITY)
tried('ready again', log.check_writable)
tried('append again', lambda: log.append([new_event('feedback')]))
results['count'] = log.count()
tried('open again', lambda: EventLog(folder/'other.db').count())
print(json.dumps(results))
"""
)

NO_PERMISSION = (
    LIMITED
    + """
for name in ('a', 'b'): EventLog(folder/name/'events.db').close()
(folder/'c').mkdir()
for name, file_mode, folder_mode in (('a', 0o444, 0o755), ('b', 0o444, 0o555), ('c', None, 0o555), ('a', 0o000, 0o755)):
    if file_mode is not None: (folder/name/'events.db').chmod(file_mode)
    (folder/name).chmod(folder_mode)
    tried(f'{name} {file_mode} {folder_mode}', lambda: EventLog(folder/name/'events.db'))
    (folder/name).chmod(0o755)
print(json.dumps(results))
"""
)


def limited(code, folder, *before):
    "Run code in a process whose limits do not bind the tests."
    done = subprocess.run(
        [*before, sys.executable, "-c", code, str(folder)],
        env={**variables(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_full_disk_is_noticed_by_readiness_writes_and_opening(tmp_path):
    found = limited(FULL_DISK, tmp_path)
    refused = {"nearly full": "full", "ready": "input_output", "append": "input_output", "delete": "input_output"}
    assert found == {
        **refused,
        "open": "AerecError input_output",
        "left behind": False,
        "ready again": None,
        "append again": 1,
        "count": 51,
        "open again": 0,
    }


def test_missing_permissions_are_refused_in_one_line(tmp_path):
    "Run as root without capabilities, so that file modes count."
    without = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    if without and not shutil.which("setpriv"):
        pytest.skip("no setpriv here (Debian: apt-get install util-linux)")
    found = limited(NO_PERMISSION, tmp_path, *without)
    assert list(found.values()) == [
        f"AerecError {code}" for code in ("read_only", "read_only", "permission", "permission")
    ]


def test_the_key_file_cannot_be_made(tmp_path):
    log = EventLog(tmp_path / "events.db", tmp_path / "a file" / KEY_FILE)
    (tmp_path / "a file").write_text("")
    log.append([event("a")])
    assert refusal(lambda: log.delete_user(1)) == LogErrorCode.ERASURE_KEY and log.count() == 1


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    error = raised(lambda: open_engine("postgresql+psycopg2://host/x"))
    assert (error.code, error.where) == ("missing_package", "events.events_url") and "psycopg2" in str(error)


class Refused(Exception):
    "Carries the SQLSTATE of an error, as a driver of PostgreSQL does."

    def __init__(self, sqlstate=None):
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    "state, code",
    [
        ("57014", "timeout"),
        ("25P03", "timeout"),
        ("55P03", "locked"),
        ("53100", "full"),
        ("53300", "connection"),
        ("25006", "read_only"),
        ("42501", "permission"),
        ("28P01", "permission"),
        ("3D000", "missing"),
        ("42P01", "schema"),
        ("XX001", "damaged"),
        ("57P01", "connection"),
        (None, "connection"),
        ("99999", "other"),
    ],
)
def test_codes_of_postgres(state, code):
    assert error_code(sa.exc.OperationalError("", {}, Refused(state))) == code


def test_codes_of_other_errors():
    assert error_code(sa.exc.ArgumentError()) == "other" and error_code(sqlite3.ProgrammingError()) == "other"


# --- a network that does not answer -----------------------------------------------------------------------------------


class Proxy:
    "Forwards connections to a server, and can drop packets."

    def __init__(self, port):
        self.port = port
        self.frozen = threading.Event()
        self.sockets = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = self.server.getsockname()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):
            while True:
                client = self.server.accept()[0]
                upstream = socket.create_connection(("127.0.0.1", self.port))
                self.sockets += [client, upstream]
                for pair in ((client, upstream), (upstream, client)):
                    threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source, target):
        with suppress(OSError):
            while True:
                data = source.recv(65536)
                while self.frozen.is_set():
                    time.sleep(0.02)
                if not data:
                    break
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def silent(self):
        self.frozen.set()
        try:
            yield
        finally:
            self.frozen.clear()

    def close(self):
        self.frozen.clear()
        for s in (self.server, *self.sockets):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()


@pytest.fixture
def proxied(fresh_database):
    "Return a proxy and the URL of a database behind it."
    url = sa.make_url(fresh_database)
    proxy = Proxy(url.port)
    yield proxy, url.set(port=proxy.address[1]).render_as_string(hide_password=False)
    proxy.close()


@on_postgres
def test_calls_over_a_silent_network_end_in_time(proxied, fresh_database, tmp_path):
    proxy, url = proxied
    log = EventLog(url, tmp_path / KEY_FILE, connect_timeout_s=1, statement_timeout_s=1)
    log.append([event(f"a{n}") for n in range(300)])
    log.delete_user("other")
    calls = {
        "append": lambda: log.append([event("b")]),
        "read": log.read,
        "iter_batches": lambda: list(log.iter_batches()),
        "count": log.count,
        "last_time": log.last_time,
        "feedback_since": log.feedback_since,
        "erased_since": log.erased_since,
        "delete_user": lambda: log.delete_user(1),
        "delete_older_than": lambda: log.delete_older_than(1.0),
        "check_writable": log.check_writable,
    }
    calls["open"] = lambda: EventLog(url, connect_timeout_s=1, statement_timeout_s=1)
    took = {}
    codes = {}

    def give_up(name):
        begun = time.monotonic()
        with pytest.raises((EventLogUnavailable, AerecError)) as refused:
            calls[name]()
        took[name] = time.monotonic() - begun
        codes[name] = refused.value.code
        assert "\n" not in str(refused.value) and "s3cret" not in str(refused.value)

    for idle in (0, 1.2):  # a connection that was idle is tried first
        time.sleep(idle)
        with proxy.silent():
            threads = [threading.Thread(target=give_up, args=(name,)) for name in calls]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        assert max(took.values()) < 5 and set(took) == set(calls), took
        assert set(codes.values()) <= {LogErrorCode.TIMEOUT, LogErrorCode.CONNECTION, LogErrorCode.LOCKED}, codes
        assert log.count() == 300 and log.erased_since()[0].has("other"), "the log is used again at once"
        took.clear()
    assert log.append([event("b")]) == 1
    log.close()


@on_postgres
def test_threads_over_a_silent_network_end_in_time(proxied):
    proxy, url = proxied
    log = EventLog(url, connect_timeout_s=1, statement_timeout_s=1)
    log.append([event("a")])
    took = []

    def post(n):
        begun = time.monotonic()
        refusal(lambda: log.append([event(f"b{n}")]))
        took.append(time.monotonic() - begun)

    with proxy.silent():
        threads = [threading.Thread(target=post, args=(n,)) for n in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(took) == 8 and max(took) < 5, took
    assert log.append([event(f"b{n}") for n in range(8)]) in range(9)
    log.close()


@on_postgres
def test_a_writer_that_lost_its_network_releases_the_lock(proxied, fresh_database):
    proxy, url = proxied
    lost = EventLog(url, connect_timeout_s=1, statement_timeout_s=1)
    other = EventLog(fresh_database, connect_timeout_s=5, statement_timeout_s=20)
    with suppress(EventLogUnavailable), lost._transaction():
        proxy.frozen.set()
        begun = time.monotonic()
        assert other.append([event("a")]) == 1 and time.monotonic() - begun < 10
    proxy.frozen.clear()
    lost.close()
    other.close()


@on_postgres
def test_the_deadline_holds_for_the_server_and_not_for_the_reader(proxied):
    proxy, url = proxied
    log = EventLog(url, connect_timeout_s=1, statement_timeout_s=0.5)
    log.append([event(f"a{n}") for n in range(100)])
    batches = log.iter_batches(rows=10)
    next(batches)
    time.sleep(1.5)
    assert len(next(batches)) == 10
    with proxy.silent():
        assert refusal(lambda: list(batches)) == LogErrorCode.TIMEOUT
    log.close()


@on_postgres
def test_codes_of_a_postgres_server(fresh_database, proxied):
    proxy, url = proxied
    log = EventLog(url, connect_timeout_s=1, statement_timeout_s=0.5)
    with sa.create_engine(fresh_database).begin() as other:
        other.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('aerec events'))")
        assert refusal(lambda: log.append([event("a")])) == LogErrorCode.TIMEOUT
    with log.engine.begin() as db:
        db.exec_driver_sql("ALTER DATABASE " + sa.make_url(url).database + " SET default_transaction_read_only = on")
    log.close()
    assert refusal(log.check_writable) == LogErrorCode.READ_ONLY
    with log.engine.begin() as db:
        db.exec_driver_sql("SET TRANSACTION READ WRITE")
        db.exec_driver_sql("ALTER DATABASE " + sa.make_url(url).database + " RESET default_transaction_read_only")
    log.close()
    log.check_writable()
    with log.engine.begin() as db:
        db.exec_driver_sql("UPDATE events_meta SET value = 1")
    assert refusal(lambda: log.append([event("a")])) == LogErrorCode.REPLACED
    with log.engine.begin() as db:
        db.exec_driver_sql("DROP TABLE events, events_meta, erased_users; CREATE TABLE events (a INT)")
    assert refusal(log.check_writable) == LogErrorCode.SCHEMA
    test_error(lambda: EventLog(fresh_database), "schema", "events.seq")
    with pytest.raises(AerecError, match="does not exist"):  # what the server says
        EventLog(fresh_database + "x")
    with pytest.raises(AerecError, match="password"):  # what the server says
        EventLog(fresh_database.replace("s3cret", "wrong"))
    proxy.close()
    assert refusal(log.count) == LogErrorCode.CONNECTION
    test_error(lambda: EventLog(url), "connection")
    log.close()


@on_postgres
def test_a_server_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        error = raised(lambda: EventLog(f"postgresql://x@127.0.0.1:{silent.getsockname()[1]}/x", connect_timeout_s=2))
        assert error.code in ("timeout", "connection")
        assert time.monotonic() - begun < 5


def test_events_survive_a_parquet_round_trip(tmp_path):
    log = EventLog(tmp_path / "events.db")
    log.append(
        [
            new_event("request", event_id="a", time=T + 1, payload={"items": [1, "z"], "ms": 1.5}),
            new_event("feedback", event_id="b", time=T + 2, user_id=1, item_id="q", value=0.5),
        ]
    )
    save_events(log.read(), tmp_path / "events.parquet")
    pd.testing.assert_frame_equal(load_events(tmp_path / "events.parquet"), log.read())
