"""Sources other than text: databases (SQLite, a real PostgreSQL), our event log, Parquet in parts, zips; and secrets
that never show.
"""

import json
import socket
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import psycopg
import pytest
from conftest import real_data

from aerec_nb import data_import
from aerec_nb.core.artifacts import open_run
from aerec_nb.core.errors import AerecError
from aerec_nb.core.settings import load_settings
from aerec_nb.data.event_log import EventLog
from aerec_nb.data.events import new_event
from aerec_nb.data_import import describe_source, load_items, load_ratings

on_postgres = pytest.mark.xdist_group("postgres")
SHOP = [uuid.uuid5(uuid.NAMESPACE_DNS, f"item {i}") for i in range(4)]


@pytest.fixture
def shop(fresh_database):
    "A shop's database: ratings of several types in tables, films with an array of genres."
    with psycopg.connect(fresh_database) as c:
        c.execute("create table rated (customer bigint, product uuid, sku text, stars numeric(2, 1), at timestamptz)")
        c.execute(
            "create table items (item_id uuid primary key, title text, genres text[], year int, price numeric(8, 2))"
        )
        c.execute("create function wipe() returns int language sql as 'delete from rated; select 1'")
        rows = [
            (2**53 + 1, SHOP[0], "007", "4.5", "2026-03-29 01:30:00+01"),
            (2**53 + 2, SHOP[1], "b", "3.0", "2026-03-29 03:30:00+02"),
            (2**53 + 1, SHOP[2], "c", "1.0", "2026-01-01 00:00:00+00"),
        ]
        c.cursor().executemany("insert into rated values (%s, %s, %s, %s, %s)", rows)
        c.execute(
            "insert into items values (%s, %s, %s, 2001, 9.99), (%s, %s, null, null, null)",
            (SHOP[0], "Amélie", ["Comedy", "Romance"], SHOP[1], "Nothing"),
        )
    return fresh_database


QUERY = "select customer as user_id, product as item_id, stars as rating, at as timestamp from rated order by at"


@on_postgres
@pytest.mark.parametrize("driver", ["postgresql", "postgresql+psycopg", "postgres"])
def test_postgres_types_become_the_standard_frame(driver, shop):
    ratings = load_ratings(shop.replace("postgresql", driver, 1), query=QUERY)
    expected = [
        (2**53 + 1, SHOP[2], 1.0, 1767225600),
        (2**53 + 1, SHOP[0], 4.5, 1774744200),
        (2**53 + 2, SHOP[1], 3.0, 1774747800),
    ]
    assert [tuple(row) for row in ratings.itertuples(index=False)] == expected
    assert ratings.user_id.dtype == "int64" and ratings.timestamp.dtype == "int64"


@on_postgres
def test_postgres_text_ids_tables_by_name_and_arrays(shop):
    with psycopg.connect(shop) as c:
        c.execute("create view plays as select customer as user_id, sku as item_id from rated")
    assert load_ratings(shop).item_id.tolist() == ["007", "b", "c"], "found by its name"
    assert load_ratings(shop, query="public.plays").item_id.tolist() == ["007", "b", "c"]
    items = load_items(shop)
    assert items.item_id.tolist() == SHOP[:2] and items.title.tolist() == ["Amélie", "Nothing"]
    assert items.genres[0] == "Comedy|Romance" and pd.isna(items.genres[1]) and items.price[0] == 9.99


@on_postgres
def test_a_hundred_thousand_rows_in_order(fresh_database):
    n = 120_000  # more than one piece of an answer
    with psycopg.connect(fresh_database) as c:
        c.execute(
            f"create table interactions as select (i % 1000) as user_id, 'item ' || (i / 1000) as item_id, case when "
            f"i < 110000 then 4 else 3.5 end::numeric as rating from generate_series(0, {n - 1}) i"
        )

    def look():
        return data_import._locate(
            fresh_database,
            load_settings("test"),
            [Path.cwd()],
            'select * from interactions order by item_id collate "C" desc, user_id',
        )

    source = look()
    frame, where = source.read("ratings")
    expected = pd.DataFrame(
        {
            "user_id": np.arange(n) % 1000,
            "item_id": [f"item {i // 1000}" for i in range(n)],
            "rating": np.where(np.arange(n) < 110_000, 4, 3.5),
        }
    )
    expected = expected.sort_values(["item_id", "user_id"], ascending=[False, True], ignore_index=True)
    pd.testing.assert_frame_equal(frame, expected, check_dtype=False)
    assert frame.user_id.dtype == "int64" and frame.rating.dtype == "float64"
    assert source.hashes() == look().hashes()
    with psycopg.connect(fresh_database) as c:
        c.execute("update interactions set rating = 1 where user_id = 999 and item_id = 'item 7'")
    assert source.hashes() != look().hashes()


@on_postgres
@pytest.mark.parametrize(
    "query, code, said",  # said: PostgreSQL's own words
    [
        ("select nobody from rated", "query_failed", 'column "nobody" does not exist'),
        ("select * from nowhere", "query_failed", 'relation "nowhere" does not exist'),
        ("selec * from rated", "query_failed", 'syntax error at or near "selec"'),
        ("delete from rated", "query_failed", 'syntax error at or near "delete"'),
        ("select wipe() as user_id, 1 as item_id", "query_failed", "cannot execute DELETE in a read-only transaction"),
        ("select 1 as user_id, 2 as user_id", "duplicate_name", None),
        ("select customer as user_id, product as item_id from rated where false", "empty_data", None),
        ("select 1/0 as user_id, 1 as item_id", "query_failed", "division by zero"),
    ],
)
def test_a_bad_query_gives_one_line_without_the_password(query, code, said, shop):
    with pytest.raises(AerecError, match=said) as e:
        load_ratings(shop, query=query)
    assert e.value.code == code and "s3cret" not in e.value.where
    assert "\n" not in str(e.value) and "s3cret" not in str(e.value) and "://aerec:***@127.0.0.1" in str(e.value), (
        e.value
    )
    with psycopg.connect(shop) as c:
        assert c.execute("select count(*) from rated").fetchone() == (3,)


@on_postgres
def test_a_query_may_hold_what_others_take_for_parameters(shop):
    ratings = load_ratings(
        shop,
        query=(
            "select customer::text as user_id, sku as item_id from rated where sku like '%7' and ':a' = ':a' -- 100 % "
            ":no %(no)s;\n;"
        ),
    )
    assert ratings.item_id.tolist() == ["007"]


@on_postgres
def test_servers_and_databases_that_are_not_there(postgres_url):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for url, code, said in (  # said: PostgreSQL's own words
        (f"postgresql://ann:s3cret@127.0.0.1:{port}/shop", "no_connection", "Connection refused"),
        (postgres_url.replace("/postgres", "/nowhere"), "no_connection", 'database "nowhere" does not exist'),
        (postgres_url.replace("aerec:", "ann:"), "no_connection", 'password authentication failed for user "ann"'),
        (postgres_url.rpartition("/")[0] + "/postgres", "not_found", None),
    ):
        with pytest.raises(AerecError, match=said) as e:
            load_ratings(url)
        assert e.value.code == code and "s3cret" not in e.value.where
        assert "\n" not in str(e.value) and "s3cret" not in str(e.value), e.value


def test_a_server_that_accepts_and_is_silent_is_given_up():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        database = data_import._database(f"postgresql://ann@127.0.0.1:{s.getsockname()[1]}/shop", [], 2.0)
        with pytest.raises(AerecError) as e, database.connected():
            pass
        assert e.value.code == "no_connection" and "\n" not in str(e.value)


@on_postgres
def test_the_stage_reads_a_database_once_and_keeps_it_for_the_run(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("AEREC_DATA__SOURCE", shop)
    asked = []
    ask = data_import._ask
    monkeypatch.setattr(data_import, "_ask", lambda database, query: (asked.append(query), ask(database, query))[1])
    more = "select customer as user_id, i as item_id, 4.0 as rating from rated, generate_series(1, 9) i"
    first = open_run(
        env="test", runs_dir=str(tmp_path / "runs"), query=more, items_query="select item_id, title from items"
    )
    stage = first.execute("data_import")
    assert asked == [more, "select item_id, title from items"]
    assert first.ensure("data_import") == stage and len(asked) == 2
    with psycopg.connect(shop) as c:
        c.execute("delete from rated where customer = %s", (2**53 + 2,))
    assert len(pd.read_parquet(first.ensure("data_import") / "ratings.parquet")) == 18, "a run keeps what it has read"
    second = open_run(
        env="test", runs_dir=str(tmp_path / "runs"), query=more, items_query="select item_id, title from items"
    )
    second.quiet = True
    assert len(pd.read_parquet(second.ensure("data_import") / "ratings.parquet")) == 9, (
        "a new run sees what has changed"
    )
    written = "".join(p.read_text(errors="replace") for p in (tmp_path / "runs").rglob("*") if p.is_file())
    assert "s3cret" not in written and "postgresql+psycopg://aerec:***@127.0.0.1" in describe_source(stage)


def test_neither_the_command_nor_a_run_shows_a_password(tmp_path, monkeypatch, capsys):
    from aerec_nb.pipeline import main

    url = "postgresql://ann:s3cret@localhost/shop"
    monkeypatch.setenv("AEREC_ENV", "test")
    monkeypatch.setenv("AEREC_RUNS_DIR", str(tmp_path / "runs"))
    with monkeypatch.context() as m:
        for knob in ("DATA__SOURCE", "DATA__ITEMS_SOURCE", "EVENTS__EVENTS_URL", "PACKAGING__REGISTRY_URI"):
            m.setenv(f"AEREC_{knob}", url)
        for words in (["config"], ["config", "--json"], ["config", "--diff", "dev", "live"]):
            assert main(words) == 0
        assert "s3cret" not in repr(load_settings("test"))
    shown = capsys.readouterr()
    assert "s3cret" not in shown.out + shown.err and shown.out.count(":***@localhost") >= 8
    for words in (["run", "--data", url], ["run", "-p", "items_source", url], ["run", "-p", "events_url", url]):
        assert main(words) == 2
        refused = capsys.readouterr()
        assert (
            "s3cret" not in refused.out + refused.err
            and refused.err.count("\n") == 1
            and "secrets come only from variables" in refused.err
        ), refused.err
    assert not (tmp_path / "runs").exists()


@on_postgres
def test_the_event_log_on_postgres_is_a_source(fresh_database, tmp_path):
    log = EventLog(fresh_database)
    log.append(
        [
            new_event(
                "feedback", event_id=f"{u}-{i}", time=1e9 + i, user_id=u, item_id=i, value=1, payload={"type": "click"}
            )
            for u in range(20)
            for i in range(5)
        ]
    )
    log.append(
        [
            new_event("feedback", event_id="s", user_id=1, item_id=77, value=1, simulated=True),
            new_event("feedback", event_id="x", user_id=1, item_id=78, payload={"type": "share"}),
        ]
    )
    log.close()
    ratings = load_ratings(f"events:{fresh_database}")
    assert (
        list(ratings) == ["user_id", "item_id", "timestamp"]
        and len(ratings) == 100
        and ratings.user_id.dtype == "int64"
    )


def test_the_event_log_of_the_settings_through_the_stage(tmp_path):
    log = EventLog(tmp_path / "events.db")
    log.append(
        [
            new_event(
                "feedback",
                event_id=f"{u}-{i}",
                time=1e9 + i,
                user_id=f"u{u}",
                item_id=i,
                value=1 + (u + i) % 5,
                payload={"type": "rating"},
            )
            for u in range(9)
            for i in range(9)
        ]
    )
    log.append([new_event("feedback", event_id="n", user_id=None, item_id=1, value=1)])
    log.close()
    begun = open_run(
        env="test", runs_dir=str(tmp_path / "runs"), source="events", events_url=f"sqlite:///{tmp_path}/events.db"
    )
    stage = begun.execute("data_import")
    source = json.loads((stage / "source.json").read_text())
    assert (source["feedback"], source["has_times"], len(source["notes"])) == ("explicit", True, 1)
    assert describe_source(stage).endswith(source["notes"][0]), "the line tells what was left out"
    assert data_import.resolve_source(begun.settings).ratings.found[1] == {"without a user": 1}
    ratings = pd.read_parquet(stage / "ratings.parquet")
    assert len(ratings) == 81 and ratings.user_id[0] == "u0" and ratings.rating.max() == 5


def test_parquet_folder_pattern_and_hive_through_load_ratings(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    whole = pd.DataFrame(
        {
            "user_id": rng.integers(50, size=3000),
            "item_id": [uuid.UUID(int=int(i)).hex for i in rng.integers(90, size=3000)],
            "rating": rng.integers(1, 6, 3000).astype(float),
            "time": pd.to_datetime(rng.integers(10**9, size=3000), unit="s", utc=True),
        }
    ).drop_duplicates(["user_id", "item_id"], ignore_index=True)
    expected = load_ratings(whole)
    for n, part in enumerate(np.array_split(np.arange(len(whole)), 4)):
        for folder in ("parts", f"hive/year={2000 + n}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            whole.iloc[part].to_parquet(tmp_path / folder / f"part-{n}.parquet", index=False)
        whole.iloc[part].to_csv(tmp_path / "parts" / f"text-{n}.csv.gz", index=False)
    monkeypatch.chdir(tmp_path)
    for source in (
        "parts/part-*.parquet",
        "hive",
        "hive/year=*",
        "hive/**/*.parquet",
        str(tmp_path / "parts" / "*.parquet"),
        "parts/text-?.csv.gz",
    ):
        pd.testing.assert_frame_equal(load_ratings(source), expected), source
    assert data_import._locate("hive", load_settings(), [tmp_path]).read("ratings")[0].year.unique().tolist() == [
        "2000",
        "2001",
        "2002",
        "2003",
    ]


@pytest.mark.data
def test_the_published_zip_on_disk_gives_what_the_loose_files_give():
    folder = real_data("data/ml-latest-small")
    for load in (load_ratings, load_items):
        pd.testing.assert_frame_equal(load(folder / "ml-latest-small.zip"), load(folder))
