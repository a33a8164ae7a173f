"The event log under what happens to logs: kill -9, a full disk, a locked file, many writers, a real PostgreSQL."
import json, os, signal, sqlite3, subprocess, sys, threading, time
import pandas as pd, pytest
import sqlalchemy as sa
from conftest import ROOT, variables
from aerec_nb.events import EventLog, load_events, new_event, save_events, sqlite_url

STRESS = bool(os.environ.get('STRESS'))
on_postgres = pytest.mark.xdist_group('postgres')

WRITER = '''
import sys, time
from aerec_nb.events import EventLog, new_event
name, url = sys.argv[1:3]
log = EventLog(url)
for n in range(10**6):
    log.append([new_event('request', event_id=f'{name}-{n}-{i}', request_id=f'{name}-{n}-{i}', payload={'items': list(range(10))}) for i in range(20)]); print(n, flush=True)
'''


def writers(url, folder, n):
    "Processes that append batches of twenty and say which were accepted."
    env = {**variables(folder), 'PYTHONPATH': str(ROOT)}
    return [subprocess.Popen([sys.executable, '-c', WRITER, f'w{i}', url], stdout=subprocess.PIPE, text=True, env=env) for i in range(n)]


def accepted(process, name, first):
    lines = first + process.stdout.read().split('\n')[:-1]
    process.wait(); process.stdout.close()
    return {f'{name}-{line.strip()}-{i}' for line in lines for i in range(20)}


def kill_each(url, folder, rounds):
    for r in range(rounds):
        running = writers(url, folder, 4)
        try:
            first = [[p.stdout.readline() for _ in range(3)] for p in running]
            time.sleep(.05*(r % 5))
        finally:
            for p in running: os.kill(p.pid, signal.SIGKILL)
        said = set().union(*(accepted(p, f'w{i}', first[i]) for i, p in enumerate(running)))
        log = EventLog(url)
        kept = log.read().event_id.tolist()
        assert len(kept) == len(set(kept)) and said <= set(kept), f'{len(said - set(kept))} accepted events are missing'
        batches = pd.Series([e.rsplit('-', 1)[0] for e in kept]).value_counts()
        assert (batches == 20).all(), 'a batch is there in part'
        assert log.append([new_event('request', event_id=e) for e in sorted(said)[:100]]) == 0, 'a report that is sent again counts twice'
        log.prune(time.time()+1)
        log.close()


def test_kill_9_of_four_writers_loses_and_doubles_nothing(tmp_path):
    kill_each(sqlite_url(tmp_path/'events.db'), tmp_path, 20 if STRESS else 1)
    assert sqlite3.connect(tmp_path/'events.db').execute('PRAGMA integrity_check').fetchone() == ('ok',)


@on_postgres
def test_kill_9_on_postgres(fresh_database, tmp_path): kill_each(fresh_database, tmp_path, 5 if STRESS else 1)


@on_postgres
def test_many_may_open_a_new_log_at_once(fresh_database):
    everybody, logs = threading.Barrier(12), []
    def open_log():
        everybody.wait()
        logs.append(EventLog(fresh_database))
    threads = [threading.Thread(target=open_log) for _ in range(everybody.parties)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(logs) == len(threads) and [log.count() for log in logs] == [0]*len(logs)
    for log in logs: log.close()


FULL = '''
import json, resource, sys, time
from fastapi.testclient import TestClient
import numpy as np
from scipy.sparse import csr_matrix
from aerec_nb.configuration import load_settings
from aerec_nb.events import EventLog
from aerec_nb.inference import Recommender
from aerec_nb.modeling import create_model
from aerec_nb.serving import create_app
x = csr_matrix(np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], np.float32))
log = EventLog(sys.argv[1])
app = create_app(Recommender(create_model('popularity').fit(x), [10, 20, 30, 40, 50], list('abcd'), x), load_settings('test'), log)
with TestClient(app) as client:
    ask = lambda: client.get('/v1/recommend/a?k=3').status_code
    post = lambda n: client.post('/v1/events', json={'event_id': f'p{n}', 'kind': 'feedback', 'user_id': 'a', 'item_id': 30, 'value': 1, 'payload': {'note': 'x'*2000}}).status_code
    before = [(ask(), post(n)) for n in range(3)]
    time.sleep(.3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY)) # not one byte more: the disk is full
    during = [(ask(), post(n)) for n in range(10, 16)]
    waiting = app.state.service.writer.waiting
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)) # somebody made room
    time.sleep(.5)
    after = [(ask(), post(n)) for n in range(10, 16)]
print(json.dumps({'before': before, 'during': during, 'after': after, 'waiting': waiting}))
'''


def test_a_full_disk_refuses_events_loses_none_and_recommending_goes_on(tmp_path):
    done = subprocess.run([sys.executable, '-c', FULL, sqlite_url(tmp_path/'events.db')], env={**variables(tmp_path), 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert all(a == 200 for part in ('before', 'during', 'after') for a, _ in said[part]), said
    assert all(p < 300 for part in ('before', 'after') for _, p in said[part]) and all(p == 503 for _, p in said['during']), said
    kept = EventLog(tmp_path/'events.db').read()
    assert sorted(kept[kept.kind == 'feedback'].event_id) == sorted([f'p{n}' for n in (0, 1, 2, *range(10, 16))])
    assert said['waiting'] >= 6 and (kept.kind == 'request').sum() == 15, 'request events that waited are written later'
    assert sqlite3.connect(tmp_path/'events.db').execute('PRAGMA integrity_check').fetchone() == ('ok',)


def test_a_locked_file_is_waited_for_and_then_refused_whole(tmp_path):
    log, other = EventLog(tmp_path/'events.db'), sqlite3.connect(tmp_path/'events.db', isolation_level=None, check_same_thread=False)
    events = [new_event('feedback', event_id=f'e{n}') for n in range(50)]
    other.execute('BEGIN EXCLUSIVE')
    threading.Timer(.5, lambda: other.execute('ROLLBACK')).start()
    assert log.append(events[:10]) == 10, 'a short lock is waited for'
    sa.event.listen(log.engine, 'connect', lambda connection, _: connection.execute('PRAGMA busy_timeout=100').close())
    log.engine.dispose()
    other.execute('BEGIN IMMEDIATE')
    with pytest.raises(sa.exc.OperationalError, match='locked'): log.append(events)
    assert len(log.read()) == 10, 'reading never waits, and nothing is there in part'
    other.execute('ROLLBACK')
    assert log.append(events) == 40 and log.count() == 50
    other.close()


MANY = '''
import sys
from aerec_nb.events import EventLog, new_event
url, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
log = EventLog(url)
for start in range(0, n, 50): log.append([new_event('feedback', event_id=f'{name}-{i}', user_id=name, item_id=i, value=1) for i in range(start, start+50)])
log.append([new_event('feedback', event_id=f'shared-{i}', user_id='x', item_id=i) for i in range(20)])
'''


def writers_and_a_reader(url, folder, n):
    "A reader that reads on sees every event once, whoever wrote it and whenever it was committed."
    log, seen, last = EventLog(url), [], 0
    running = [subprocess.Popen([sys.executable, '-c', MANY, url, f'w{i}', '500'], env={**variables(folder), 'PYTHONPATH': str(ROOT)}) for i in range(n)]
    while True:
        alive = any(p.poll() is None for p in running)
        rows, last = log.ratings_since(last)
        seen += [(r.user_id, r.item_id) for r in rows]
        if not alive and not rows: break
        time.sleep(.01)
    assert all(p.returncode == 0 for p in running)
    assert len(seen) == len(set(seen)) == log.count() == n*500+20


def test_many_writers_sqlite(tmp_path): writers_and_a_reader(sqlite_url(tmp_path/'events.db'), tmp_path, 4)


@on_postgres
def test_many_writers_postgres(fresh_database, tmp_path): writers_and_a_reader(fresh_database, tmp_path, 3)


def everything_a_log_does(url, folder):
    log = EventLog(url)
    day = 86400.
    events = [new_event('request', event_id=f'r{n}', time=day*(n//4)+n, request_id=f'r{n}', user_id='äü' if n % 2 else 'b', payload={'items': [1, 'x'], 'n': n}) for n in range(12)]
    events += [new_event('impression', event_id=f'i{n}', time=day*(n//4)+n, request_id=f'r{n}', item_id=1) for n in range(12)]
    assert log.append(events) == 24 and log.append(events) == 0
    files = log.export(folder/'archive', until=2*day)
    assert [f.name for f in files] == ['events-1970-01-01.parquet', 'events-1970-01-02.parquet'] and log.export(folder/'archive', until=2*day) == files
    both = pd.concat([load_events(f) for f in files], ignore_index=True)
    assert sorted(both.event_id) == sorted(log.read(until=2*day).event_id)
    table = next(iter(log.chunks('request', rows=100)))
    assert table.num_rows == 12 and [json.loads(p.as_py())['n'] for p in table['payload']] == list(range(12)) and table['simulated'].to_pylist() == [False]*12
    assert [len(t) for t in log.chunks(columns=['seq'], rows=10)] == [10, 10, 4]
    assert log.delete_user('äü', now=2*day+20) == 12, 'six requests, and the six impressions that belong to them'
    assert log.append([new_event('feedback', event_id='late', time=2*day, user_id='äü', item_id=1), new_event('feedback', event_id='new', time=2*day+21, user_id='äü', item_id=2)]) == 1
    assert EventLog(url).append([new_event('feedback', event_id='late', time=2*day, user_id='äü', item_id=1)]) == 0, 'another process refuses it too'
    assert log.ratings_since()[0][0].item_id == '2' and log.delete_user('nobody') == 0
    assert log.prune(day) == 4 and log.prune(day) == 0 and log.read().time.min() >= day
    with log.engine.connect() as db: lines = db.execute(sa.select(log.table.metadata.tables['forgotten'])).all()
    assert [l.n_events for l in lines] == [12, 0] and not any('äü' in str(v) for l in lines for v in l)
    newest = log.ratings_since()[1]
    log.prune(day*9e4)
    assert log.count() == 0 and log.append([new_event('feedback', user_id='b', item_id=1)]) == 1 and log.ratings_since()[1] > newest, 'a number is never given again'
    log.close()


def test_everything_sqlite(tmp_path):
    everything_a_log_does(sqlite_url(tmp_path/'events.db'), tmp_path)
    assert 'äü'.encode() not in b''.join(f.read_bytes() for f in tmp_path.glob('events.db*')), 'what was deleted is gone from the files'


@on_postgres
def test_everything_postgres(fresh_database, tmp_path): everything_a_log_does(fresh_database, tmp_path)


def test_a_log_of_before_opens_and_does_everything(tmp_path):
    "The table as the first version made it: without the forgotten, the index, and the growing number."
    with sqlite3.connect(tmp_path/'events.db') as db:
        db.execute('CREATE TABLE events (seq INTEGER PRIMARY KEY, event_id VARCHAR(200) NOT NULL UNIQUE, kind VARCHAR(20) NOT NULL, time DOUBLE NOT NULL, request_id VARCHAR(200), user_id VARCHAR(200), '
                   'item_id VARCHAR(200), value DOUBLE, payload TEXT NOT NULL, simulated BOOLEAN NOT NULL)')
        db.execute("INSERT INTO events VALUES (1, 'old', 'feedback', 5, 'r', 'u', 'i', 1, '{}', 0)")
    log = EventLog(tmp_path/'events.db')
    assert [r.item_id for r in log.ratings_since()[0]] == ['i'] and log.append([new_event('feedback', event_id='old')]) == 0
    assert log.delete_user('u') == 1 and log.count() == 0


def test_events_survive_a_parquet_round_trip(tmp_path):
    log = EventLog(tmp_path/'events.db')
    log.append([new_event('request', event_id='a', time=1., payload={'items': [1, 'z'], 'ms': 1.5}), new_event('feedback', event_id='b', time=2., user_id=1, item_id='q', value=.5)])
    save_events(log.read(), tmp_path/'events.parquet')
    pd.testing.assert_frame_equal(load_events(tmp_path/'events.parquet'), log.read())
