"""Downloads against a real HTTP server on loopback: whole, stalled, broken off, corrupted, redirected, changed,
resumed, killed, two at once, on a full disk.
"""

import errno
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest

from aerec_nb import data_import
from aerec_nb.core.files import file_error
from aerec_nb.core.settings import load_settings
from aerec_nb.data_import import ChecksumError, download, load_items, load_ratings
from aerec_nb.testing import raised, test_error

CONTENT = bytes(hashlib.sha256(b"seed").digest() * 32 * 1024)  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves `content` at any path; `doing` says what happens to the coming requests, then all are answered in full.
    Keeps what was asked and sent.
    """

    def __init__(self):
        self.content = CONTENT
        self.etag = '"v1"'
        self.modified = None
        self.ranges = True
        self.if_range = True
        self.doing = []
        self.asked = []
        self.sent = 0
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"

    def answer(self, h):
        self.asked.append(
            {k: h.headers[k] for k in ("Range", "If-Range", "Authorization", "Host") if k in h.headers}
            | {"path": h.path}
        )
        what, n = self.doing.pop(0) if self.doing else ("whole", None)
        if what == "missing":
            return h.send_error(404)
        if what == "redirect":
            h.send_response(302)
            h.send_header("Location", n)
            h.send_header("Content-Length", "0")
            h.end_headers()
            return None
        first = 0
        content = self.content
        wanted = h.headers.get("Range")
        same = not self.if_range or h.headers.get("If-Range", self.etag or self.modified) == (
            self.etag or self.modified
        )
        if wanted and self.ranges and same:
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            if first >= len(content):
                h.send_response(416)
                h.send_header("Content-Range", f"bytes */{len(content)}")
                h.send_header("Content-Length", "0")
                h.end_headers()
                return None
            h.send_response(206)
            h.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            h.send_response(200)
        if self.etag:
            h.send_header("ETag", self.etag)
        if self.modified:
            h.send_header("Last-Modified", self.modified)
        body = content[first:]
        h.send_header("Content-Length", str(len(body) if what != "boast" else n))
        h.end_headers()
        if what == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        if what in ("cut", "stall"):
            body = body[:n]
        pieces = [body[i : i + 4096] for i in range(0, len(body), 4096)] if what == "slow" else [body]
        for piece in pieces:
            self.sent += len(piece)  # before it is sent: who has received it may look at once
            try:
                h.wfile.write(piece)
                h.wfile.flush()
            except OSError:
                self.sent -= len(piece)
                break
            if what == "slow":
                time.sleep(n)
        if what == "stall":
            self.released.wait(20)
        if what in ("cut", "stall"):
            h.close_connection = True
        return None


@pytest.fixture
def server():
    made = Server()
    yield made
    made.released.set()
    made.http.shutdown()
    made.http.server_close()


def left(folder):
    return sorted(p.name for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".lock")


def test_whole_and_redirected(server, tmp_path):
    server.doing = [("redirect", "/elsewhere")]
    assert download(server.url, tmp_path / "a", SHA256).read_bytes() == CONTENT
    assert [a["path"] for a in server.asked] == ["/file.bin", "/elsewhere"] and left(tmp_path) == ["a"]
    assert download(server.url, tmp_path / "a", SHA256) and len(server.asked) == 2, "what is there is not fetched again"


@pytest.mark.parametrize(
    "doing, ranges, error, kept",
    [
        (("stall", 5000), True, TimeoutError, ["a.part", "a.part.json"]),
        (("stall", 0), True, TimeoutError, None),
        (("corrupt", None), True, ChecksumError, []),
        (("missing", None), True, HTTPError, []),
    ],
)
def test_a_bad_download_is_given_up_in_time_and_is_never_visible(doing, ranges, error, kept, server, tmp_path):
    server.doing = [doing] * 9
    server.ranges = ranges
    clock = time.monotonic()
    with pytest.raises(error):
        download(server.url, tmp_path / "a", SHA256, timeout=0.5)
    assert time.monotonic() - clock < 5 and "a" not in left(tmp_path)
    if kept is not None:
        assert left(tmp_path) == kept


def test_a_connection_that_breaks_is_taken_up_again_and_asks_for_the_rest_only(server, tmp_path):
    server.doing = [("cut", 300_000), ("cut", 200_000)]
    assert download(server.url, tmp_path / "a", SHA256).read_bytes() == CONTENT
    assert [a.get("Range") for a in server.asked] == [None, "bytes=300000-", "bytes=500000-"]
    assert server.asked[1]["If-Range"] == '"v1"' and server.sent == len(CONTENT)


def test_silence_ends_the_try_and_the_next_one_asks_for_the_rest_only(server, tmp_path):
    server.doing = [("stall", 400_000)]
    with pytest.raises(TimeoutError):
        download(server.url, tmp_path / "a", timeout=0.5)
    kept = (tmp_path / "a.part").stat().st_size
    assert kept == 400_000
    assert download(server.url, tmp_path / "a", timeout=5).read_bytes() == CONTENT
    assert server.asked[-1]["Range"] == f"bytes={kept}-" and server.sent == len(CONTENT) and left(tmp_path) == ["a"]


def test_a_server_that_never_gets_further_is_given_up(server, tmp_path):
    server.ranges = False
    server.doing = [("cut", 300_000)] * 9
    with pytest.raises(ConnectionError):
        download(server.url, tmp_path / "a", SHA256)
    assert len(server.asked) == 2
    server.doing = []
    assert download(server.url, tmp_path / "a", SHA256).read_bytes() == CONTENT
    assert server.asked[-1]["Range"] and server.sent == 600_000 + len(CONTENT), "without ranges it begins anew"


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changed_in_between_begins_anew(if_range, server, tmp_path):
    server.doing = [("stall", 1000)]
    server.if_range = if_range
    with pytest.raises(OSError):
        download(server.url, tmp_path / "a", timeout=0.3)
    server.content = CONTENT[::-1]
    server.etag = '"v2"'
    assert download(server.url, tmp_path / "a").read_bytes() == CONTENT[::-1]
    assert left(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "modified, sha256, asks_for_the_rest",
    [("Mon, 01 Jan 2024 00:00:00 GMT", None, True), (None, SHA256, True), (None, None, False)],
)
def test_without_an_etag_the_date_or_the_checksum_must_tell(modified, sha256, asks_for_the_rest, server, tmp_path):
    server.etag = None
    server.modified = modified
    server.doing = [("stall", 1000)]
    with pytest.raises(OSError):
        download(server.url, tmp_path / "a", sha256, timeout=0.3)
    assert download(server.url, tmp_path / "a", sha256).read_bytes() == CONTENT
    assert ("Range" in server.asked[-1]) == asks_for_the_rest


def test_the_beginning_of_another_file_is_found_out_by_the_checksum(server, tmp_path):
    server.etag = None
    server.doing = [("stall", 1000)]
    server.content = b"x" * len(CONTENT)
    with pytest.raises(OSError):
        download(server.url, tmp_path / "a", SHA256, timeout=0.3)
    server.content = CONTENT
    assert download(server.url, tmp_path / "a", SHA256).read_bytes() == CONTENT
    assert ["Range" in a for a in server.asked] == [False, True, False]


def test_another_file_is_refused_after_a_second_try_from_its_beginning(server, tmp_path):
    server.etag = None
    server.doing = [("stall", 1000)]
    server.content = b"x" * len(CONTENT)
    with pytest.raises(TimeoutError):
        download(server.url, tmp_path / "a", SHA256, timeout=0.3)
    with pytest.raises(ChecksumError):
        download(server.url, tmp_path / "a", SHA256)
    assert ["Range" in a for a in server.asked] == [False, True, False]
    assert left(tmp_path) == []


def test_a_file_that_has_become_shorter(server, tmp_path):
    server.doing = [("stall", 1000)]
    with pytest.raises(OSError):
        download(server.url, tmp_path / "a", timeout=0.3)
    server.content = b"short"
    server.if_range = False
    assert download(server.url, tmp_path / "a").read_bytes() == b"short"


def test_name_lookup_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3))
    clock = time.monotonic()
    with pytest.raises(TimeoutError):
        download("http://files.example/a", tmp_path / "a", timeout=0.3)
    assert time.monotonic() - clock < 2


def fetch_in_child(url, path, *limits):
    code = (
        f"import resource, sys; from aerec_nb.data_import import download\n{';'.join(limits)}\ndownload(sys.argv[1], "
        f"sys.argv[2], {SHA256!r}, 20.)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, url, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_download_goes_on_where_it_was(server, tmp_path):
    server.doing = [("slow", 0.02)]
    child = fetch_in_child(server.url, tmp_path / "a")
    part = tmp_path / "a.part"
    for _ in range(1000):
        if part.exists() and part.stat().st_size > 50_000:
            break
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stderr.close()
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT) and left(tmp_path) == ["a.part", "a.part.json"]
    assert download(server.url, tmp_path / "a", SHA256).read_bytes() == CONTENT
    assert server.asked[-1]["Range"] == f"bytes={kept}-"


def test_two_processes_at_once_fetch_once(server, tmp_path):
    server.doing = [("slow", 0.002)]
    children = [fetch_in_child(server.url, tmp_path / "a") for _ in range(2)]
    errors = [c.communicate(timeout=60)[1] for c in children]
    assert [c.returncode for c in children] == [0, 0], errors
    assert len(server.asked) == 1 and (tmp_path / "a").read_bytes() == CONTENT and left(tmp_path) == ["a"]


def test_no_room_on_the_disk_leaves_nothing(server, tmp_path):
    child = fetch_in_child(
        server.url,
        tmp_path / "a",
        "import signal",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))",
    )
    error = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and "File too large" in error.splitlines()[-1], error
    assert left(tmp_path) == [] and server.asked
    server.doing = [("boast", 10**16)]
    error = raised(lambda: download(server.url, tmp_path / "a"))
    assert (error.code, error.errno) == ("no_room", errno.ENOSPC) and isinstance(error, OSError)
    assert "10,000,000,000 MB" in str(error)
    assert left(tmp_path) == []


def test_a_password_goes_to_its_host_only_and_is_not_shown(server, tmp_path):
    other = Server()
    try:
        server.doing = [("redirect", other.url)]
        download(server.url.replace("//", "//ann:s3cret@"), tmp_path / "a")
        assert server.asked[0]["Authorization"] == "Basic YW5uOnMzY3JldA==" and "Authorization" not in other.asked[0]
        server.doing = [("missing", None)]
        settings = load_settings("test", dataset_dir=str(tmp_path / "dataset"))
        error = raised(lambda: data_import._locate(server.url.replace("//", "//ann:s3cret@"), settings, [tmp_path]))
        assert (error.code, error.where) == ("not_found", server.url.replace("//", "//ann:***@"))
        assert "s3cret" not in str(error) and "s3cret" not in "".join(
            p.read_text() for p in (tmp_path / "dataset").rglob("*") if p.is_file()
        )
    finally:
        other.http.shutdown()
        other.http.server_close()


# --- the published sets

RATINGS = [(1, 10, 4.0, 964982703), (1, 11, 3.0, 964981247), (2, 10, 5.0, 964980000)]
FILMS = [(10, "Amélie, Le fabuleux destin (2001)", ["Comedy", "Romance"]), (11, "Nothing (1999)", [])]


def archive(name):
    "A zip in the layout of a published set."
    data = io.BytesIO()
    files = {}
    if name == "ml-1m":
        files["ratings.dat"] = "".join(f"{u}::{i}::{r:.0f}::{t}\n" for u, i, r, t in RATINGS)
        files["movies.dat"] = "".join(
            f"{i}::{title}::{'|'.join(g) or '(no genres listed)'}\n" for i, title, g in FILMS
        ).encode("latin-1")
        files["users.dat"] = "1::F::1::10::48067\n"
    elif name == "ml-100k":
        files["u.data"] = "".join(f"{u}\t{i}\t{r:.0f}\t{t}\n" for u, i, r, t in RATINGS)

        def flags(genres):
            return "|".join(str(int(g in genres or g == "unknown" and not genres)) for g in data_import._GENRES_100K)

        files["u.item"] = "".join(
            f"{i}|{title}|01-Jan-2001||http://x/?{i}|{flags(g)}\n" for i, title, g in FILMS
        ).encode("latin-1")
        files |= {
            "u.genre": "unknown|0\n",
            "u.user": "1|24|M|technician|85711\n",
            "ua.base": "1\t10\t4\t1\n",
            "mku.sh": "#!/bin/sh\n",
        }
    else:
        files["ratings.csv"] = "userId,movieId,rating,timestamp\r\n" + "".join(
            f"{u},{i},{r},{t}\r\n" for u, i, r, t in RATINGS
        )
        files["movies.csv"] = "movieId,title,genres\r\n" + "".join(
            f'{i},"{title}",{"|".join(g) or "(no genres listed)"}\r\n' for i, title, g in FILMS
        )
        files |= {
            "tags.csv": "userId,movieId,tag,timestamp\r\n",
            "links.csv": "movieId,imdbId,tmdbId\r\n",
            "genome-scores.csv": "movieId,tagId,relevance\r\n",
        }
    with zipfile.ZipFile(data, "w") as z:
        z.mkdir(name)
        for member, content in {**files, "README.txt": "terms"}.items():
            z.writestr(f"{name}/{member}", content)
    return data.getvalue()


@pytest.fixture
def grouplens(server, monkeypatch):
    "GroupLens on loopback: call it with the set it shall have."

    def has(name):
        server.content = archive(name)
        monkeypatch.setitem(
            data_import.GROUPLENS, name, (data_import.GROUPLENS[name][0], hashlib.sha256(server.content).hexdigest())
        )
        monkeypatch.setattr(data_import, "_GROUPLENS_URL", server.url.replace("file.bin", "{}.zip"))
        return server

    return has


@pytest.mark.parametrize("name", data_import.GROUPLENS)
def test_every_published_set_gives_the_same_frames(name, grouplens, tmp_path, monkeypatch):
    server = grouplens(name)
    monkeypatch.setenv("AEREC_PATHS__DATASET_DIR", str(tmp_path))
    ratings = load_ratings(name)
    items = load_items(name)
    assert ratings[["user_id", "item_id", "rating", "timestamp"]].to_numpy().tolist() == [list(r) for r in RATINGS]
    assert ratings.user_id.dtype == ratings.item_id.dtype == items.item_id.dtype == "int64"
    assert items[["item_id", "title", "genres"]].to_numpy().tolist() == [
        [i, title, "|".join(g) or "(no genres listed)"] for i, title, g in FILMS
    ]
    assert [a["path"] for a in server.asked] == [f"/{name}.zip"], "fetched once"
    assert "README.txt" in left(tmp_path / ".cache" / name) and not {"genome-scores.csv", "mku.sh"} & set(
        left(tmp_path / ".cache" / name)
    )
    assert left(tmp_path / ".cache" / ".parts") == []


def test_a_set_that_breaks_off_goes_on_when_asked_for_again(grouplens, tmp_path):
    server = grouplens("ml-1m")
    server.doing = [("stall", 200)]
    error = raised(lambda: data_import._named("ml-1m", tmp_path, 0.3))
    assert (error.code, error.where) == ("no_answer", "ml-1m")
    assert "\n" not in str(error) and not (tmp_path / ".cache" / "ml-1m").exists()
    assert any(name.endswith(".part") for name in left(tmp_path / ".cache" / ".parts")), "what came is kept"
    assert data_import._named("ml-1m", tmp_path, 5.0).read("ratings")[0].shape == (3, 4)
    assert server.asked[-1]["Range"] == "bytes=200-" and server.sent == len(server.content)


def test_a_disk_that_is_full_while_unpacking_leaves_nothing(grouplens, tmp_path, monkeypatch):
    grouplens("ml-1m")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(data_import.shutil, "copyfileobj", full)
        error = raised(lambda: data_import._named("ml-1m", tmp_path, 5.0))
        full = file_error(OSError(errno.ENOSPC, ""))
        assert (error.code, error.where) == (full.code, "ml-1m") and str(full) in str(error)
    assert left(tmp_path) == [] and not any(p.name.startswith(".ml-1m") for p in (tmp_path / ".cache").iterdir()), (
        "the next try is not kept waiting"
    )


def test_a_set_whose_checksum_is_wrong_is_refused_and_remembered(grouplens, tmp_path):
    server = grouplens("ml-latest-small")
    server.doing = [("corrupt", None)]
    test_error(lambda: data_import._named("ml-latest-small", tmp_path, 5.0), "wrong_checksum", "ml-latest-small")
    assert left(tmp_path / ".cache") == ["attempts.json"]
    again = raised(lambda: data_import._named("ml-latest-small", tmp_path, 5.0))
    assert again.code == "wrong_checksum" and "10 minutes" in str(again)
    assert len(server.asked) == 1


def test_ml_100k_comes_from_grouplens_or_else_from_the_wheel_and_says_which(grouplens, tmp_path, monkeypatch):
    server = grouplens("ml-100k")

    def wheel(folder, timeout):
        with data_import._cached(folder) as t:
            (t / "ml-100k.inter").write_text(
                "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t10\t4\t964982703\n"
            )

    places = {"ml-100k": [data_import.FETCHED["ml-100k"][0], (data_import._WHEEL, wheel)]}
    first = data_import._named("ml-100k", tmp_path / "a", 5.0, places)
    assert (first.description, first.ratings.name, first.items.name) == (
        "MovieLens 100K from GroupLens",
        "u.data",
        "u.item",
    )
    server.doing = [("missing", None)]
    second = data_import._named("ml-100k", tmp_path / "b", 5.0, places)
    assert second.description == data_import._WHEEL
    assert [reason.code for reason in second.reasons] == ["not_found", "fetched"]
    assert data_import._named("ml-100k", tmp_path / "b", 5.0, places).description == data_import._WHEEL


@pytest.mark.parametrize(
    "wheel, timeout, code",
    [(False, 10, "not_fetched"), (True, 10, "wrong_checksum"), (True, 0.01, "no_answer")],
)
def test_a_wheel_that_does_not_come_or_holds_another_file(wheel, timeout, code, tmp_path, monkeypatch):
    (found := tmp_path / "found").mkdir()
    if wheel:
        with zipfile.ZipFile(found / "recbole-1.2.1-py3-none-any.whl", "w") as z:
            z.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "user_id:token\titem_id:token\n1\t2\n")
            z.writestr("recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
            z.writestr("recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            z.writestr("recbole-1.2.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found))
    places = {"ml-100k": [(data_import._WHEEL, data_import._fetch_wheel)]}
    test_error(lambda: data_import._named("ml-100k", tmp_path, timeout, places), code, "ml-100k")
    assert left(tmp_path / ".cache") == ["attempts.json"]


def test_a_first_run_without_grouplens_says_what_happened_then(server, tmp_path, monkeypatch, capsys):
    "The source is found once in a run: what its line says is not what a second look a second later would say."

    def unreachable(folder, timeout):
        raise TimeoutError("no answer within 10 s")

    def wheel(folder, timeout):
        with data_import._cached(folder) as t:
            (t / "ml-100k.inter").write_text(
                "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
                + "".join(f"{u}\t{i}\t4\t9\n" for u in range(9) for i in range(9))
            )

    monkeypatch.setattr(
        data_import._auto,
        "__defaults__",
        (
            {
                "ml-latest-small": [("MovieLens latest-small from GroupLens", unreachable)],
                "ml-100k": [(data_import._WHEEL, wheel)],
            },
        ),
    )
    from aerec_nb.core.artifacts import open_run

    run = open_run(env="test", runs_dir=str(tmp_path / "runs"), source="auto", dataset_dir=str(tmp_path / "dataset"))
    stage = run.execute("data_import")
    line = data_import.describe_source(stage)
    later = data_import.resolve_source(run.settings)
    assert [reason.code for reason in later.reasons] == ["no_own_files", "no_answer", "cached"]
    assert str(data_import._FETCHED_NOW) in line and str(later.reasons[-1]) not in line, line


# --- any web address


def test_a_zip_from_a_web_address(server, tmp_path, monkeypatch):
    server.content = archive("ml-1m")
    monkeypatch.setenv("AEREC_PATHS__DATASET_DIR", str(tmp_path))
    url = server.url.replace("file.bin", "films%20of%20ours.zip?signature=s3cret")
    assert load_ratings(url).rating.tolist() == [4, 3, 5] and load_items(url).title.tolist() == [f[1] for f in FILMS]
    assert len(server.asked) == 1 and "s3cret" not in str(data_import._locate(url, load_settings(), [])) + str(
        left(tmp_path)
    )


def test_a_zip_that_leads_out_of_its_folder_or_is_none_leaves_nothing(server, tmp_path):
    settings = load_settings("test", dataset_dir=str(tmp_path / "dataset"))
    for content, code in ((b"no zip at all", "damaged_file"), (None, "not_allowed")):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as z:
            z.writestr("../../ratings.csv", "user,item\n1,2\n")
        server.content = content or data.getvalue()
        url = server.url.replace("bin", f"{len(server.content)}.zip")
        test_error(lambda url=url: data_import._locate(url, settings, [tmp_path]), code)
        assert left(tmp_path) == []
