"""Malformed tables: each is refused in one line that says where and what, changes nothing on disk, and its good rows
can be kept.
"""

import bz2
import gzip
import io
import lzma
import uuid
import zipfile
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet as pq
import pytest

import aerec_nb.data_import as data_import
from aerec_nb.core.artifacts import open_run
from aerec_nb.core.errors import AerecError
from aerec_nb.core.files import read_json
from aerec_nb.core.settings import load_settings
from aerec_nb.data_import import load_items, load_ratings, validate
from aerec_nb.testing import test_error


@dataclass
class Case:
    "A malformed input, code and place of the error, and what the quarantine keeps."

    name: str
    content: object  # bytes or text of a file, a DataFrame, or a dict: name in a folder -> bytes
    code: str
    where: str  # the folder of the test left out
    file: str = "mine.csv"  # the file's name
    settings: dict = field(default_factory=dict)
    keeps: list = None  # rows (from 1) that `quarantine` keeps; None: it refuses as well
    codes: list = None  # of all problems, where they differ


def zipped(**members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name.replace("__", "/"), content)
    return packed.getvalue()


def parquet(frame, metadata=None):
    packed = io.BytesIO()
    table = frame if isinstance(frame, pyarrow.Table) else pyarrow.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(
        table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata}) if metadata else table, packed
    )
    return packed.getvalue()


def encrypted():
    "A zip whose member claims to need a password."
    packed = bytearray(zipped(**{"ratings.csv": "user,item\n1,2\n"}))
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        packed[packed.index(mark) + flags] |= 1
    return bytes(packed)


def handed_over(**changes):
    "A Parquet file that declares the contract, by a writer that does not keep to it."
    at = pd.to_datetime([10, 20, 30], unit="s", utc=True)
    good = {
        "user_id": [1, 1, 2],
        "item_id": [7, 8, 7],
        "rating": [4.0, 5.0, 3.0],
        "timestamp": at,
        "ingested_at": at,
        "event_id": ["x", "y", "z"],
    }
    frame = pd.DataFrame({k: v for k, v in {**good, **changes}.items() if v is not None})
    return parquet(frame, {data_import.CONTRACT: data_import.VERSION})


TABLE = "user,item,rating,timestamp\n1,10,4,100\n1,11,5,200\n2,10,3,300\n"
LONG = "".join(f"{i},{i % 7},4\n" for i in range(20_000))
GOOD = {"user": [1, 1, 2], "item": [10, 11, 10], "rating": [4.0, 5.0, 3.0]}
UTF16 = "user,item\nann,é\n".encode("utf-16-le")

CASES = [
    # the file as a whole
    Case("an empty file", "", "empty_data", "mine.csv"),
    Case("only blank lines", "\n \n\n", "empty_data", "mine.csv"),
    Case("only a header", "user,item,rating\n", "empty_data", "mine.csv"),
    Case(
        "no columns of ids",
        "who,what,rating\n1,2,3\n",
        "missing_column",
        "mine.csv",
    ),
    Case("one column", "user\n1\n2\n", "missing_column", "mine.csv"),
    Case(
        "a web page",
        "<!DOCTYPE html>\n<html><body>404</body></html>\n",
        "missing_column",
        "mine.csv",
    ),
    Case("JSON", '{"user": 1, "item": 2}\n{"user": 1, "item": 3}\n', "missing_column", "mine.csv"),
    Case("a header that repeats a name", "user,item,user\n1,2,3\n", "duplicate_name", "mine.csv"),
    Case("a picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "not_text", "mine.csv"),
    Case(
        "random bytes",
        bytes(np.random.default_rng(0).integers(1, 256, 5000, dtype=np.uint8)),
        "wrong_encoding",
        "mine.csv, line 2",
    ),
    Case("UTF-16 without a mark", UTF16, "not_text", "mine.csv"),
    Case(
        "neither UTF-8 nor cp1252",
        b"user,item\n1,\x81\n",
        "wrong_encoding",
        "mine.csv, line 2",
    ),
    Case(
        "not in the encoding that was set",
        "user,item\n1,é\n".encode("latin-1"),
        "wrong_encoding",
        "mine.csv, line 2",
        settings={"encoding": "utf-8"},
    ),
    Case("not ASCII", "user,item\n1,é\n", "wrong_encoding", "mine.csv, line 2", settings={"encoding": "ascii"}),
    Case(
        "a quote that never closes",
        'user,item,rating\n1,2,3\n1,"3,4\n2,2,5\n',
        "open_quote",
        "mine.csv, line 3",
    ),
    Case(
        "a quote that never closes in the last column",
        'user,item,title\n1,2,ok\n1,3,"cut off',
        "open_quote",
        "mine.csv, line 3",
    ),
    Case(
        "a field beyond all bounds",
        'user,item\n1,2\n1,2,"' + "x" * 200_000 + '"\n',
        "unreadable_line",
        "mine.csv, line 3",
    ),
    # packed files
    Case(
        "a truncated gz",
        gzip.compress(LONG.encode())[:-200],
        "damaged_file",
        "mine.csv.gz",
        "mine.csv.gz",
    ),
    Case(
        "a gz with a flipped bit",
        (lambda b: b[:-6] + bytes([b[-6] ^ 1]) + b[-5:])(gzip.compress(LONG.encode())),
        "damaged_file",
        "mine.csv.gz",
        "mine.csv.gz",
    ),
    Case("garbage that begins as gz", b"\x1f\x8b" + b"garbage" * 9, "damaged_file", "mine.csv.gz", "mine.csv.gz"),
    Case(
        "a truncated zst",
        pyarrow.compress(LONG.encode(), "zstd", asbytes=True)[:-50],
        "damaged_file",
        "mine.csv.zst",
        "mine.csv.zst",
    ),
    Case(
        "garbage that begins as zst",
        b"\x28\xb5\x2f\xfd" + b"garbage" * 9,
        "damaged_file",
        "mine.csv.zst",
        "mine.csv.zst",
    ),
    Case("a truncated bz2", bz2.compress(LONG.encode())[:-50], "damaged_file", "mine.csv.bz2", "mine.csv.bz2"),
    Case("a truncated xz", lzma.compress(LONG.encode())[:-50], "damaged_file", "mine.csv.xz", "mine.csv.xz"),
    Case("a spreadsheet", zipped(**{"xl__workbook.xml": "<xml/>"}), "not_supported", "mine.csv"),
    Case("a zip without a table", zipped(**{"photo.png": b"x"}), "not_found", "mine.zip", "mine.zip"),
    Case(
        "a zip with a name that leads out",
        zipped(**{"..__..__ratings.csv": TABLE}),
        "not_allowed",
        "mine.zip",
        "mine.zip",
    ),
    Case(
        "a zip with an absolute name",
        zipped(**{"__tmp__ratings.csv": TABLE}),
        "not_allowed",
        "mine.zip",
        "mine.zip",
    ),
    Case(
        "a truncated zip",
        zipped(**{"ratings.csv": TABLE})[:-30],
        "damaged_file",
        "mine.zip",
        "mine.zip",
    ),
    Case("a zip with a password", encrypted(), "not_supported", "mine.zip", "mine.zip"),
    Case(
        "a zip with two tables of no known name",
        zipped(**{"a.csv": TABLE, "b.csv": TABLE}),
        "not_found",
        "mine.zip",
        "mine.zip",
    ),
    Case("a folder without a table", {"mine/readme.md": "hello"}, "not_found", "mine", "mine"),
    Case(
        "a folder with two tables of no known name",
        {"mine/a.csv": TABLE, "mine/b.csv": TABLE},
        "not_found",
        "mine",
        "mine",
    ),
    # rows
    Case(
        "a word for a rating",
        "user,item,rating\n1,2,3\n1,3,good\n2,2,4\n",
        "not_a_number",
        "mine.csv, row 2, column rating",
        keeps=[1, 3],
    ),
    Case(
        "a missing rating",
        "user,item,rating\n1,2,\n1,3,4\n",
        "missing_value",
        "mine.csv, row 1, column rating",
        keeps=[2],
    ),
    Case(
        "a rating that is NaN",
        "user,item,rating\n1,2,3\n1,3,nan\n",
        "not_a_number",
        "mine.csv, row 2, column rating",
        keeps=[1],
    ),
    Case(
        "an infinite rating",
        "user,item,rating\n1,2,inf\n1,3,-inf\n1,4,2\n",
        "not_finite",
        "mine.csv, row 1, column rating",
        keeps=[3],
    ),
    Case(
        "a rating beyond all numbers",
        "user,item,rating\n1,2,1e400\n1,3,3\n",
        "not_finite",
        "mine.csv, row 1, column rating",
        keeps=[2],
    ),
    Case(
        "a rating that float32 cannot hold",
        "user,item,rating\n1,2,1e39\n1,3,3\n",
        "not_finite",
        "mine.csv, row 1, column rating",
        keeps=[2],
    ),
    Case(
        "a decimal comma",
        "user;item;rating\n1;2;3,5\n1;3;4\n",
        "not_a_number",
        "mine.csv, row 1, column rating",
        keeps=[2],
    ),
    Case(
        "a second header in the middle",
        "user,item,rating\n1,2,3\nuser,item,rating\n1,3,4\n",
        "not_a_number",
        "mine.csv, row 2, column rating",
        keeps=[1, 3],
    ),
    Case(
        "a missing user", "user,item,rating\n1,2,3\n,3,4\n", "missing_value", "mine.csv, row 2, column user", keeps=[1]
    ),
    Case(
        "a missing item",
        "user\titem\n1\t\n1\tx\n",
        "missing_value",
        "mine.tsv, row 1, column item",
        "mine.tsv",
        keeps=[2],
    ),
    Case("an id of blanks", "user,item\n   ,2\nann,2\n", "missing_value", "mine.csv, row 1, column user", keeps=[2]),
    Case(
        "an id with a NUL",
        "user,item\n" + "ann,x\n" * 20_000 + "bob\0,y\n",
        "not_an_id",
        "mine.csv, row 20001, column user",
        keeps=list(range(1, 20_001)),
    ),
    Case(
        "a negative count",
        "user,item,plays\n1,2,3\n1,4,-1\n",
        "negative_count",
        "mine.csv, row 2, column plays",
        keeps=[1],
    ),
    Case(
        "a word for a count",
        "user,item,plays\n1,2,many\n1,4,1\n",
        "not_a_number",
        "mine.csv, row 1, column plays",
        keeps=[2],
    ),
    Case(
        "a missing time",
        "user,item,timestamp\n1,2,100\n1,3,\n",
        "missing_value",
        "mine.csv, row 2, column timestamp",
        keeps=[1],
    ),
    Case(
        "a word for a time",
        "user,item,timestamp\n1,2,soon\n1,3,100\n",
        "not_a_time",
        "mine.csv, row 1, column timestamp",
        keeps=[2],
    ),
    Case(
        "a month that is none",
        "user,item,date\n1,2,2026-13-45\n1,3,2026-01-31\n",
        "not_a_time",
        "mine.csv, row 1, column date",
        keeps=[2],
    ),
    Case(
        "a day that is none",
        "user,item,date\n1,2,2026-02-30\n1,3,2026-02-28\n",
        "not_a_time",
        "mine.csv, row 1, column date",
        keeps=[2],
    ),
    Case(
        "a date that is not ISO",
        "user,item,date\n1,2,31.01.2026\n1,3,2026-01-31\n",
        "not_a_time",
        "mine.csv, row 1, column date",
        keeps=[2],
    ),
    Case(
        "a time before 1970",
        "user,item,timestamp\n1,2,-5\n1,3,100\n",
        "time_out_of_range",
        "mine.csv, row 1, column timestamp",
        keeps=[2],
    ),
    Case(
        "a time in the far future",
        "user,item,date\n1,2,9999-12-31\n1,3,2026-01-31\n",
        "time_out_of_range",
        "mine.csv, row 1, column date",
        keeps=[2],
    ),
    Case(
        "an infinite time",
        "user,item,timestamp\n1,2,inf\n1,3,100\n",
        "not_a_time",
        "mine.csv, row 1, column timestamp",
        keeps=[2],
    ),
    Case(
        "a line too long",
        "user,item,rating\n1,2,3\n1,2,3,4,5\n2,2,4\n",
        "too_many_fields",
        "mine.csv, row 2",
        keeps=[1, 3],
    ),
    Case(
        "a line too short",
        "user,item,rating\n\n1,2,3\n1,2\n2,2,4\n",
        "too_few_fields",
        "mine.csv, row 2",
        keeps=[1, 3],
    ),
    Case(
        "a line too short between `::`",
        "1::2::3::100\n1::3\n2::2::4::200\n",
        "too_few_fields",
        "mine.dat, row 2",
        "mine.dat",
        keeps=[1, 3],
    ),
    Case(
        "more fields than the header in all lines",
        "user,item,rating\n0,1,2,3\n1,1,3,4\n",
        "too_many_fields",
        "mine.csv, row 1",
    ),
    Case(
        "a comma without quotes",
        "user,item,title\n1,2,Heat\n1,3,Good, the Bad\n",
        "too_many_fields",
        "mine.csv, row 2",
        keeps=[1],
    ),
    Case(
        "several problems of several kinds",
        "user,item,rating,timestamp\n1,2,good,100\n,3,4,soon\n1,4,5\n2,2,3,200\n3,3,bad,100\n",
        "bad_rows",
        "mine.csv, row 1, column rating",
        keeps=[4],
        codes=["not_a_number", "missing_value", "not_a_time", "too_few_fields", "not_a_number"],
    ),
    Case("all rows bad", "user,item,rating\n1,2,x\n1,3,y\n", "not_a_number", "mine.csv, row 1, column rating"),
    # Parquet
    Case(
        "a truncated Parquet",
        parquet(pd.DataFrame(GOOD))[:-20],
        "damaged_file",
        "mine.parquet",
        "mine.parquet",
    ),
    Case("text that is called Parquet", TABLE, "damaged_file", "mine.parquet", "mine.parquet"),
    Case(
        "a Parquet without ids",
        parquet(pd.DataFrame({"a": [1]})),
        "missing_column",
        "mine.parquet",
        "mine.parquet",
    ),
    Case(
        "a Parquet with nested ids",
        parquet(pd.DataFrame({"user": [[1], [2]], "item": [1, 2]})),
        "wrong_type",
        "mine.parquet, column user",
        "mine.parquet",
    ),
    Case(
        "a Parquet with nested ratings",
        parquet(pd.DataFrame({"user": [1, 2], "item": [1, 2], "rating": [{"v": 3}, {"v": 4}]})),
        "not_a_number",
        "mine.parquet, row 1, column rating",
        "mine.parquet",
    ),
    Case(
        "a Parquet with gaps in large ids",
        parquet(pd.DataFrame({"user": pd.array([2**60 + 1, None, 3], "Int64"), "item": [1, 2, 3]})),
        "missing_value",
        "mine.parquet, row 2, column user",
        "mine.parquet",
        keeps=[1, 3],
    ),
    Case(
        "a Parquet with gaps in times",
        parquet(pd.DataFrame({"user": [1, 2], "item": [1, 2], "date": pd.to_datetime(["2026-01-31", None])})),
        "missing_value",
        "mine.parquet, row 2, column date",
        "mine.parquet",
        keeps=[1],
    ),
    # the contract of a hand-over
    Case(
        "a hand-over with wrong types",
        handed_over(rating=["4", "5", "3"], item_id=None),
        "broken_contract",
        "mine.parquet",
        "mine.parquet",
        codes=["missing_column", "wrong_type"],
    ),
    Case(
        "a hand-over of another version",
        parquet(pd.DataFrame(GOOD), {data_import.CONTRACT: b"7"}),
        "unknown_version",
        "mine.parquet",
        "mine.parquet",
    ),
    Case(
        "a hand-over with a gap",
        handed_over(ingested_at=pd.to_datetime([10, None, 30], unit="s", utc=True)),
        "missing_value",
        "mine.parquet, row 2, column ingested_at",
        "mine.parquet",
        keeps=[1, 3],
    ),
    Case(
        "a hand-over that delivers an event twice",
        handed_over(event_id=["x", "y", "x"]),
        "duplicate_event",
        "mine.parquet, row 3, column event_id",
        "mine.parquet",
        keeps=[1, 2],
    ),
    Case(
        "a part of a hand-over that breaks it",
        {"mine/part-0.parquet": handed_over(), "mine/part-1.parquet": handed_over(user_id=[1.0, 2.0, 3.0])},
        "broken_contract",
        "part-1.parquet",
        "mine",
    ),
    # DataFrames
    Case("a DataFrame without rows", pd.DataFrame({"user": [], "item": []}), "empty_data", "the DataFrame"),
    Case(
        "a DataFrame with two columns of one name",
        pd.DataFrame([[1, 2, 3]], columns=["user", "item", "item"]),
        "duplicate_name",
        "the DataFrame",
    ),
    Case(
        "ids of several kinds",
        pd.DataFrame({"user": [1, "a"], "item": [1, 2]}),
        "wrong_type",
        "the DataFrame, column user",
    ),
    Case(
        "ids that are true or false",
        pd.DataFrame({"user": [True, False], "item": [1, 2]}),
        "wrong_type",
        "the DataFrame, column user",
    ),
    Case(
        "ids that are times",
        pd.DataFrame({"user": [1, 2], "item": pd.to_datetime(["2026-01-31", "2026-02-01"])}),
        "wrong_type",
        "the DataFrame, column item",
    ),
    Case(
        "ids that are dicts",
        pd.DataFrame({"user": [1, 2], "item": [{}, {}]}),
        "wrong_type",
        "the DataFrame, column item",
    ),
    Case(
        "an id with a fraction",
        pd.DataFrame({"user": [1.0, 2.5, 3.0], "item": [1, 2, 3]}),
        "not_an_id",
        "the DataFrame, row 2, column user",
        keeps=[1, 3],
    ),
    Case(
        "an infinite id",
        pd.DataFrame({"user": [1.0, np.inf], "item": [1, 2]}),
        "not_an_id",
        "the DataFrame, row 2, column user",
        keeps=[1],
    ),
    Case(
        "a missing id among texts",
        pd.DataFrame({"user": ["a", None, "b"], "item": [1, 2, 3]}),
        "missing_value",
        "the DataFrame, row 2, column user",
        keeps=[1, 3],
    ),
    Case(
        "a missing id among UUIDs",
        pd.DataFrame({"user": [uuid.UUID(int=1), None], "item": [1, 2]}),
        "missing_value",
        "the DataFrame, row 2, column user",
        keeps=[1],
    ),
    Case(
        "a missing category",
        pd.DataFrame({"user": pd.Series(["a", None], dtype="category"), "item": [1, 2]}),
        "missing_value",
        "the DataFrame, row 2, column user",
        keeps=[1],
    ),
    Case(
        "a rating that is an object",
        pd.DataFrame({"user": [1, 2], "item": [1, 2], "rating": [4, "x"]}),
        "not_a_number",
        "the DataFrame, row 2, column rating",
        keeps=[1],
    ),
    # settings that do not fit
    Case(
        "a mapping of a column that is not there",
        TABLE,
        "missing_column",
        "data.columns",
        settings={"columns": {"who": "user_id"}},
    ),
    Case(
        "a mapping to no standard name",
        TABLE,
        "unknown_name",
        "data.columns",
        settings={"columns": {"user": "userid"}},
    ),
    Case(
        "a mapping of two columns to one",
        TABLE,
        "conflict",
        "data.columns",
        settings={"columns": {"user": "user_id", "item": "user_id"}},
    ),
    Case(
        "duplicates that are refused",
        TABLE + "1,10,2,400\n",
        "duplicate_pair",
        "mine.csv, row 4",
        settings={"on_duplicate": "raise"},
    ),
    Case(
        "duplicates by no known rule", TABLE, "unknown_name", "data.on_duplicate", settings={"on_duplicate": "latest"}
    ),
    Case(
        "as_of without times",
        "user,item\n1,2\n",
        "missing_column",
        "mine.csv",
        settings={"as_of": "2026-01-31"},
    ),
    Case(
        "as_of before everything",
        TABLE,
        "nothing_known",
        "mine.csv",
        settings={"as_of": 50},
    ),
    Case("as_of that is no time", TABLE, "not_a_time", "data.as_of", settings={"as_of": "soon"}),
    Case("an encoding that is none", TABLE, "unknown_name", "data.encoding", settings={"encoding": "klingon"}),
]


def there(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def put(case, folder):
    "The input of a case as a source."
    if isinstance(case.content, pd.DataFrame):
        return case.content
    files = case.content if isinstance(case.content, dict) else {case.file: case.content}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / case.file


def test_there_are_fifty_and_half_of_them_have_rows_to_keep():
    assert len({c.name for c in CASES}) == len(CASES) >= 50
    assert sum(c.keeps is not None for c in CASES) >= 25


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_malformed(case, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source = put(case, tmp_path)
    before = there(tmp_path)
    with pytest.raises(AerecError) as refused:
        load_ratings(source, **case.settings)
    error = refused.value
    assert "\n" not in str(error) and "\r" not in str(error) and len(str(error)) < 1500, error
    assert (error.code, error.where.replace(f"{tmp_path}/", "")) == (case.code, case.where)
    if case.codes:
        found = error.violations if case.code == "broken_contract" else list(error.problems.itertuples())
        assert [problem.code for problem in found] == case.codes
    by_settings = {"klingon", "soon", "latest"} & set(map(str, case.settings.values()))  # what the settings refuse
    # the stage refuses it too, and leaves no run behind
    if not isinstance(source, pd.DataFrame) and not by_settings:
        run = open_run(
            env="test",
            source=str(source),
            runs_dir=str(tmp_path / "runs"),
            var_dir=str(tmp_path / "var"),
            **case.settings,
        )
        with pytest.raises(AerecError) as again:
            run.execute("data_import")
        assert (again.value.code, again.value.where) == (error.code, error.where)
    assert there(tmp_path) == before and not (tmp_path / "runs").exists()
    if case.keeps is None:
        with pytest.raises(AerecError):
            load_ratings(source, on_invalid="quarantine", **case.settings)
        return
    read = data_import._read_table
    raw = source if isinstance(source, pd.DataFrame) else read(source, data_import.POSITIONS["ratings"])
    kept, bad = validate(raw, case.file, on_invalid="quarantine")
    assert (
        sorted(set(bad.row))
        == sorted(set(range(1, len(raw) + 1)) - set(case.keeps))
        == sorted(set(refused.value.problems.row))
    )
    assert len(kept) == len(case.keeps) - kept_twice(raw, case.keeps)
    own = [c for c in raw.columns if c != data_import._FAULT]
    assert list(bad.columns) == ["row", "column", "reason", "value", *own] and (bad.reason != "").all()
    was = raw[own].iloc[bad.row - 1].reset_index(drop=True)  # the rows are kept as they were, as text
    assert (
        bad[own]
        .astype(object)
        .where(bad[own].notna(), None)
        .equals(was.map(lambda v: None if pd.isna(v) else str(v)).astype(object).where(was.notna(), None))
    )
    first = raw[own[0]].iloc[case.keeps[0] - 1]
    assert first in (kept.user_id.iloc[0], str(kept.user_id.iloc[0]))  # an id comes back as it was


def kept_twice(raw, keeps):
    "How many of the rows that are kept are of a pair that came before."
    user, item = [c for c in raw.columns if c != data_import._FAULT][:2]
    return int(raw.iloc[np.array(keeps) - 1].duplicated([user, item]).sum())


def test_a_zip_that_would_swell_beyond_reason(tmp_path, monkeypatch):
    (tmp_path / "bomb.zip").write_bytes(zipped(**{"ratings.csv": "user,item\n" + "1,2\n" * 100_000}))
    monkeypatch.setattr(data_import, "MAX_UNPACKED", 100_000)
    test_error(lambda: load_ratings(tmp_path / "bomb.zip"), "too_large", "bomb.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["bomb.zip"]


def test_what_is_no_file_at_all(tmp_path):
    for name, code in (("none.csv", "missing_file"), ("none-*.csv", "not_found")):
        source = str(tmp_path / name)
        test_error(lambda source=source: load_ratings(source), code, source)


ITEMS = [
    (
        "a missing id",
        "movieId,title\n1,Heat\n,Up\n",
        "missing_value",
        "items.csv, row 2, column movieId",
        ["Heat"],
    ),
    ("a line too long", "movieId,title\n1,Heat\n2,Good, the Bad\n", "too_many_fields", "items.csv, row 2", ["Heat"]),
    ("no column of ids", "title,genres\nHeat,Crime\n", "missing_column", "items.csv", None),
    ("a header that repeats a name", "item,title,title\n1,a,b\n", "duplicate_name", "items.csv", None),
    ("a quote that never closes", 'item,title\n1,"Heat\n2,Up\n', "open_quote", "items.csv, line 2", None),
]


@pytest.mark.parametrize("name, text, code, where, keeps", ITEMS, ids=[c[0] for c in ITEMS])
def test_malformed_items(name, text, code, where, keeps, tmp_path):
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(AerecError) as refused:
        load_items(tmp_path / "items.csv")
    assert (refused.value.code, refused.value.where) == (code, where) and "\n" not in str(refused.value)
    if keeps:
        assert load_items(tmp_path / "items.csv", on_invalid="quarantine").title.tolist() == keeps


AT = 964982703  # 2000-07-30 18:45:03 UTC
A = str(uuid.UUID(int=2**100 + 7))
B = str(uuid.UUID(int=5)).upper()
ODDITIES = [  # name, file, content, settings, users, items, value, times
    ("a mark of UTF-8", "a.csv", b"\xef\xbb\xbfuser,item\n1,2\n", {}, [1], [2], None, None),
    ("UTF-16", "a.csv", "user,item\nann,é\n".encode("utf-16"), {}, ["ann"], ["é"], None, None),
    ("UTF-16 by name", "a.csv", UTF16, {"encoding": "utf-16-le"}, ["ann"], ["é"], None, None),
    (
        "latin-1 after a long while",
        "a.csv",
        b"user,item\n" + b"".join(b"u%d,x\n" % i for i in range(20_000)) + b"No\xe9,x\n",
        {},
        [*(f"u{i}" for i in range(20_000)), "Noé"],
        ["x"] * 20_001,
        None,
        None,
    ),
    ("lines that end in CR", "a.csv", b"user,item\r1,2\r1,3\r", {}, [1, 1], [2, 3], None, None),
    ("CRLF, blank lines, no end of line", "a.csv", b"user,item\r\n\r\n1,2\r\n\r\n1,3", {}, [1, 1], [2, 3], None, None),
    ("separators at the end of lines", "a.csv", "user,item\n1,2,\n1,3,\n", {}, [1, 1], [2, 3], None, None),
    ("blanks around values", "a.csv", 'user, item, plays\n 1, "2" , 3\n1 ,3,4\n', {}, [1, 1], [2, 3], [3, 4], None),
    (
        "quotes and separators in quotes",
        "a.csv",
        'user,item\n"ann, b","say ""hi"""\n',
        {},
        ["ann, b"],
        ['say "hi"'],
        None,
        None,
    ),
    ("a line break in quotes", "a.csv", 'user,item,title\n1,2,"two\nlines"\n2,3,x\n', {}, [1, 2], [2, 3], None, None),
    (
        "Book-Crossing",
        "a.csv",
        '"User-ID";"ISBN";"Book-Rating"\n"276725";"034545104X";"0"\n',
        {},
        [276725],
        ["034545104X"],
        [0],
        None,
    ),
    ("pipes", "a.txt", "user|item|plays\n1|2|3\n", {}, [1], [2], [3], None),
    ("no header", "a.data", f"196\t242\t3\t{AT}\n", {}, [196], [242], [3], [AT]),
    ("`::`", "a.dat", f"1::1193::5::{AT}\n", {}, [1], [1193], [5], [AT]),
    ("leading zeros", "a.csv", "user,item\n007,1\n7,01\n", {}, ["007", "7"], ["1", "01"], None, None),
    (
        "ids too large for 64 bits",
        "a.csv",
        f"user,item\n{2**64},{2**63 - 1}\n",
        {},
        [str(2**64)],
        [2**63 - 1],
        None,
        None,
    ),
    ("UUIDs", "a.csv", f"user,item\n{A},1\n{B},2\n", {}, [A, B], [1, 2], None, None),
    (
        "ids that look like missing ones",
        "a.csv",
        "user,item\nNA,null\nnan,None\n",
        {},
        ["NA", "nan"],
        ["null", "None"],
        None,
        None,
    ),
    (
        "times of all kinds in one column",
        "a.csv",
        (
            f"user,item,time\n1,1,{AT}\n1,2,{AT}000\n1,3,{AT}000000\n1,4,{AT}000000000\n"
            f"1,5,2000-07-30T18:45:03Z\n1,6,2000-07-30 20:45:03+02:00\n1,7,{AT}.5\n"
        ),
        {},
        [1] * 7,
        list(range(1, 8)),
        None,
        [AT] * 7,
    ),
    (
        "a column of times with nothing in it",
        "a.csv",
        "user,item,time\n1,2,NULL\n1,3,\n",
        {},
        [1, 1],
        [2, 3],
        None,
        None,
    ),
    ("a gz without its name", "a.csv", gzip.compress(b"user,item\n1,2\n"), {}, [1], [2], None, None),
    ("a plain file called gz", "a.csv.gz", "user,item\n1,2\n", {}, [1], [2], None, None),
    ("zst", "a.csv.zst", pyarrow.compress(b"user,item\n1,2\n", "zstd", asbytes=True), {}, [1], [2], None, None),
    (
        "the only table of a zip",
        "a.zip",
        zipped(**{"deep__a.csv": "user,item\n1,2\n", "README": "x"}),
        {},
        [1],
        [2],
        None,
        None,
    ),
    (
        "a mapping",
        "a.csv",
        "wer,was,gut\n1,2,3\n",
        {"columns": {"wer": "user_id", "was": "item_id", "gut": "rating"}},
        [1],
        [2],
        [3],
        None,
    ),
    (
        "ids in the index of a Parquet",
        "a.parquet",
        (lambda f: (f.to_parquet(b := io.BytesIO()), b.getvalue())[1])(
            pd.DataFrame({"user": [1], "item": [2], "plays": [3]}).set_index(["user", "item"])
        ),
        {},
        [1],
        [2],
        [3],
        None,
    ),
    (
        "UUIDs in a Parquet",
        "a.parquet",
        parquet(pd.DataFrame({"user": [uuid.UUID(A)], "item": [2]})),
        {},
        [uuid.UUID(A)],
        [2],
        None,
        None,
    ),
    (
        "dates in a Parquet",
        "a.parquet",
        parquet(pd.DataFrame({"user": [1], "item": [2], "date": [datetime(2000, 7, 30).date()]})),
        {},
        [1],
        [2],
        None,
        [AT - AT % 86400],
    ),
]


@pytest.mark.parametrize(
    "name, file, content, settings, users, items, value, times", ODDITIES, ids=[o[0] for o in ODDITIES]
)
def test_odd_and_well_formed(name, file, content, settings, users, items, value, times, tmp_path):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_ratings(tmp_path / file, **settings)
    assert (found.user_id.tolist(), found.item_id.tolist()) == (users, items)
    values = next((found[c].tolist() for c in ("rating", "count") if c in found), None)
    assert (values, found.timestamp.tolist() if "timestamp" in found else None) == (value, times)


@pytest.mark.parametrize("dtype", ["int64", "Int64", "uint8", "int64[pyarrow]", "category", "float64", object])
def test_whole_numbers_of_any_dtype(dtype):
    found = load_ratings(pd.DataFrame({"user": pd.Series([3, 1, 3], dtype=dtype), "item": [1, 2, 3]}))
    assert found.user_id.tolist() == [3, 1, 3] and found.user_id.dtype == np.int64


@pytest.mark.parametrize("dtype", ["str", "string", "string[pyarrow]", "category", object])
def test_texts_of_any_dtype(dtype):
    found = load_ratings(pd.DataFrame({"user": pd.Series(["007", "b", "007"], dtype=dtype), "item": [1, 2, 3]}))
    assert found.user_id.tolist() == ["007", "b", "007"]


def test_both_readings_of_text_agree():
    "Random tables, written by pandas: the fast reading, the thorough one and pandas agree."
    random = np.random.default_rng(1)
    letters = np.array(list("ab\" ,;'é|7\n"))
    for sep in "\t,;|":
        words = ["".join(random.choice(letters, random.integers(1, 6))).strip() or "x" for _ in range(300)]
        table = pd.DataFrame(np.array(words).reshape(100, 3), columns=["user", "item", "title"])
        text = table.to_csv(sep=sep, index=False).encode()
        layout = data_import._layout(text, "utf-8", True, "f", ())
        fast = data_import._read_fast(io.BytesIO(text), layout)
        thorough = data_import._read_lines(io.BytesIO(text), layout, "f")
        assert layout.sep == sep and thorough.equals(table.astype("str"))
        assert fast is None or fast.equals(thorough)
    assert fast is not None


def row_by_row(row):
    "The columns of a row that cannot be used, by plain Python."

    def number(v):
        try:
            return float(v) if "_" not in v else None  # digits grouped as Python does are no number
        except ValueError:
            return None

    def usable_time(v):
        n = number(v)
        if n is None:
            try:
                n = (
                    datetime.fromisoformat(v.replace("Z", "+00:00")).replace(tzinfo=None).timestamp()
                )  # within a day of the limits is not asked for
            except ValueError:
                return False
        else:
            if not np.isfinite(n):
                return False
            n /= next((unit for least, unit in ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3)) if abs(n) >= least), 1)
        return 0 <= n <= 7_258_118_400

    bad = {c for c in ("user", "item") if row[c] is None}
    if row["rating"] is None or number(row["rating"]) is None or not abs(number(row["rating"])) < 3e38:
        bad.add("rating")
    if row["time"] is None or not usable_time(row["time"]):
        bad.add("time")
    return bad


def test_problems_agree_with_a_check_row_by_row():
    random = np.random.default_rng(3)
    pools = {
        "user": ["ann", "bob", "7", None],
        "item": ["x", "007", None],
        "rating": ["4", "-3.5", "1e2", "nan", "inf", "-1e400", "4,5", "good", "0x10", "1_0", "+2", "", None],
        "time": [
            "100",
            "964982703.5",
            "964982703123",
            "1e9",
            "-1",
            "99999999999",
            "964982703123456",
            "2026-01-31",
            "2026-01-31T10:00:00+02:00",
            "2026-13-01",
            "1950-01-01",
            "2300-01-01",
            "soon",
            "31.01.2026",
            "inf",
            None,
        ],
    }
    table = pd.DataFrame({c: random.choice(np.array(pool, object), 2000) for c, pool in pools.items()}).astype("str")
    rows = table.astype(object).where(table.notna(), None).replace("", None).to_dict("records")
    expected = {(i + 1, c) for i, row in enumerate(rows) for c in row_by_row(row)}
    with pytest.raises(AerecError) as refused:
        validate(table, "f")
    found = refused.value.problems
    assert set(zip(found.row, found.column, strict=True)) == expected and len(found) == len(expected)
    kept, bad = validate(table, "f", on_invalid="quarantine")
    assert set(bad.row) == {r for r, _ in expected} and kept.user_id.isin(["ann", "bob", "7"]).all()


def test_the_stage_keeps_what_it_set_aside(tmp_path):
    (tmp_path / "ratings.csv").write_text(TABLE + "2,11,good,400\n3,10,5,500,9\n3,11,4,250\n1,10,1,900\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n10,Heat,Crime\n,Up,Animation\n")
    knobs = {
        "env": "test",
        "source": str(tmp_path),
        "runs_dir": str(tmp_path / "runs"),
        "var_dir": str(tmp_path / "var"),
    }
    with pytest.raises(AerecError) as refused:
        open_run(**knobs).execute("data_import")
    assert refused.value.code == "bad_rows"
    assert refused.value.problems[["row", "code"]].values.tolist() == [[4, "not_a_number"], [5, "too_many_fields"]]
    assert not (tmp_path / "runs").exists()
    stage = open_run(**knobs, on_invalid="quarantine", as_of="1970-01-01T00:05:00Z").execute("data_import")
    ratings = pd.read_parquet(stage / "ratings.parquet")
    bad = pd.read_parquet(stage / "quarantine.parquet")
    source = read_json(stage / "source.json")
    assert ratings[["user_id", "item_id", "timestamp"]].values.tolist() == [
        [1, 10, 100],
        [1, 11, 200],
        [2, 10, 300],
        [3, 11, 250],
    ]  # <= 300 s
    assert ratings.rating.tolist()[0] == 4  # the later rating of the pair was not known
    assert bad[["row", "column", "reason"]].values.tolist() == [
        [4, "rating", data_import._REASONS["not_a_number"]],
        [5, "", data_import._REASONS["too_many_fields"]],
    ]
    assert bad.rating.tolist() == ["good", "5"] and pd.read_parquet(
        stage / "quarantine_items.parquet"
    ).title.tolist() == ["Up"]
    assert (source["n_rows"], source["n_quarantined"], source["n_later"], source["as_of"]) == (
        7,
        2,
        1,
        "1970-01-01T00:05:00+00:00",
    )
    assert "1970-01-01T00:05:00+00:00" in data_import.describe_source(stage) and source["columns"]["rating"] == "rating"
    assert data_import.quarantine_table(bad).rows.tolist() == [1, 1]


def test_late_data_does_not_leak(tmp_path):
    "A row that happened before the moment and arrived after it is not known, in a hand-over of several files."
    events = pd.DataFrame(
        {
            "user_id": ["a", "a", "b", "b"],
            "item_id": [1, 2, 1, 3],
            "rating": [1.0, 2.0, 3.0, 4.0],
            "timestamp": [10, 20, 30, 40],
            "ingested_at": [11, 90, 31, 41],
            "event_id": list("wxyz"),
        }
    )
    (tmp_path / "ratings").mkdir()
    for i in (0, 1):
        data_import.write_handover(events[2 * i : 2 * i + 2], tmp_path / "ratings" / f"part-{i}.parquet")
    for at in (9, 10, 11, 35, 41, 89, 90, 1000):
        known = events[(events.timestamp <= at) & (events.ingested_at <= at)]
        if len(known):
            assert (
                load_ratings(tmp_path / "ratings", as_of=at)[
                    ["user_id", "item_id", "rating", "timestamp"]
                ].values.tolist()
                == known[["user_id", "item_id", "rating", "timestamp"]].values.tolist()
            )
        else:
            test_error(lambda at=at: load_ratings(tmp_path / "ratings", as_of=at), "nothing_known")
    assert len(load_ratings(tmp_path / "ratings")) == 4


@pytest.mark.parametrize(
    "knob, value",
    [
        ("encoding", "klingon"),
        ("encoding", "base64"),
        ("as_of", "soon"),
        ("as_of", "2026-13-45"),
        ("on_invalid", "ignore"),
    ],
)
def test_settings_are_refused_before_any_data_is_read(knob, value):
    with pytest.raises(AerecError) as refused:
        load_settings("test", **{knob: value})
    assert f"data.{knob}" in str(refused.value) and repr(value) in str(refused.value)
    assert "\n" not in str(refused.value)
