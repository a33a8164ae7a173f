"The whole way: data of every shape through the twelve stages, mistakes in one line, the report, the command."
import json, os, re, shutil, subprocess
from pathlib import Path
import pandas as pd, pytest
from conftest import BIN, ROOT, run

REAL = ROOT.parent/'shared'/'data'


def aerec(*words, env, cwd, timeout=280): return run(BIN/'aerec', *words, env=env, cwd=cwd, timeout=timeout)


def only_run(environ):
    found, = [p for p in Path(environ['AEREC_RUNS_DIR']).iterdir() if p.is_dir() and not p.name.startswith('.')]
    return found


def sample(): return pd.read_csv(ROOT/'dataset'/'sample'/'ratings.csv')


def test_twelve_stages_on_the_sample(environ, tmp_path):
    done = aerec('run', env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(environ)
    assert 'sample' in done.stdout and 'Leaderboard' in done.stdout and f'report: {folder/"index.html"}' in done.stdout and 'serve' in done.stdout
    assert len(list(folder.glob('*/manifest.json'))) == 12 and len(list((folder/'report').glob('*.html'))) == 12
    index = (folder/'index.html').read_text()
    assert all(f'report/{p.stem}.html' in index for p in (folder/'report').glob('*.html'))
    for page in [folder/'index.html', *(folder/'report').glob('*.html')]:
        assert not re.search(r'<script|<link|src="http', page.read_text()), f'{page.name} needs something from outside'
    board = pd.read_parquet(folder/'validation'/'leaderboard.parquet').set_index('model')
    ndcg = next(c for c in board.columns if c.startswith('test_ndcg'))
    assert board.loc['ease', ndcg] > 1.5*board.loc['popularity', ndcg], board
    listed = aerec('recommend', '--user', str(sample().userId[0]), '-k', '5', '--json', env=environ, cwd=tmp_path)
    assert listed.returncode == 0 and len(json.loads(listed.stdout)) == 5, listed.stderr
    again = aerec('run', '--run', folder.name, env=environ, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    for stage in ('data_import', 'business_preprocessing', 'model_preprocessing', 'modeling', 'training', 'validation', 'inference', 'postprocessing'):
        assert (folder/stage/'manifest.json').exists()


def two_columns(): return sample().iloc[:8000][['userId', 'movieId']]
def plays(): return sample().iloc[:8000][['userId', 'movieId']].assign(plays=lambda d: (d.movieId*7 + d.userId) % 40 + 1)
def without_times(): return sample().iloc[:8000].drop(columns='timestamp')


@pytest.mark.parametrize('make, said', [(two_columns, 'every row is an interaction'), (plays, 'counts, which become weights'), (without_times, 'without times')])
def test_data_of_another_shape_runs_through(make, said, environ, tmp_path):
    (tmp_path/'mine').mkdir()
    make().to_csv(tmp_path/'mine'/'ratings.csv', index=False)
    done = aerec('run', '--data', 'mine', env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout, done.stdout


def test_users_with_few_ratings_are_counted(environ, tmp_path):
    (tmp_path/'mine').mkdir()
    data = sample().iloc[:8000]
    pd.concat([data, pd.DataFrame({'userId': [900001, 900002], 'movieId': data.movieId[:2].to_numpy(), 'rating': 5., 'timestamp': 1})]).to_csv(tmp_path/'mine'/'ratings.csv', index=False)
    done = run(BIN/'papermill', '--no-progress-bar', ROOT/'nbs'/'01b_model_preprocessing.ipynb', tmp_path/'o.ipynb',
               env={**environ, 'AEREC_DATA__SOURCE': str(tmp_path/'mine')}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((only_run(environ)/'model_preprocessing'/'manifest.json').read_text())
    assert any('without' in k and v >= 2 for k, v in manifest['metrics'].items()), manifest['metrics']


BAD = {'missing file': (None, 'no such'), 'empty file': ('', 'empty'),
       'no item column': ('userId,rating\n1,5\n', 'item_id'), 'no user column': ('movieId,rating\n1,5\n', 'user_id'),
       'a rating that is no number': ('userId,movieId,rating\n1,1,5\n1,2,good\n', 'good'), 'header only': ('userId,movieId,rating\n', 'no rows'),
       'too few for any split': ('userId,movieId\n1,1\n2,2\n', 'interactions')}


@pytest.mark.parametrize('what', BAD)
def test_bad_input_gives_one_line_and_changes_nothing(what, environ, tmp_path):
    text, said = BAD[what]
    if text is not None:
        (tmp_path/'mine').mkdir()
        (tmp_path/'mine'/'ratings.csv').write_text(text)
    listing = lambda: sorted(p.relative_to(ROOT) for p in (ROOT/'dataset').rglob('*'))
    before = listing()
    done = aerec('run', '--data', 'mine', env=environ, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and said in done.stderr and 'mine' in done.stderr + done.stdout, done.stderr
    assert not Path(environ['AEREC_RUNS_DIR']).exists() and listing() == before


def test_duplicates_follow_the_stated_policy(environ, tmp_path):
    (tmp_path/'mine').mkdir()
    data = sample().iloc[:3000]
    pd.concat([data, data.iloc[:7]]).to_csv(tmp_path/'mine'/'ratings.csv', index=False)
    env = {**environ, 'AEREC_DATA__SOURCE': str(tmp_path/'mine')}
    notebook = ROOT/'nbs'/'01_data_import.ipynb'
    assert run(BIN/'papermill', '--no-progress-bar', notebook, 'o.ipynb', env=env, cwd=tmp_path).returncode == 0
    assert json.loads((only_run(environ)/'data_import'/'source.json').read_text())['n_duplicates'] == 7
    refused = run(BIN/'papermill', '--no-progress-bar', notebook, 'o.ipynb', env={**env, 'AEREC_DATA__ON_DUPLICATE': 'raise'}, cwd=tmp_path)
    assert refused.returncode != 0 and 'AerecError' in refused.stderr and 'duplicate' in refused.stderr


def test_mistakes_of_the_command_line(environ, tmp_path):
    for words, said in [(['run', '-p', 'lrr', '1'], "did you mean 'lr'?"), (['run', '-p', 'split', 'leave'], 'split.split'),
                        (['run', '-p', 'model', 'easy'], "easy"), (['run', '-p', 'model', 'popularity', '-p', 'lr', '0.1'], 'lr'),
                        (['recommend', '--user', '1'], 'aerec run'), (['run', '--env', 'prod'], 'unknown environment')]:
        done = aerec(*words, env=environ, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr, (words, done.stdout, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not Path(environ['AEREC_RUNS_DIR']).exists()


def test_live_and_stage_never_train(environ, tmp_path):
    done = aerec('run', '--env', 'live', env={**environ, 'AEREC_SERVING__API_KEYS': 'k'}, cwd=tmp_path)
    assert done.returncode == 2 and 'does not train' in done.stderr, done.stdout + done.stderr


def test_environments_differ(environ, tmp_path):
    done = aerec('config', '--diff', 'dev', 'live', '--json', env={k: v for k, v in environ.items() if not k.startswith('AEREC_')}, cwd=ROOT)
    names = {row['setting'] for row in json.loads(done.stdout)}
    assert {'training.trains', 'serving.require_auth', 'packaging.alias', 'packaging.promoters', 'run.log_level'} <= names


@pytest.mark.parametrize('data', [p for p in [REAL/'ml-latest-small'] if p.exists()])
def test_the_lectures_facts(data, environ, tmp_path):
    done = aerec('run', '--data', data, '-p', 'n_requests', '30', env={**environ, 'AEREC_ENV': 'dev'}, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(environ)
    pages = (folder/'report'/'01_data_import.html').read_text()
    for fact in ('610', '9,724', '100,836', '0.9830', '70.5', '168', '2,698'): assert fact in pages, fact
    waterfall = (folder/'report'/'01a_business_preprocessing.html').read_text()
    assert '0.810851' in waterfall and '0.189149' in waterfall
    replay = pd.read_parquet(folder/'validation'/'lecture_replay.parquet')
    ndcg, hit = [next(c for c in replay.columns if c.lower().startswith(name)) for name in ('ndcg', 'hit')]
    leaky = replay.iloc[0]
    assert .22 <= leaky[ndcg] <= .30 and .25 <= leaky[hit] <= .32, replay
    ease = replay[replay.iloc[:, 0].str.contains('ease', case=False)].iloc[0]
    assert round(ease[ndcg], 4) == .2154 and round(ease[hit], 4) == .1857, replay
