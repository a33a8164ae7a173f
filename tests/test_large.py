"""Large files, read in pieces, give what the small way gives: ratings, quarantine, problems, notes and errors; and two
million rows become the same matrix in less memory.
"""

import bz2
import gzip
import json
import subprocess
import sys
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import variables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from scipy.sparse import coo_matrix

from aerec_nb import data_import
from aerec_nb.core.artifacts import open_run
from aerec_nb.core.errors import AerecError
from aerec_nb.core.files import read_json
from aerec_nb.data_import import CONTRACT, ON_DUPLICATE, VERSION, Source, check_source, load_ratings, write_handover

# --- the two ways


def decoded(ratings):
    "Ratings with plain ids."
    coded = [c for c in ("user_id", "item_id") if isinstance(ratings[c].dtype, pd.CategoricalDtype)]
    return ratings.assign(**{c: ratings[c].astype(ratings[c].cat.categories.dtype) for c in coded})


def told(path, chunked_read_mb, **options):
    "What a source gives, or the error."
    source = Source(
        "mine",
        "",
        data_import.Parts(path.name, sorted(p for p in path.rglob("*.*") if p.is_file()), path)
        if path.is_dir()
        else path,
    )
    try:
        return check_source(source, chunked_read_mb=chunked_read_mb, **options)
    except AerecError as e:
        return e


def same_both_ways(path, **options):
    "Compare everything that the two ways give; the large way's answer."
    small, large = (told(path, mb, **options) for mb in (10_000, -1))
    if isinstance(small, Exception) or isinstance(large, Exception):
        assert (type(large), str(large)) == (type(small), str(small))
        assert (large.code, large.where) == (small.code, small.where)
        assert "\n" not in str(large)
        if hasattr(small, "problems"):
            assert_frame_equal(large.problems.astype(object), small.problems.astype(object), check_index_type=False)
        return large
    assert_frame_equal(decoded(large.ratings), small.ratings)
    for c in ("user_id", "item_id"):
        assert large.ratings[c].cat.categories.tolist() == small.ratings[c].drop_duplicates().tolist(), (
            "ids are numbered by first appearance, and none is left over"
        )
    assert list(large.bad) == list(small.bad)
    if len(small.bad) or len(large.bad):
        assert_frame_equal(large.bad, small.bad)
    for fact in ("used", "why", "n_later", "n_duplicates", "n_rows", "encoding", "unused"):
        assert getattr(large, fact) == getattr(small, fact), fact
    return large


# --- shapes of text

U = [str(uuid.UUID(int=i)) for i in range(4)]
NULL = "\x00"
# Each with what becomes of it: the number of ratings, or the code of the error; and the same where bad rows are set
# aside
TEXTS = {
    "integers": ("user,item,rating,timestamp\n5,7,4,100\n3,7,3.5,101\n5,9,1,99\n", 3, 3),
    "large integers": ("user,item\n123456789012345678,2\n9223372036854775807,3\n", 2, 2),
    "beyond int64": ("user,item\n9223372036854775808,2\n1,3\n", 2, 2),
    "negative integers": ("user,item\n-5,2\n1,3\n", 2, 2),
    "leading zeros": ("user,item,rating\n007,1,4\n7,1,4\n", 2, 2),
    "zeros come late": ("user,item,rating\n" + "7,1,4\n8,2,3\n" * 9000 + "07,1,4\n", 3, 3),
    "floats come late": ("user,item,rating\n" + "7,1,4\n8,2,3\n" * 9000 + "7,1.0,4\n1e3,2,3\n", 4, 4),
    "as many bytes as digits": ("user,item,rating\n" + "7,1,4\n8,2,3\n" * 9000 + "1e3,1,4\n07,2,3\n", 4, 4),
    "a text comes late": ("user,item,rating\n7,1,4\n8,1,4\nx,1,4\n", 3, 3),
    "plus, hex, exponent": ("user,item,rating\n+1,0x10,+4\n1e2,3,4e0\n1,3,4\n", 3, 3),
    "texts": ("user,item,rating\nann,x,4\nbob,x,3\nann,y,2\n", 3, 3),
    "UUIDs": ("user,item\n" + "".join(f"{U[i % 3]},{U[3]}\n" for i in range(3)), 3, 3),
    "UUIDs and a text": (f"user,item\n{U[0]},1\nann,1\n", 2, 2),
    "counts": ("user,item,plays\n7,1,4\n8,1,9\n", 2, 2),
    "negative counts": ("user,item,plays\n7,1,4\n8,1,-1\n", "negative_count", 1),
    "no times": ("user,item,rating,timestamp\n7,1,4,\n8,1,0,\n", 2, 2),
    "no ratings": ("user,item,rating,plays\n1,2,NA,3\n1,3,NA,4\n", 2, 2),
    "ratings come late": ("user,item,rating,plays\n1,2,NA,3\n1,3,5,4\n", "not_a_number", 1),
    "NaN": ("user,item,rating\n1,2,nan\n1,3,4\n", "not_a_number", 1),
    "times in ISO 8601": ("user,item,rating,timestamp\n7,1,4,2020-01-01\n8,1,0,2020-01-01T10:00:00+02:00\n", 2, 2),
    "milliseconds": ("user,item,rating,timestamp\n7,1,4,1500000000000\n8,1,0,1500000000\n", 2, 2),
    "times of all kinds": ("user,item,rating,timestamp\n7,1,4,2020-01-01\n8,1,0,1000\n8,2,1,1500000000000\n", 3, 3),
    "missing ids": ("user,item,rating\n7,1,4\n,1,4\n8,,1\n", "missing_value", 1),
    "bad values": ("user,item,rating,timestamp\n7,1,4,5\n8,1,good,4\n9,1,,soon\n,2,inf,-4\n7,4,3,4\n", "bad_rows", 2),
    "nothing but bad": ("user,item,rating\n1,2,x\n1,3,y\n", "not_a_number", "not_a_number"),
    "ids of bad rows": ("user,item,rating\n7,1,4\nx,1,bad\n8,1,3\n", "not_a_number", 2),
    "a bad row first": ("user,item,rating\n3,10,\n1,10,1\n3,10,1\n", "missing_value", 2),
    "rows too short": ("user,item,rating\n7,1,4\n7,2\n8,1,3\n", "too_few_fields", 2),
    "rows too long": ("user,item,rating\n7,1,4\n7,2,4,5\n8,1,3\n", "too_many_fields", 2),
    "an open quote": ('user,item,rating\n7,"1,4\n7,2,4\n8,1,3\n', "open_quote", "open_quote"),
    "a stray quote": ('user,item,rating\n7,1"x,4\n7,2,4\n8,1,3\n', 3, 3),
    "quotes": ('user,item,rating\n"7","1,5",4\n"7",2,4\n', 2, 2),
    "quoted line ends": ('user,item,rating\n"a\nb",2,4\nc,3,1\nd,4,bad\n', "not_a_number", 2),
    "blanks": ("user,item,rating\n 7,1, 4\n7 ,2 ,4 \n8,1,3\n", 3, 3),
    "equal but for blanks": ("user,item,rating\n x,2,4\nx,2,5\n", 1, 1),
    "blank lines": ("\n\nuser,item,rating\n1,2,3\n\n3,4,5\n\n", 2, 2),
    "blank lines at the end": ("user,item,rating\n1,2,3\n3,4,5\n\n\n", 2, 2),
    "Windows": ("user,item,rating,timestamp\r\n5,7,4,100\r\n3,7,3.5,101\r\n", 2, 2),
    "both line ends": ("user,item,rating\r\n1,2,3\n3,4,5\r\n", 2, 2),
    "no last line end": ("user,item,rating\n1,2,3\n3,4,5", 2, 2),
    "semicolons": ("user;item;rating\n1;2;4,5\n1;3;4\n", "not_a_number", 1),
    "ratings.dat": ("1::10::4::964982703\n2::10::5::964982704\n", 2, 2),
    "u.data": ("1\t10\t4\t964982703\n2\t10\t5\t964982704\n", 2, 2),
    "further columns": ('user,item,rating,comment\n1,2,3,hello\n1,3,x,"so, so"\n', "not_a_number", 1),
    "byte order mark": (b"\xef\xbb\xbfuser,item,rating\n1,2,3\n", 1, 1),
    "cp1252": ("user,item,rating\nannée,1,4\n7,2,4\n".encode("cp1252"), 2, 2),
    "UTF-16": ("user,item,rating\nannée,1,4\n7,2,4\n".encode("utf-16"), 2, 2),
    "a null byte": (f"user,item,rating\nann,1,4\n7{NULL},2,4\n", "not_text", "not_text"),
    "only a header": ("user,item,rating\n", "empty_data", "empty_data"),
    "empty": ("", "empty_data", "empty_data"),
    "no users": ("who,item,rating\n1,2,3\n", "missing_column", "missing_column"),
    "a column twice": ("user,user,item\n1,2,3\n", "duplicate_name", "duplicate_name"),
}


@pytest.mark.parametrize("on_invalid", ["raise", "quarantine"])
@pytest.mark.parametrize("name", TEXTS)
def test_texts(name, on_invalid, tmp_path):
    content, raised, kept = TEXTS[name]
    (path := tmp_path / "ratings.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = same_both_ways(path, on_invalid=on_invalid)
    expected = raised if on_invalid == "raise" else kept
    if isinstance(expected, int):
        assert len(found.ratings) == expected
    else:
        assert isinstance(found, AerecError) and found.code == expected, found


TWICE = [("7,1", 4, 5), ("8,1", 4, 4), ("7,1", 3, 9), ("8,1", 2, 4), ("7,1", 5, 6), ("9,1", 1, 1)]


@pytest.mark.parametrize("values", ["rating,timestamp", "plays,timestamp", "rating", "timestamp", ""])
@pytest.mark.parametrize("rule", ON_DUPLICATE)
def test_duplicates(rule, values, tmp_path):
    lines = [
        ",".join(
            [
                pair,
                *(["x"] if not values else []),
                *(
                    str(v)
                    for c, v in zip(("rating", "timestamp"), (value, at), strict=True)
                    if c in values.replace("plays", "rating")
                ),
            ]
        )
        for pair, value, at in TWICE
    ]
    (path := tmp_path / "ratings.csv").write_text("\n".join([f"user,item,{values or 'note'}", *lines]) + "\n")
    found = same_both_ways(path, on_duplicate=rule)
    if rule == "raise":
        assert (found.code, found.where) == ("duplicate_pair", "ratings.csv, row 3")
    else:
        assert len(found.ratings) == 3 and found.n_duplicates == 3
    if (rule, values) == ("last", "rating,timestamp"):
        assert found.ratings.rating.tolist() == [3, 2, 1] and found.ratings.user_id.tolist() == [7, 8, 9]


@pytest.mark.parametrize("as_of, kept", [(1, 0), (150, 0), (500, 1), (900, 3)])
@pytest.mark.parametrize("on_invalid", ["raise", "quarantine"])
def test_what_was_known_by_then(as_of, kept, on_invalid, tmp_path):
    (path := tmp_path / "ratings.csv").write_text(
        "user,item,rating,timestamp,ingested_at\n1,2,3,100,200\n1,3,3,100,900\n2,2,4,800,800\n"
        + "2,9,4,850,\n" * (on_invalid == "quarantine")
    )
    found = same_both_ways(path, as_of=as_of, on_invalid=on_invalid)
    if kept:
        assert len(found.ratings) == kept
    else:
        assert isinstance(found, AerecError)


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lambda b: pa.compress(b, "zstd", asbytes=True)], ids=["gzip", "bzip2", "zstd"]
)
def test_packed(pack, tmp_path):
    path = tmp_path / "ratings.csv.packed"
    path.write_bytes(pack(TEXTS["bad values"][0].encode()))
    assert len(same_both_ways(path, on_invalid="quarantine").ratings) == 2
    path.write_bytes(pack(TEXTS["integers"][0].encode() * 3000)[:-9])
    assert isinstance(same_both_ways(path), AerecError), "cut off"


@pytest.mark.parametrize("encoding, works", [("latin-1", True), ("utf-8", False)])
def test_encoding_as_said(encoding, works, tmp_path):
    (path := tmp_path / "ratings.csv").write_bytes(TEXTS["cp1252"][0])
    found = same_both_ways(path, encoding=encoding)
    if works:
        assert found.ratings.user_id.cat.categories[0] == "année"
    else:
        assert (found.code, found.where) == ("wrong_encoding", "ratings.csv, line 2") and "0xe9" in str(found)


# --- Parquet, parts, hand-over

PARQUETS = {
    "integers": {
        "user": [1, 2, 1],
        "item": np.array([5, 6, 7], np.int32),
        "rating": [1.0, 2.0, 3.0],
        "timestamp": [10, 20, 30],
    },
    "uint64": {"user": np.array([2**63 + 1, 5, 5], np.uint64), "item": [1, 2, 3]},
    "texts": {"user": ["a", "b", "a"], "item": ["x", "y", "z"], "rating": [1, 2, 3]},
    "numbers as texts": {"user": ["1", "2", "1"], "item": ["01", "2", "3"], "rating": ["1", "2", " 3"]},
    "categories": {"user": pd.Categorical(["a", "b", "a"]), "item": pd.Categorical([5, 6, 7]), "rating": [1, 2, 3]},
    "missing": {"user": pd.array([1, None, 2], "Int64"), "item": [1, 2, 3], "rating": [1.0, np.nan, 2]},
    "float ids": {"user": [1.0, 2.0, np.nan], "item": [1, 2, 3]},
    "fractions": {"user": [1.5, 2.0, 5], "item": [1, 2, 3]},
    "UUIDs": {"user": pa.array([uuid.UUID(int=i).bytes for i in (1, 2, 1)], pa.uuid()), "item": [1, 2, 3]},
    "dates": {
        "user": [1, 2, 3],
        "item": [1, 2, 3],
        "timestamp": pd.to_datetime(["2020-01-01", "2021-01-01", "1950-01-01"]),
    },
    "time zone": {
        "user": [1, 2, 3],
        "item": [1, 2, 3],
        "timestamp": pd.to_datetime(["2020-01-01", "2021-01-01", None]).tz_localize("Europe/Berlin"),
    },
    "booleans": {"user": [True, False, True], "item": [1, 2, 3]},
    "lists": {"user": [[1], [2], [3]], "item": [1, 2, 3]},
    "no ratings": {"user": [1, 2], "item": [1, 2], "rating": [None, None]},
    "no rows": {"user": pd.array([], "int64"), "item": pd.array([], "int64")},
}


@pytest.mark.parametrize("on_invalid", ["raise", "quarantine"])
@pytest.mark.parametrize("name", PARQUETS)
def test_parquet(name, on_invalid, tmp_path):
    pq.write_table(pa.table(PARQUETS[name]), path := tmp_path / "ratings.parquet")
    found = same_both_ways(path, on_invalid=on_invalid)
    if name in ("integers", "texts", "UUIDs"):
        assert len(found.ratings) == 3
    if name == "UUIDs":
        assert found.ratings.user_id[0] == uuid.UUID(int=1)


def test_parquet_in_parts(tmp_path):
    for i, of in ((1, np.int32), (2, np.int64)):
        (tmp_path / "r" / f"day={i}").mkdir(parents=True)
        pd.DataFrame({"user": np.array([i, 2], of), "item": ["a", "b"]}).to_parquet(
            tmp_path / "r" / f"day={i}" / "x.parquet"
        )
    found = same_both_ways(tmp_path / "r", columns={"day": "timestamp"})
    assert found.ratings.timestamp.tolist() == [1, 2, 2] and found.n_duplicates == 1
    pd.DataFrame({"user": ["u"], "item": ["a"]}).to_parquet(tmp_path / "r" / "day=2" / "y.parquet")
    assert same_both_ways(tmp_path / "r").code == "wrong_type"


def test_damaged_parquet(tmp_path):
    rows = pd.DataFrame({"user": np.arange(9000), "item": np.arange(9000)})
    rows.to_parquet(path := tmp_path / "ratings.parquet", compression=None)
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :]):
        path.write_bytes(damaged)
        error = same_both_ways(path)
        assert (error.code, error.where) == ("damaged_file", "ratings.parquet")


@pytest.mark.parametrize("setting, value", [("on_invalid", "skip"), ("on_duplicate", "newest")])
def test_a_rule_that_is_none(setting, value, tmp_path):
    (path := tmp_path / "ratings.csv").write_text(TEXTS["integers"][0])
    error = same_both_ways(path, **{setting: value})
    assert (error.code, error.where) == ("unknown_name", f"data.{setting}") and repr(value) in str(error)


@pytest.mark.parametrize("on_invalid", ["raise", "quarantine"])
def test_text_in_parts(on_invalid, tmp_path):
    (folder := tmp_path / "r").mkdir()
    for i in (1, 2):
        (folder / f"part-{i}.csv").write_text(f"user,item,rating\n{i},7,4\n{i},9,bad\n")
    found = same_both_ways(folder, on_invalid=on_invalid)
    if on_invalid == "quarantine":
        assert found.bad.row.tolist() == [2, 4]
    (folder / "part-2.csv").write_text("user,item\n1,7\n")
    error = same_both_ways(folder, on_invalid=on_invalid)
    assert (error.code, error.where) == ("shape_mismatch", "part-2.csv")


@pytest.mark.parametrize("options", [{}, {"as_of": 50}, {"on_invalid": "quarantine"}], ids=str)
@pytest.mark.parametrize("events", ["xyz", "xyx"])
def test_handover(events, options, tmp_path):
    rows = pd.DataFrame(
        {
            "user_id": [1, 1, 2],
            "item_id": ["a", "b", "a"],
            "rating": [4.0, 5.0, 3.0],
            "timestamp": [10, 20, 30],
            "ingested_at": [11, 90, 31],
            "event_id": list("xyz"),
        }
    )
    path = tmp_path / "ratings.parquet"
    write_handover(rows, path)
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(
            table.schema.get_field_index("event_id"), "event_id", pa.array(list(events))
        ).replace_schema_metadata({CONTRACT: VERSION}),
        path,
    )
    found = same_both_ways(path, **options)
    if events == "xyz":
        assert len(found.ratings) == (2 if "as_of" in options else 3)
    elif "on_invalid" not in options:
        assert found.code == "duplicate_event"


# --- any table

FIELDS = {
    "user": ["1", "2", "3", "12", "007", "ann", " 2", "", "1.0", "-4", '"a,b"', "é"],
    "item": ["10", "11", "12", "x", "", "0x1"],
    "rating": ["1", "4.5", "3.0", "", "bad", " 2", "1e0", "NA", "inf"],
    "timestamp": ["5", "0", "1500000000000", "2020-01-01", "", "soon", "-1"],
}


@st.composite
def tables(draw):
    "Lines of a table; each column takes its values from a few, often from good ones only."
    columns = ["user", "item", *draw(st.sets(st.sampled_from(["rating", "timestamp"])))]
    some = {c: FIELDS[c][: draw(st.sampled_from([2, 3, len(FIELDS[c])]))] for c in columns}
    rows = draw(
        st.lists(st.tuples(*(st.sampled_from(some[c]) for c in columns)).map(",".join), min_size=1, max_size=12)
    )
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return end.join([",".join(columns), *rows]) + end * draw(st.booleans())


@given(tables(), st.sampled_from(ON_DUPLICATE), st.sampled_from(["raise", "quarantine", "quarantine"]))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table(tmp_path, table, on_duplicate, on_invalid):
    (path := tmp_path / "ratings.csv").write_bytes(table.encode())
    same_both_ways(path, on_duplicate=on_duplicate, on_invalid=on_invalid)


# --- through the door


def test_the_setting_decides_and_the_stage_works(tmp_path, monkeypatch):
    for k, v in variables(tmp_path).items():
        monkeypatch.setenv(k, v)
    (path := tmp_path / "ratings.csv").write_text(
        "user,item,rating,timestamp\n"
        + "".join(f"u{i % 7},{i},{i % 5 + 1},{1_000_000_000 + i}\n" for i in range(60))
        + "u1,7,bad,5\n"
    )
    stages = {}
    for mb in ("500", "0.0001"):
        monkeypatch.setenv("AEREC_DATA__CHUNKED_READ_MB", mb)
        ratings = load_ratings(path, on_invalid="quarantine")
        assert (ratings.user_id.dtype == "category", len(ratings)) == (mb != "500", 60)
        assert load_ratings(path, max_users=2, on_invalid="quarantine").user_id.unique().tolist() == ["u0", "u1"]
        run = open_run(
            f"mb{len(stages)}", env="test", source=str(path), on_invalid="quarantine", chunked_read_mb=float(mb)
        )
        stages[mb] = run.execute("data_import", build=data_import.build_data_import)
    small, large = stages.values()
    kept = {mb: pd.read_parquet(stage / "ratings.parquet") for mb, stage in stages.items()}
    assert [k.user_id.dtype == "category" for k in kept.values()] == [False, True], "large ids stay codes on disk"
    assert_frame_equal(decoded(kept["0.0001"]), kept["500"])
    assert_frame_equal(*(pd.read_parquet(s / "quarantine.parquet") for s in (small, large)))
    for name in ("source.json", "description.json"):
        assert read_json(large / name) == read_json(small / name), name


# --- two million rows

MEASURED = r"""
import json, sys
import numpy as np
from aerec_nb.data_import import load_ratings
from aerec_nb.model_preprocessing import Interactions
def mib(what): # of this process alone, not of its parent
    return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith(what)))/2**10
before = mib('VmRSS')
ratings = load_ratings(sys.argv[1])
data = Interactions.from_frame(ratings)
peak = mib('VmHWM')-before
coded = str(ratings.user_id.dtype) == 'category'
print(json.dumps(dict(mib=peak, coded=coded, users=data.users.tolist(), items=data.items.tolist())))
np.savez(sys.argv[2], data=data.matrix.data, indices=data.matrix.indices, indptr=data.matrix.indptr, times=data.times)
"""


def two_million(kind):
    """Ratings whose popularity falls as a power law: whole numbers, user by user; or texts in any order, some pairs
    twice.
    """
    rng = np.random.default_rng(0)
    n_users = 15_000
    n_items = 9_000
    n = 2_000_000
    lengths = np.minimum(rng.lognormal(0, 1, n_users) * 1.2 * n / n_users / np.exp(0.5) + 20, 3000).astype(int)
    key = np.unique(
        np.repeat(np.arange(n_users), lengths) * n_items + (n_items * rng.random(lengths.sum()) ** 2.5).astype(int)
    )
    key = np.sort(rng.choice(key, n, replace=len(key) < n))
    key = np.unique(key) if kind == "integers" else rng.permutation(np.append(key, key[:1000]))
    user, item = np.divmod(key, n_items)
    if kind == "texts":
        user = np.char.mod("u%05d", np.arange(n_users))[user]
        item = np.char.mod("item %d", np.arange(n_items))[item]
    else:
        user = 3 * user + 1
        item = 7 * item + 2
    return pd.DataFrame(
        {
            "userId": user,
            "movieId": item,
            "rating": rng.integers(1, 11, len(key)) / 2,
            "timestamp": 10**9 + rng.permutation(len(key)),
        }
    )


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["integers", "texts"])
def test_two_million_rows_become_the_same_matrix_in_less_memory(kind, tmp_path):
    table = two_million(kind)
    pa.csv.write_csv(
        pa.Table.from_pandas(table, preserve_index=False),
        path := tmp_path / "ratings.csv",
        pa.csv.WriteOptions(quoting_style="none"),
    )
    found = {}
    made = {}
    for way, mb in (("small", 500), ("large", 1)):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, path, tmp_path / f"{way}.npz"],
            env=variables(tmp_path) | {"AEREC_DATA__CHUNKED_READ_MB": str(mb)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout)
        made[way] = np.load(tmp_path / f"{way}.npz")
    assert not found["small"]["coded"] and found["large"]["coded"]

    last = table.sort_values("timestamp").drop_duplicates(["userId", "movieId"], keep="last").sort_index()
    u, users = pd.factorize(last.userId)
    i, items = pd.factorize(last.movieId)
    expected = coo_matrix((last.timestamp, (u, i))).tocsr()
    expected.sort_indices()
    for way in ("small", "large"):
        assert found[way]["users"] == users.tolist() and found[way]["items"] == items.tolist()
        for part, value in {
            "indptr": expected.indptr,
            "indices": expected.indices,
            "times": expected.data,
            "data": np.ones(len(last)),
        }.items():
            assert np.array_equal(made[way][part], value), part
    print(kind, len(table), len(last), {way: round(f["mib"]) for way, f in found.items()})
    assert found["large"]["mib"] < 0.8 * found["small"]["mib"]


def test_nothing_but_ours_is_said(tmp_path):
    "In `python -c` DuckDB takes itself for interactive, and its bar would go to standard output."
    asked = "import sys; {}; print(con.execute('select current_setting(?)', ['enable_progress_bar']).fetchone()[0])"

    def bar(opened):
        return subprocess.run(
            [sys.executable, "-c", asked.format(opened), tmp_path],
            env=variables(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    assert bar("from aerec_nb.data_import import _duckdb; con = _duckdb(sys.argv[1])") == "False"
    assert bar("import duckdb; con = duckdb.connect()") == "True", "otherwise this shows nothing"


def test_more_bad_rows_than_are_checked_are_refused_even_where_bad_rows_are_set_aside(tmp_path, monkeypatch):
    whole = data_import._Large.pieces

    def small_pieces(self, *args):
        for piece in whole(self, *args):
            for start in range(0, len(piece), 3):
                yield piece.slice(start, 3)

    monkeypatch.setattr(data_import, "_MOST_BAD", 2)
    monkeypatch.setattr(data_import._Large, "pieces", small_pieces)
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,rating\n" + "1,2,4\n" * 6 + "1,2,bad\n" * 6)
    error = told(path, -1, on_invalid="quarantine")
    assert isinstance(error, AerecError) and error.code == "not_a_number" and len(error.problems) == 3
