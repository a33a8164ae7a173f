"Bundles that lie, a registry that is killed, a real MLflow server, ONNX against the models, and the Dockerfile as plain commands. Loopback only."
import hashlib, json, os, random, re, shlex, shutil, signal, socket, sqlite3, stat, struct, subprocess, sys, time, urllib.request, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
from filelock import FileLock
from scipy.sparse import csr_matrix
from aerec_nb.configuration import AerecError, PackagingSettings
from aerec_nb.inference import Recommender, Segments
from aerec_nb.linear_models import solve_path
from aerec_nb.modeling import Blend, ColdItems, create_model, model_names
from aerec_nb.packaging import Registry, bundle_id, export_onnx, load_bundle, pack_zip, save_bundle, unpack_zip, verify_bundle
from aerec_nb.postprocessing import Chain
from conftest import BIN, ROOT, run, variables

TRIALS = 10 if os.environ.get('STRESS') else 1  # `make stress` runs the fault trials in full, `make test` a tenth of them
IN_CI = os.environ.get('CI', '').lower() in ('1', 'true')


def recommender(seed=0, **kw):
    "200 users, 60 items with genres, segments and negatives; another seed, other people."
    rng = np.random.default_rng(seed)
    x = csr_matrix((rng.random((200, 60)) < .15*np.linspace(2, .3, 60)).astype(np.float32))
    table = pd.DataFrame({'item_id': np.arange(60), 'title': [f'Film {n}' for n in range(60)], 'genres': np.resize(['Drama', 'Comedy|Drama', 'War'], 60)})
    segments = Segments.of(x, np.arange(200), pd.DataFrame({'user_id': np.arange(200), 'country': np.resize(['KR', 'NZ'], 200)}))
    return Recommender(create_model('ease', lam=10.).fit(x), np.arange(60), np.arange(200), x, chain=Chain(banned_items=[3]), item_table=table, segments=segments,
                       times=np.arange(x.nnz), negatives=csr_matrix((np.ones(3, bool), ([0, 1, 2], [5, 6, 7])), shape=x.shape), **kw)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory): return save_bundle(recommender(), tmp_path_factory.mktemp('bundles')/'b', {'name': 'films'})


@pytest.fixture(scope='module')
def bundles(tmp_path_factory):
    "Three bundles that differ, with headlines that compare."
    folder = tmp_path_factory.mktemp('bundles')
    card = lambda n: {'name': 'films', 'headline': {'metric': 'test NDCG@10', 'value': .2+n/1000, 'se': .01, 'data': 'd', 'split': 's'}}
    return [save_bundle(recommender(n), folder/str(n), card(n)) for n in range(3)]


# --- bundles ------------------------------------------------------------------------------------------------------------------------------------------

def one_line(error): return '\n' not in str(error.value) and len(str(error.value)) < 600


def test_a_bundle_gives_back_what_it_was_given(bundle):
    r, back = recommender(), load_bundle(bundle)
    pd.testing.assert_frame_equal(back.recommend_batch(k=10), r.recommend_batch(k=10))
    assert back.segments.names == ['country=KR', 'country=NZ'] and (back.segments.matrix != r.segments.matrix).nnz == 0 and back.segments.sizes.tolist() == [100, 100]
    assert back.recommend(context={'country': 'NZ'}).item_ids == r.recommend(context={'country': 'NZ'}).item_ids
    assert (back.times == r.times).all() and (back.negatives != r.negatives).nnz == 0
    assert not [p for p in bundle.iterdir() if p.suffix not in ('.json', '.md', '.parquet', '.safetensors', '.sha256')]


def test_reference_figures_against_plain_python(bundle):
    ref, r = load_bundle(bundle).info['reference'], recommender()
    lists = [r.recommend(user_id=u, k=10).item_ids for u in r.users]
    shown = [i for items in lists for i in items]
    users_of = np.bincount(r.histories.indices, minlength=60)
    genres = [set(g.split('|')) for g in r.item_table.genres]
    def likeness(a, b): return len(genres[a] & genres[b])/np.sqrt(len(genres[a])*len(genres[b]))
    assert ref['coverage'] == len(set(shown))/60 and ref['n_users'] == 200 and ref['fallback_share'] == 0
    assert ref['novelty'] == pytest.approx(np.mean([np.log2(200/users_of[i]) for i in shown]))
    assert ref['diversity'] == pytest.approx(np.mean([np.mean([1-likeness(a, b) for n, a in enumerate(items) for b in items[:n]]) for items in lists]), rel=1e-5)
    x = np.sort(np.bincount(shown, minlength=60))
    assert ref['gini'] == pytest.approx(np.abs(x[:, None] - x[None]).sum()/(2*60*x.sum()))
    scores = [i['score'] for u in r.users for i in r.recommend(user_id=u, k=10).items]
    assert ref['score_quantiles']['0.5'] == pytest.approx(np.median(scores), rel=1e-5)
    assert ref['history_length']['users'][4] == sum(8 <= n < 16 for n in np.diff(r.histories.indptr)) and sum(ref['item_popularity']['items']) == 60
    assert ref['item_popularity']['shown'][5] == sum(16 <= users_of[i] < 32 for i in shown)


def test_no_flipped_byte_goes_unnoticed(bundle, tmp_path):
    rng, copy = random.Random(0), Path(shutil.copytree(bundle, tmp_path/'b'))
    for n in range(60*TRIALS):
        p = rng.choice(sorted(copy.iterdir()))
        data = bytearray(p.read_bytes()); at = rng.randrange(len(data)); data[at] ^= 1 << rng.randrange(8)
        kept = p.read_bytes(); p.write_bytes(data)
        if p.name == 'manifest.sha256' and at >= 64: verify_bundle(copy) # after the sum only the file's name follows
        else:
            with pytest.raises(AerecError) as e: verify_bundle(copy)
            assert p.name in str(e.value) and one_line(e)
        p.write_bytes(kept)
    assert verify_bundle(copy) == bundle_id(bundle)


def test_a_zip_with_a_flipped_byte_is_refused_or_is_the_same_bundle(bundle, tmp_path):
    rng, path = random.Random(1), pack_zip(bundle, tmp_path/'b.zip')
    whole, refused = path.read_bytes(), 0
    for n in range(40*TRIALS):
        data = bytearray(whole); at = rng.randrange(len(data)) if n % 2 else len(data) - 1 - rng.randrange(1500) # every other one in the list of entries
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try: assert verify_bundle(path) == bundle_id(bundle)  # a time, or another field that says nothing
        except AerecError as e:
            refused += 1
            assert '\n' not in str(e)
    assert refused > 20


def add_member(path, name, data=b'x', mode=stat.S_IFREG | 0o644, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'a') as z:
        m = zipfile.ZipInfo(name); m.external_attr, m.compress_type = mode << 16, compress
        z.writestr(m, data)


def patch_last_entry(path, offset, value, form='<I'):
    "Change a field of the last entry of the list at the end of a zip."
    data = bytearray(path.read_bytes())
    at = data.rindex(b'PK\x01\x02')
    struct.pack_into(form, data, at+offset, value)
    path.write_bytes(data)


@pytest.fixture
def plain(tmp_path):
    "A zipped bundle without segments, so that there is a name to add."
    r = recommender(); r.segments = None
    return save_bundle(r, tmp_path/'plain.zip', k=5)


def refused(path, *said, **kw):
    with pytest.raises(AerecError) as e: load_bundle(path, **kw)
    assert all(s in str(e.value) for s in said) and one_line(e), str(e.value)


def test_zip_bombs(plain):
    bomb = shutil.copy(plain, plain.with_name('bomb.zip'))
    add_member(bomb, 'segments.parquet', b'\0'*2**27, compress=zipfile.ZIP_DEFLATED) # 128 MiB in 128 KiB
    assert bomb.stat().st_size < 2**20
    refused(bomb, 'its files have 128', 'packaging.bundle_limit_mib allows 64', limit_mib=64)
    patch_last_entry(bomb, 24, 1000) # it states 1,000 bytes
    refused(bomb, 'segments.parquet is larger than the 1,000 bytes it states', limit_mib=64)
    patch_last_entry(bomb, 24, 2**27+5)
    refused(bomb, 'segments.parquet is smaller than')


def test_text_that_is_too_long_is_not_read(plain, bundle, tmp_path):
    long = Path(shutil.copytree(bundle, tmp_path/'long'))
    with open(long/'golden.json', 'ab') as f: f.truncate(2**24+1)
    refused(long, 'golden.json has 16.0 MiB, and may have 16')
    with open(long/'manifest.json', 'ab') as f: f.truncate(2**24+1)
    refused(long, 'manifest.json has 16.0 MiB')


def test_members_that_a_bundle_has_not(plain):
    for name, mode, said in (('segments.parquet', stat.S_IFLNK | 0o777, 'is a link'), ('segments.parquet', stat.S_IFIFO | 0o644, 'is no plain file'), ('../x', stat.S_IFREG, 'leads out of the folder'),
                             ('/x', stat.S_IFREG, 'is an absolute path'), ('x/y', stat.S_IFREG, 'is in a folder'), ('run.py', stat.S_IFREG, 'does not belong to it'), ('SEGMENTS.parquet', 0, 'does not belong to it')):
        bad = shutil.copy(plain, plain.with_name('bad.zip'))
        add_member(bad, name, mode=mode)
        refused(bad, repr(name), said)
    with pytest.warns(UserWarning, match='Duplicate'): add_member(twice := shutil.copy(plain, plain.with_name('twice.zip')), 'chain.json')
    refused(twice, "'chain.json' is there twice")
    add_member(secret := shutil.copy(plain, plain.with_name('secret.zip')), 'segments.parquet')
    patch_last_entry(secret, 8, 1, '<H')
    refused(secret, "'segments.parquet' is encrypted")
    plain.with_name('none.zip').write_bytes(b'PK'*100)
    refused(plain.with_name('none.zip'), 'no zip that can be read')
    assert not (plain.parent.parent/'x').exists() and not [p for p in plain.parent.iterdir() if p.name.startswith('.')]


def test_a_zip_that_others_made_is_read(bundle, tmp_path):
    "Packed with deflate, in another order."
    with zipfile.ZipFile(tmp_path/'z.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for p in sorted(bundle.iterdir(), reverse=True): z.write(p, p.name)
    assert load_bundle(tmp_path/'z.zip').info['id'] == bundle_id(bundle)


# --- the registry -------------------------------------------------------------------------------------------------------------------------------------

def registry_at(folder, **kw): return Registry(f"sqlite:///{folder/'registry.db'}", folder/'bundles', 'films', **kw)


@pytest.fixture(scope='module')
def empty(tmp_path_factory):
    "A registry's file as MLflow makes it, which takes seconds."
    registry_at(folder := tmp_path_factory.mktemp('empty'))
    return folder/'registry.db'


@pytest.fixture
def home(empty, tmp_path):
    "A folder with an empty registry."
    shutil.copy(empty, tmp_path/'registry.db')
    return tmp_path


def in_child(work):
    "Run a function in a process of its own; -> its id."
    pid = os.fork()
    if pid: return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def check_whole(folder, before=None, after=None):
    "Everything that is registered verifies, the history ends where the alias points, nothing half made is in the way; -> what live is."
    r = registry_at(folder)
    assert (r.verify().result == 'ok').all(), r.verify()
    live, rows = r.current('live'), r._log.rows()
    moves = r.history().query("alias == 'live' and action != 'refuse'")
    assert r._stack('live')[-1] == live and int(moves.to.iloc[-1]) == live, moves
    for p in r.bundles_dir.iterdir() if r.bundles_dir.exists() else ():
        if not p.name.startswith('.'): assert verify_bundle(p)[:16] == p.name
    assert not [x for x in r.gc().itertuples() if x.bundle in {v.tags['bundle'][:16] for v in r.versions()}]
    if before is not None: assert live in (before, after), (live, [tuple(row) for row in rows])
    return live


def test_killed_while_registering_and_promoting(bundles, home):
    "At random moments: the old state or the new one, and the next process goes on from there."
    rng, r = random.Random(2), registry_at(home)
    began = time.perf_counter(); r.register(bundles[0]); r.promote(1, 'live', by='ann'); usual = time.perf_counter()-began
    live, deaths = 1, 0
    for n in range(20*TRIALS):
        target = bundles[n % 2 + 1]
        def work():
            mine = registry_at(home)
            version = mine.register(target)
            mine.promote(version, 'live', by='bob', why=f'trial {n}')
        child = in_child(work)
        time.sleep(rng.random()*1.5*usual)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        deaths += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        known = {v.tags['bundle']: int(v.version) for v in registry_at(home).versions()}
        live = check_whole(home, live, known.get(bundle_id(target)))
    assert deaths
    r = registry_at(home)
    r.gc(dry_run=False)
    assert not [p for p in r.bundles_dir.iterdir() if p.name.startswith('.')]
    assert r.promote(r.register(bundles[0]), 'live', by='ann').startswith('films: live is version 1')


@pytest.mark.parametrize('where, when', [('rename', 'before'), ('rename', 'after'), ('create_model_version', 'before'), ('create_model_version', 'after'),
                                         ('set_registered_model_alias', 'before'), ('set_registered_model_alias', 'after'), ('set_model_version_tag', 'before'), ('set_model_version_tag', 'after')])
def test_killed_at_the_worst_moment(bundles, home, where, when):
    "Right before and right after each step that others see."
    r = registry_at(home)
    r.register(bundles[0]); r.promote(1, 'live', by='ann'); r.register(bundles[1]); r.promote(2, 'live', by='ann')
    def work():
        mine = registry_at(home)
        holder, name = (os, where) if where == 'rename' else (mine._mlflow, where)
        do = getattr(holder, name)
        def deadly(*a, **kw):
            if when == 'after': do(*a, **kw)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(holder, name, deadly)
        if where == 'set_model_version_tag': mine.archive(1, by='bob')
        else: mine.promote(mine.register(bundles[2]), 'live', by='bob')
    _, status = os.waitpid(in_child(work), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    live = check_whole(home, 2, 3)
    r = registry_at(home)
    if where == 'set_registered_model_alias':
        assert live == (2 if when == 'before' else 3)
        assert r.history().action.tolist()[-1] == ('interrupted' if when == 'before' else 'promote')
    if where == 'set_model_version_tag': assert ('archived' in r.versions()[0].tags) == (when == 'after') and r.history().action.tolist()[-1] == ('interrupted' if when == 'before' else 'archive')
    else:
        r.promote(r.register(bundles[2]), 'live', by='ann')
        assert r.rollback('live', by='ann') == 'films: live is version 2 (was 3)' and r.rollback('live', by='ann') == 'films: live is version 1 (was 2)'


def test_many_at_once(bundles, home):
    "Each bundle has one version, whoever comes first."
    children = [in_child(lambda b=b: registry_at(home).register(b)) for b in bundles*2]
    assert [os.waitpid(c, 0)[1] for c in children] == [0]*6
    assert sorted(int(v.version) for v in registry_at(home).versions()) == [1, 2, 3]


def test_gates_decide(bundles, home):
    r = registry_at(home)
    for b in bundles: r.register(b)
    assert r.promote(3, 'live', by='ann').gates.result.tolist() == ['passed', 'not compared', 'passed', 'passed']
    assert r.promote(1, 'live', by='ann').gates.result.tolist() == ['passed']*4 # .200 is within .202 - 1.96 x .01
    tight = registry_at(home, policy=PackagingSettings(gate_size_mib=.001, gate_latency_ms=1e-9))
    with pytest.raises(AerecError, match='version 2 may not become live: latency: .* ms a recommendation, asked is at most 1e-09 ms .*; size: .* MiB'): tight.promote(2, 'live', by='bob')
    with pytest.raises(AerecError, match='live is never forced'): tight.promote(2, 'live', by='bob', why='now', force=True)
    assert tight.promote(2, 'dev', by='bob').gates is None and r.current('live') == 1
    last = r.history().iloc[-2]
    assert last.action == 'refuse' and 'latency: failed; size: failed' in last.gates and last.by == 'bob'
    stored = r.resolve(2)
    golden = json.loads((stored/'golden.json').read_text()); golden[0]['answer'][0][1] += 1; (stored/'golden.json').write_text(json.dumps(golden))
    with pytest.raises(AerecError, match='golden.json was changed'): r.promote(2, 'live', by='ann')


def test_a_registry_of_before_goes_on(bundles, home):
    "Its history has no column for gates, and gets one; rows that are there stay."
    r = registry_at(home); r.register(bundles[0]); r.promote(1, 'dev', by='ann'); del r
    with sqlite3.connect(home/'registry.db') as db:
        db.executescript('CREATE TABLE old AS SELECT * FROM aerec_alias_history; DROP TABLE aerec_alias_history; DROP TABLE aerec_alias_done; ALTER TABLE old DROP COLUMN gates; ALTER TABLE old RENAME TO aerec_alias_history;')
    r = registry_at(home)
    assert r.history()[['action', 'alias', 'to', 'gates']].values.tolist() == [['promote', 'dev', 1, '']]
    with pytest.raises(Exception, match='append-only'), sqlite3.connect(home/'registry.db') as db: db.execute("UPDATE aerec_alias_history SET why = 'x'")


# --- a real MLflow server -----------------------------------------------------------------------------------------------------------------------------

SERVER_PINS = ROOT/'tests'/'mlflow_server.txt'


def server_environment():
    "An environment for the server alone, made once and kept beside the tests' own."
    home = Path(sys.prefix)/'mlflow-server'
    ready, wanted = home/'.ready', SERVER_PINS.read_text()
    with FileLock(f'{home}.lock', timeout=600):
        if ready.exists() and ready.read_text() == wanted: return home
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, '-m', 'venv', home], check=True, timeout=120)
        made = subprocess.run([home/'bin'/'python', '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--retries', '1', '--no-deps', '-r', SERVER_PINS], capture_output=True, text=True, timeout=600)
        if made.returncode:
            reason = f'no MLflow server could be installed: {(made.stderr.strip().splitlines() or ["?"])[-1]}'
            if IN_CI: pytest.fail(reason)
            pytest.skip(reason)
        ready.write_text(wanted)
    return home


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def answers(url, seconds, process, log):
    "Wait until something answers with 200."
    opener, until = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic()+seconds
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with opener.open(url, timeout=5) as a: return a.status == 200
        except OSError: time.sleep(.2)
    raise AssertionError(f'{url} does not answer: {log.read_text()[-3000:]}')


def end(process):
    "End a process and its children."
    for number in (signal.SIGTERM, signal.SIGKILL):
        try: os.killpg(process.pid, number)
        except ProcessLookupError: return
        try: process.wait(10)
        except subprocess.TimeoutExpired: continue
    process.wait()


@pytest.fixture
def mlflow_server(tmp_path):
    "The address of a server on a free loopback port, with its own database and artifacts."
    python, port, log = server_environment()/'bin'/'python', free_port(), tmp_path/'server.log'
    (tmp_path/'server').mkdir()
    command = [python, '-m', 'mlflow', 'server', '--host', '127.0.0.1', '--port', str(port), '--workers', '1', '--backend-store-uri', f"sqlite:///{tmp_path/'server'/'mlflow.db'}",
               '--artifacts-destination', tmp_path/'server'/'artifacts']
    env = {**variables(tmp_path), 'MLFLOW_DISABLE_TELEMETRY': 'true', 'DO_NOT_TRACK': 'true', 'MLFLOW_SERVER_ENABLE_JOB_EXECUTION': 'false', 'PATH': f'{python.parent}{os.pathsep}{os.environ["PATH"]}'}
    with open(log, 'w') as out: server = subprocess.Popen([str(c) for c in command], env=env, cwd=tmp_path/'server', stdout=out, stderr=out, start_new_session=True)
    try:
        assert answers(f'http://127.0.0.1:{port}/health', 90, server, log)
        yield f'http://127.0.0.1:{port}'
    finally: end(server)


@pytest.mark.xdist_group('mlflow')
def test_a_real_mlflow_server_by_its_uri(mlflow_server, bundles, tmp_path, capfd):
    "Two machines, one server: what one registers the other finds, fetches, verifies and serves."
    here, there = (Registry(mlflow_server, tmp_path/machine/'bundles', 'films') for machine in ('here', 'there'))
    assert [here.register(b) for b in bundles] == [1, 2, 3] and here.register(bundles[1]) == 2
    assert here.promote(1, 'live', by='ann') == 'films: live is version 1' and here.promote(2, 'live', by='ann') == 'films: live is version 2 (was 1)'
    assert here.rollback('live', by='bob') == 'films: live is version 1 (was 2)'
    assert here.history().action.tolist() == ['promote', 'promote', 'rollback']
    assert there.current('live') == 1 and not (tmp_path/'there'/'bundles').exists()
    assert load_bundle(there.resolve('live')).info['id'] == bundle_id(bundles[0])
    assert there.list().aliases.tolist() == ['live', '', ''] and there.list().value.tolist() == [.2, .201, .202]
    assert there.promote(3, 'stage', by='eve').gates is not None and here.current('stage') == 3
    here.promote(3, 'live', by='ann')
    assert there.rollback('live', by='eve') == 'films: live is version 1 (was 3)' and Registry(mlflow_server, tmp_path/'here'/'bundles', 'films').current('live') == 1
    assert here.history().equals(there.history()) and here.history().action.tolist() == ['promote', 'promote', 'rollback', 'promote', 'promote', 'rollback']
    here.archive(2, by='ann', why='old')
    with pytest.raises(AerecError, match='version 2 was archived'): there.resolve(2)
    for p in (tmp_path/'server'/'artifacts').rglob('*.zip'): p.write_bytes(pack_zip(bundles[0], tmp_path/'other.zip').read_bytes()) # somebody changes what the server keeps
    shutil.rmtree(tmp_path/'there'/'bundles')
    with pytest.raises(AerecError, match='version 3: the server has another bundle than was registered'): there.resolve(3)
    said = capfd.readouterr()
    assert not said.out and 'Downloading' not in said.err, said
    with pytest.raises(AerecError, match='nothing answers there as an MLflow registry does'): Registry(f'{mlflow_server}/nothing', tmp_path/'x'/'bundles', 'films')


# --- ONNX ---------------------------------------------------------------------------------------------------------------------------------------------

def fitted_models():
    "Every model that has a graph, in every form it can take."
    rng = np.random.default_rng(0)
    x = csr_matrix((rng.random((120, 50)) < .15).astype(np.float32)); x.data[:] = rng.random(x.nnz)+.5
    features = csr_matrix((rng.random((50, 6)) < .3).astype(np.float32))
    few = {n: {'num_epoch': 2} for n in ('autoencoder', 'mult_dae', 'mult_vae', 'recvae', 'elsa')}
    made = {n: create_model(n, **few.get(n, {})).fit(x) for n in model_names() if n not in ('blend', 'ials')}
    made |= {'ease dual': create_model('ease', form='dual').fit(x), 'rdlae dual': create_model('rdlae', form='dual', user_power=.3, item_power=.2).fit(x),
             'ease head': create_model('ease', max_items=20).fit(x), 'ease head dual': create_model('ease', max_items=20, form='dual').fit(x),
             'ease features': create_model('ease').fit(x, features), 'mult_dae features': create_model('mult_dae', num_epoch=2).fit(x, features),
             'mult_vae linear': create_model('mult_vae', linear_decoder=True, num_epoch=2).fit(x)}
    made |= {f'path {n}': m for n, m in enumerate(solve_path(create_model('rdlae', form='dual'), x, lam=[10., 100.]))}
    made['blend'] = Blend.of([made['ease'], made['mult_dae'], made['popularity']], [1, .5, .2])
    likes = csr_matrix(np.vstack([features.toarray(), rng.random((4, 6)) < .4, np.zeros((1, 6))]).astype(np.float32))
    made['cold items'] = ColdItems.of(made['ease'], likes)
    made['blend of cold items'] = Blend.of([made['cold items'], made['cold items']], [1, -2])
    return made


def test_onnx_gives_the_scores_of_the_model(tmp_path):
    "For one history, for many, and for an empty one, to a ten-thousandth of the largest score."
    onnxruntime, rng = pytest.importorskip('onnxruntime'), np.random.default_rng(1)
    for name, m in fitted_models().items():
        history = (rng.random((9, m.n_items)) < .2)*(rng.random((9, m.n_items))+.5)
        history[0] = 0
        session = onnxruntime.InferenceSession(str(export_onnx(m, tmp_path/'m.onnx')), providers=['CPUExecutionProvider'])
        for rows in (history, history[3:4]):
            want = m.score(csr_matrix(rows.astype(np.float32)))
            got, = session.run(['scores'], {'history': rows.astype(np.float32)})
            assert got.dtype == np.float32 and np.abs(got-want).max() <= 1e-4*np.abs(want).max(), name


def test_onnx_from_a_bundle_ranks_as_it_does(bundle, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    r = load_bundle(bundle)
    scores, = onnxruntime.InferenceSession(str(export_onnx(r, tmp_path/'m.onnx')), providers=['CPUExecutionProvider']).run(None, {'history': r.histories[:20].toarray()})
    for user in range(20):
        scores[user][[3, *r.histories[user].indices, *r.negatives[user].indices]] = -np.inf
        assert np.argsort(-scores[user], kind='stable')[:10].tolist() == r.recommend(user, k=10).item_ids


def test_onnx_says_what_it_cannot_do(tmp_path, monkeypatch):
    x = csr_matrix(np.eye(5, dtype=np.float32)[[0, 1, 2, 3, 4, 0]] + np.eye(5, dtype=np.float32)[[1, 2, 3, 4, 0, 2]])
    with pytest.raises(AerecError, match="the model 'ials' has no graph"): export_onnx(create_model('ials', factors=2, iterations=1).fit(x), tmp_path/'m.onnx')
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(AerecError, match=r"needs the extra onnx, which is not installed: pip install 'aerec_nb\[onnx\]'"): export_onnx(create_model('ease').fit(x), tmp_path/'m.onnx')
    assert not [*tmp_path.iterdir()]


# --- the container ------------------------------------------------------------------------------------------------------------------------------------

def instructions(text):
    "A Dockerfile as (instruction, argument) pairs."
    lines = re.sub(r'\\\n\s*', ' ', '\n'.join(line for line in text.splitlines() if not line.startswith('#'))).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def test_the_dockerfile_is_of_two_stages_and_ends_without_rights():
    text = (ROOT/'Dockerfile').read_text()
    steps = instructions(text)
    assert [k for k, _ in steps].count('FROM') == 2 and all(a.startswith('python:3.11-slim') for k, a in steps if k == 'FROM')
    last = steps[max(n for n, (k, _) in enumerate(steps) if k == 'FROM'):]
    assert [a for k, a in last if k == 'USER'] == ['aerec'] and [a for k, a in last if k == 'COPY' and '--from=build' in a]
    assert any(k == 'HEALTHCHECK' and '/health/ready' in a for k, a in last) and last[-1][0] == 'CMD'
    assert not re.search(r'index-url\s+\S*//|https?://(?!127\.0\.0\.1)', text), 'no host of a registry'
    ignored = (ROOT/'.dockerignore').read_text().splitlines()
    assert '*' in ignored
    for k, a in steps: # what is copied is let in
        if k == 'COPY' and '--from' not in a:
            for name in a.split()[:-1]: assert any(line.startswith(f'!{name}') for line in ignored) and (ROOT/name).exists(), name


def test_the_dockerfile_as_plain_commands(bundle, tmp_path):
    "Its steps one after another in temporary folders, packages borrowed from this environment; its command then serves a bundle. What needs root (useradd) is left out."
    places = {'/src': tmp_path/'src', '/opt/venv': tmp_path/'venv', '/app': tmp_path/'app', '/data': tmp_path/'data'}
    port = free_port()
    def here(text):
        for place, folder in places.items(): text = re.sub(rf'(?<![\w.]){place}(?![\w])', str(folder), text)
        return text.replace('0.0.0.0', '127.0.0.1').replace('8000', str(port))
    for folder in places.values(): folder.mkdir() if folder.name != 'venv' else None
    env = {k: v for k, v in os.environ.items() if not k.startswith('AEREC_') and k not in ('IN_TEST', 'VIRTUAL_ENV', 'PYTHONPATH')}
    folder, stage, command, health = None, 0, None, None
    for k, a in instructions((ROOT/'Dockerfile').read_text()):
        if k == 'FROM': stage += 1
        elif k == 'WORKDIR': folder = Path(here(a))
        elif k == 'ARG': env.setdefault(*a.replace('"', '').split('=', 1))
        elif k == 'COPY' and '--from' not in a:
            for name in a.split()[:-1]:
                if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns('__pycache__'))
                else: shutil.copy(ROOT/name, folder)
        elif k == 'RUN' and 'useradd' not in a:
            done = subprocess.run(['sh', '-ec', here(a.replace('python -m venv', f'{sys.executable} -m venv'))], cwd=folder, env={**env, 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, (a, done.stdout[-2000:], done.stderr[-2000:])
            if '-m venv' in a: # packages that are here already need not be fetched again
                lib = next((tmp_path/'venv').glob('lib/python*/site-packages'))
                (lib/'borrowed.pth').write_text(str(next(Path(sys.prefix).glob('lib/python*/site-packages')))+'\n')
        elif k == 'ENV':
            for pair in shlex.split(a): name, value = pair.split('=', 1); env[name] = here(value).replace('$PATH', env['PATH'])
        elif k == 'HEALTHCHECK': health = json.loads(here(a[a.index('['):]))
        elif k == 'CMD': command = json.loads(here(a))
    assert stage == 2 and env['AEREC_ENV'] == 'live'
    where = run('python', '-c', 'import aerec_nb; print(aerec_nb.__file__)', env=env, cwd=tmp_path/'app')
    assert str(tmp_path/'venv') in where.stdout, where
    key = 'a-key-that-is-long-enough-to-be-one'
    env['AEREC_SERVING__API_KEYS'] = f'read:sha256:{hashlib.sha256(key.encode()).hexdigest()}'
    script = ("import sys; from aerec_nb.configuration import load_settings; from aerec_nb.packaging import Registry; r = Registry.from_settings(load_settings()); "
              "print(r.promote(r.register(sys.argv[1]), 'live', by='release-manager', why='first'))")
    moved = run('python', '-c', script, bundle, env=env, cwd=tmp_path/'app')
    assert moved.stdout.strip() == 'aerec: live is version 1', moved
    log = tmp_path/'served.log'
    with open(log, 'w') as out: served = subprocess.Popen([str(tmp_path/'venv'/'bin'/command[0]), *command[1:]], env=env, cwd=tmp_path/'app', stdout=out, stderr=out, start_new_session=True)
    try:
        assert answers(f'http://127.0.0.1:{port}/health/ready', 60, served, log)
        assert subprocess.run([str(tmp_path/'venv'/'bin'/health[0]), *health[1:]], env=env, timeout=60).returncode == 0
        ask = urllib.request.Request(f'http://127.0.0.1:{port}/v1/recommend/7', headers={'X-API-Key': key})
        assert len(json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(ask, timeout=10))['items']) == 10
    finally: end(served)
    assert subprocess.run([str(tmp_path/'venv'/'bin'/health[0]), *health[1:]], env=env, timeout=60, capture_output=True).returncode != 0
    assert (tmp_path/'data'/'registry.db').exists() and (tmp_path/'data'/'events.db').exists()
