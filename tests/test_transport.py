"The edge of the service against slow, broken and hostile clients: real sockets, loopback only, bounded."

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import STRESS
from scipy.sparse import csr_matrix

from aerec_nb.data.event_database import sqlite_url
from aerec_nb.inference import Recommender
from aerec_nb.models.registry import create_model
from aerec_nb.packaging import save_bundle
from aerec_nb.pipeline import main as aerec_main
from aerec_nb.serving import MAX_BODY, MAX_HEAD, MAX_WAIT, new_api_key
from aerec_nb.serving import main as serving_main

JSON = "Content-Type: application/json\r\n"
CODES = {
    401: "unauthorized",
    403: "missing_role",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "60 users, 40 items."
    rng = np.random.default_rng(0)
    x = csr_matrix((rng.random((60, 40)) < 0.2).astype(np.float32))
    table = pd.DataFrame({"item_id": np.arange(40), "title": [f"Film {n}" for n in range(40)]})
    return save_bundle(
        Recommender(create_model("ease").fit(x), np.arange(40), np.arange(60), x, item_table=table),
        tmp_path_factory.mktemp("bundles") / "b",
        {"name": "films"},
    )


class Running:
    "A service of one worker, its log, and ways to speak to it."

    def __init__(self, process, log, host):
        self.process = process
        self.log = log
        self.host = host
        self.port = self._port(log.with_name("ready.json"))

    def _port(self, ready_file):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            if ready_file.exists():
                port = urlsplit(json.loads(ready_file.read_text())["url"]).port
                if self.answers(port):
                    return port
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def answers(self, port):
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def worker(self):
        return psutil.Process(self.process.pid).children()[0]

    def client(self, key="", **kw):
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"X-API-Key": key, "Host": self.host} | kw.pop("headers", {}),
            trust_env=False,
            timeout=10,
            **kw,
        )

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def say(self, text, connection=None):
        "Send bytes, and return what comes back until the end or for ten seconds."
        connection = connection or self.connect()
        with connection:
            with suppress(OSError):  # it was refused while it was still being sent
                connection.sendall(text.encode("latin-1") if isinstance(text, str) else text)
            return read_all(connection)

    def head(self, method, path, *lines, host=None, key=None):
        given = [f"Host: {host or self.host}", *([f"X-API-Key: {key}"] if key else []), *lines]
        return f"{method} {path} HTTP/1.1\r\n" + "".join(line.strip() + "\r\n" for line in given) + "\r\n"


def read_all(connection, seconds=10):
    connection.settimeout(seconds)
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except OSError:
        pass
    return b"".join(parts)


def read_answer(connection):
    "One answer, with its body."
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, dict(answer.headers.items()), answer.read()


@contextmanager
def launch(bundle, folder, *words, files=None, host="127.0.0.1", **variables):
    "Start `python -m aerec_nb.serving` with one worker; `files`: how many it may open, hard and soft."
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    env = {k: v for k, v in os.environ.items() if not k.startswith("AEREC_")} | {
        "OMP_NUM_THREADS": "1",
        "AEREC_PATHS__VAR_DIR": str(folder / "var"),
        **{f"AEREC_SERVING__{k}": str(v) for k, v in variables.items()},
    }
    command = [
        sys.executable,
        "-c",
        "from aerec_nb.serving import main; main()",
        "--bundle",
        str(bundle),
        "--port",
        "0",
        "--events",
        sqlite_url(folder / "events.db"),
        "--ready-file",
        str(folder / "ready.json"),
        *words,
    ]
    limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, preexec_fn=limit)
    try:
        yield Running(process, log, host)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()


@pytest.fixture(scope="module")
def keys():
    return {role: new_api_key(role) for role in ("read", "feedback", "admin")}


@pytest.fixture(scope="module")
def edge(bundle, keys, tmp_path_factory):
    "As in production, but with short times and few files: stage, keys, a host name."
    with launch(
        bundle,
        tmp_path_factory.mktemp("edge"),
        "--env",
        "stage",
        files=256,
        host="api.example.org",
        ALLOWED_HOSTS="api.example.org,*.shop.example",
        API_KEYS=",".join(entry for _, entry in keys.values()),
        HEAD_TIMEOUT_S=1,
        TIMEOUT_S=2,
        MAX_CONCURRENCY=4,
        DEMO="true",
    ) as running:
        yield running


@pytest.fixture
def read(keys):
    return keys["read"][0]


BODY = f"{JSON}Content-Length: 1000"


@pytest.mark.parametrize(
    "method,path,role,lines,status",
    [
        ("POST", "/nothing", None, BODY, 404),
        ("POST", "/nothing", "read", BODY, 404),
        ("POST", "/docs/", None, BODY, 307),
        ("POST", "/docs", None, BODY, 405),
        ("POST", "/metrics", None, BODY, 405),
        ("POST", "/health/live", None, BODY, 405),
        ("PUT", "/demo", None, BODY, 405),
        ("DELETE", "/v1/recommend", "admin", BODY, 405),
        ("GET", "/health/live", None, BODY, 200),
        ("GET", "/v1/recommend/1", "read", BODY, 200),
        ("POST", "/v1/recommend", None, BODY, 401),
        ("POST", "/v1/recommend", "feedback", BODY, 403),
        ("POST", "/v1/events", "read", BODY, 403),
        ("PUT", "/v1/bans/1", "read", BODY, 403),
        ("DELETE", "/v1/users/1", "feedback", BODY, 403),
        ("POST", "/v1/recommend", "read", "Content-Type: text/plain\r\nContent-Length: 1000", 415),
        ("POST", "/v1/recommend", "read", f"{JSON}Content-Length: {MAX_BODY + 1}", 413),
        ("POST", "/v1/recommend", None, f"{JSON}Transfer-Encoding: chunked", 401),
        ("POST", "/nothing", None, f"{JSON}Transfer-Encoding: chunked", 404),
        ("PUT", "/v1/bans/1", "admin", BODY, 200),
    ],
)
def test_answered_by_the_head(edge, keys, method, path, role, lines, status):
    "Not one byte of the body is sent, and the connection does not wait for it."
    began = time.monotonic()
    with edge.connect() as connection:
        connection.sendall(
            edge.head(method, path, lines, "Expect: 100-continue", key=keys[role][0] if role else None).encode()
        )
        got, headers, body = read_answer(connection)  # http.client would skip a 100, which must not come
        took = time.monotonic() - began
        assert got == status and headers["connection"] == "close", (got, headers, body)
        if status >= 400:
            assert headers["content-type"] == "application/problem+json" and json.loads(body)["status"] == status
            assert json.loads(body)["code"] == CODES[status]
        assert took < 1
        assert read_all(connection) == b""
        assert time.monotonic() - began < 5


def test_a_foreign_host_is_refused_by_the_head(edge, read):
    answer = edge.say(edge.head("POST", "/v1/recommend", BODY, host="evil.example", key=read))
    assert answer.startswith(b"HTTP/1.1 421 ") and b'"status":421' in answer


def test_hosts(edge, read):
    def status(host):
        return int(edge.say(edge.head("GET", "/v1/recommend/1", "Connection: close", host=host, key=read)).split()[1])

    assert [
        status(h)
        for h in (
            "api.example.org",
            "API.example.org:8443",
            "a.shop.example",
            "shop.example",
            "localhost",
            "127.0.0.1",
            "evil.example",
            "api.example.org.evil.example",
        )
    ] == [200] * 3 + [421] * 5
    with edge.client(headers={"Host": "10.1.2.3"}) as balancer:
        assert [balancer.get(path).status_code for path in ("/health/live", "/health/ready", "/metrics", "/docs")] == [
            200,
            200,
            421,
            421,
        ]
    assert edge.say(f"GET /v1/recommend/1 HTTP/1.0\r\nX-API-Key: {read}\r\n\r\n").startswith(b"HTTP/1.1 421 ")


def test_no_continue_before_the_key(edge, read):
    head = edge.head("POST", "/v1/recommend", JSON, "Content-Length: 2", "Expect: 100-continue")
    assert b"100 Continue" not in edge.say(head)
    with edge.connect() as connection:
        connection.sendall(
            edge.head("POST", "/v1/recommend", JSON, "Content-Length: 2", "Expect: 100-continue", key=read).encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert read_answer(connection)[0] == 200


def test_bodies_without_a_key_do_not_count(edge, read):
    "Sixty of them, where four requests may be answered at the same time."
    for path in ("/nothing", "/docs", "/v1/recommend"):
        slow = [edge.connect() for _ in range(60)]
        for connection in slow:
            connection.sendall(edge.head("POST", path, BODY).encode())
        with edge.client(read) as client:
            assert {client.get(f"/v1/recommend/{n}").status_code for n in range(10)} == {200}
        for connection in slow:
            connection.close()


def test_a_body_must_arrive(edge, read):
    "Of one with a key too; while four of them are awaited, a fifth request is told to come back."
    slow = [edge.connect() for _ in range(4)]
    for connection in slow:
        connection.sendall((edge.head("POST", "/v1/recommend", BODY, key=read) + "{").encode())
    time.sleep(0.2)
    with edge.client(read) as client:
        busy = client.get("/v1/recommend/1")
        assert (busy.status_code, busy.json()["code"]) == (503, "too_busy")
        assert client.get("/health/live").status_code == 200 and client.get("/metrics").status_code == 200
    began = time.monotonic()
    for connection in slow:
        for byte in b'"k": ':
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    answers = [read_all(connection) for connection in slow]
    assert (
        all(a.startswith(b"HTTP/1.1 408 ") and b"connection: close" in a for a in answers)
        and time.monotonic() - began < 6
    )
    with edge.client(read) as client:
        assert client.get("/v1/recommend/1").status_code == 200


def test_a_chunked_body_is_bounded(edge, read):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = edge.say(
        edge.head("POST", "/v1/recommend", JSON, "Transfer-Encoding: chunked", key=read).encode() + chunk * 40
    )
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_without_its_end_is_not_acted_on(edge, keys):
    "All of the JSON is there, but not the last chunk: the client left, and nothing is stored."
    event = b'[{"event_id": "half", "kind": "feedback", "user_id": 1, "item_id": 2, "value": 1}]'
    with edge.connect() as connection:
        connection.sendall(
            edge.head("POST", "/v1/events", JSON, "Transfer-Encoding: chunked", key=keys["feedback"][0]).encode()
            + b"%x\r\n" % len(event)
            + event
            + b"\r\n"
        )
    time.sleep(0.3)
    with edge.client(keys["feedback"][0]) as client:
        assert client.post("/v1/events", json=json.loads(event)).json()["accepted"] == 1


def test_heads_must_arrive(edge):
    "Silent connections, half a head, a head that drips, and one more head after an answer."
    began = time.monotonic()
    silent, half, drip, second = (edge.connect() for _ in range(4))
    half.sendall(b"GET /health/live HTTP/1.1\r\nHost:")
    drip.sendall(b"GET /health/live HTTP/1.1\r\n")
    second.sendall(edge.head("GET", "/health/live").encode() + b"GET /health")
    closed = {}
    while len(closed) < 4 and time.monotonic() - began < 10:
        for connection in (silent, half, drip, second):
            if connection in closed:
                continue
            connection.settimeout(0.05)
            try:
                if connection is drip:
                    connection.sendall(b"X-a: b\r\n")
                if not connection.recv(65536):
                    closed[connection] = time.monotonic() - began
            except TimeoutError:
                pass
            except OSError:
                closed[connection] = time.monotonic() - began
    assert len(closed) == 4 and max(closed.values()) < 5, closed


def hold(running, n, stop):
    "Keep `n` connections open that have sent half a head, and open those again that are closed."
    open_now = []
    while not stop.is_set():
        while len(open_now) < n and not stop.is_set():
            try:
                connection = socket.create_connection(("127.0.0.1", running.port), timeout=2)
                connection.sendall(b"GET /v1/recommend/1 HTTP/1.1\r\nHost: x\r\n")
                connection.setblocking(False)
                open_now.append(connection)
            except OSError:
                time.sleep(0.05)
        still = []
        for connection in open_now:
            try:
                gone = connection.recv(100) == b""
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                connection.close()
            else:
                still.append(connection)
        open_now = still
        time.sleep(0.05)
    for connection in open_now:
        connection.close()


def ask_meanwhile(running, read, n_held, seconds):
    """Times of requests on fresh connections while others hold many; how much the log has grown; most descriptors of
    the worker.
    """
    before = running.log.stat().st_size
    stop = threading.Event()
    times = []
    files = 0
    holder = threading.Thread(target=hold, args=(running, n_held, stop))
    holder.start()
    time.sleep(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        with running.client(read) as client:
            assert client.get("/v1/recommend/1").status_code == 200
        times.append(time.monotonic() - began)
        files = max(files, running.worker.num_fds())
        time.sleep(0.05)
    stop.set()
    holder.join()
    return times, running.log.stat().st_size - before, files


def test_silent_connections_take_nothing_from_others(edge, read):
    "400 of them against a worker that may open 256 files."
    times, grown, files = ask_meanwhile(edge, read, 400, 4)
    assert max(times) < 1 and grown < 10_000 and files < 256, (max(times), grown, files)
    assert "Too many open files" not in edge.log.read_text() and '"why": "evicted"' in edge.log.read_text()


if STRESS:  # takes a minute

    def test_silent_connections_at_1024_files(bundle, keys, tmp_path):
        """The bar: 1,100 silent connections at a limit of 1,024 descriptors; others are answered within a second, and
        the log grows by less than 100 KB a minute.
        """
        with launch(
            bundle, tmp_path, "--env", "stage", files=1024, API_KEYS=",".join(entry for _, entry in keys.values())
        ) as running:
            times, grown, files = ask_meanwhile(running, keys["read"][0], 1100, 60)
        print(f"{len(times)} requests, slowest {1000 * max(times):.0f} ms, log +{grown} bytes, {files} descriptors")
        assert max(times) < 1 and grown < 100_000 and files < 1024, (max(times), grown, files)


def test_unfinished_heads_take_little_memory(edge, read):
    before = edge.worker.memory_info().rss
    connections = []
    for size in [250_000] * 90 + [500_000] * 60:
        connection = edge.connect()
        connections.append(connection)
        with suppress(OSError):
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\nX-a: " + b"a" * size)
    with edge.client(read) as client:
        assert client.get("/v1/recommend/1").status_code == 200
    grown = (edge.worker.memory_info().rss - before) / 2**20
    for connection in connections:
        connection.close()
    assert grown < 60, f"{grown:.0f} MiB"


def test_the_longest_legal_query_fits(edge, read):
    "Ids of four-byte characters, percent-encoded, as many and as long as they may be."
    name = "%F0%9F%8E%AC" * 200
    path = f"/v1/recommend/{name}?page={'A' * 20_000}" + f"&exclude={name}" * 100
    answer = edge.say(edge.head("GET", path, "Connection: close", f"X-more: {'a' * 10_000}", key=read))
    assert (
        len(path) + 10_000 < MAX_HEAD and answer.startswith(b"HTTP/1.1 422 ") and b"next_page" in answer
    )  # the page is none, all else is well


def test_clients_that_do_not_read(edge, read):
    "Answers that nobody takes are given up, and so is their connection."
    edge.worker.num_fds()
    with edge.client(read) as client:
        client.get("/v1/recommend/1")
    time.sleep(1)
    before = edge.worker.num_fds()
    connections = []
    for _ in range(10):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", edge.port))
        connection.setblocking(False)
        connections.append(connection)
        try:
            for _ in range(200):
                connection.send(edge.head("GET", "/openapi.json").encode() * 20)
        except OSError:
            pass
    time.sleep(0.5)
    assert edge.worker.num_fds() >= before + 10
    with edge.client(read) as client:
        assert client.get("/v1/recommend/1").status_code == 200
    end = time.monotonic() + 20
    while edge.worker.num_fds() >= before + 10 and time.monotonic() < end:
        time.sleep(0.1)
    while edge.worker.num_fds() > before + 1 and time.monotonic() < end:
        time.sleep(0.1)
    left = edge.worker.num_fds()
    for connection in connections:
        connection.close()
    assert left <= before + 1 and '"why": "slow_reader"' in edge.log.read_text()


ODD = {
    "not HTTP": ("hello\r\n\r\n", 400),
    "HTTP/2 preface": ("PRI * HTTP/2.0\r\n\r\n", 421),
    "no Host": ("GET /health/live HTTP/1.1\r\n\r\n", 400),
    "two Hosts": ("GET /health/live HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "two lengths": ("POST /v1/recommend HTTP/1.1\r\nHost: H\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "length and chunks": (
        "POST /v1/recommend HTTP/1.1\r\nHost: H\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        401,
    ),
    "chunks of another kind": (
        "POST /v1/recommend HTTP/1.1\r\nHost: H\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        400,
    ),
    "negative length": ("POST /v1/recommend HTTP/1.1\r\nHost: H\r\nContent-Length: -1\r\n\r\n", 400),
    "zero": ("GET /health/live HTTP/1.1\r\nHost: H\r\nX-a: a\0b\r\n\r\n", 400),
    "blank in a name": ("GET /health/live HTTP/1.1\r\nHost: H\r\nX a: b\r\n\r\n", 400),
    "folded": ("GET /health/live HTTP/1.1\r\nHost: H\r\nX-a: a\r\n b\r\nConnection: close\r\n\r\n", 200),
    "whole address": ("GET http://evil.example/v1/recommend/1 HTTP/1.1\r\nHost: H\r\nConnection: close\r\n\r\n", 404),
    "tunnel": ("CONNECT evil.example:443 HTTP/1.1\r\nHost: H\r\nConnection: close\r\n\r\n", 404),
    "star": ("OPTIONS * HTTP/1.1\r\nHost: H\r\nConnection: close\r\n\r\n", 404),
    "HTTP/1.0": ("GET /health/live HTTP/1.0\r\n\r\n", 200),
    "many headers": ("GET /health/live HTTP/1.1\r\nHost: H\r\n" + "a:\r\n" * 60_000 + "\r\n", 400),
    "too long": ("GET /health/live HTTP/1.1\r\nHost: H\r\nX-a: " + "a" * 400_000, 400),
    "WebSocket": (
        (
            "GET /v1/recommend/1 HTTP/1.1\r\nHost: H\r\nConnection: Upgrade, close\r\nUpgrade: "
            "websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        ),
        401,
    ),
    "WebSocket to nothing": ("GET /ws HTTP/1.1\r\nHost: H\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 404),
    "HTTP/2 upgrade": (
        (
            "GET /health/live HTTP/1.1\r\nHost: H\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: "
            "h2c\r\nHTTP2-Settings: AAA\r\n\r\n"
        ),
        200,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_requests(edge, name):
    "Each has one answer with the security headers, and ends."
    text, status = ODD[name]
    began = time.monotonic()
    answer = edge.say(text.replace("Host: H", f"Host: {edge.host}"))
    assert int(answer.split()[1]) == status and answer.count(b"HTTP/1.1 ") == 1 and b"nosniff" in answer, answer[:300]
    assert time.monotonic() - began < 5


def test_random_bytes(edge, read):
    "Requests, most of them damaged at random places, are answered with 2xx, 3xx or 4xx, and leave no traceback."
    rng = np.random.default_rng(0)
    whole = [
        edge.head("GET", "/v1/recommend/1?k=3", "Connection: close", key=read).encode(),
        edge.head("POST", "/v1/recommend", JSON, "Content-Length: 16", "Connection: close", key=read).encode()
        + b'{"history": [5]}',
        edge.head("POST", "/v1/recommend", JSON, "Transfer-Encoding: chunked", "Connection: close", key=read).encode()
        + b'10\r\n{"history": [5]}\r\n0\r\n\r\n',
        edge.head(
            "PUT", "/v1/bans/1", "Expect: 100-continue", "Content-Length: 3", "Connection: close", key=read
        ).encode(),
    ]
    pieces = [
        b"\r\n",
        b"\n",
        b"\0",
        b" ",
        b":",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 3\r\n",
        b"Upgrade: h2c\r\n",
        b"%00",
        b"\xff",
        b"A" * 3000,
        b"0\r\n\r\n",
        b"ffffffffff\r\n",
        b"HTTP/1.0",
        b"Connection: keep-alive\r\n",
    ]
    seen = set()
    for _ in range(5000 if STRESS else 200):
        text = bytearray(whole[rng.integers(len(whole))])
        for _ in range(rng.integers(0, 4)):
            at = int(rng.integers(len(text)))
            if rng.random() < 0.5:
                text[at:at] = pieces[rng.integers(len(pieces))]
            else:
                del text[at : at + int(rng.integers(1, 20))]
        with edge.connect() as connection:
            with suppress(OSError):
                connection.sendall(text)
            seen |= {int(status) for status in re.findall(rb"HTTP/1\.1 (\d\d\d)", read_all(connection, seconds=0.1))}
    with edge.client(read) as client:
        assert client.get("/v1/recommend/1").status_code == 200
    assert {200, 400} <= seen and max(seen) < 500 and "Traceback" not in edge.log.read_text(), (
        seen,
        edge.log.read_text()[-2000:],
    )


def test_many_headers_hold_up_nobody(edge):
    worst = [0.0]
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            edge.say("GET / HTTP/1.1\r\nHost: x\r\n" + "a:\r\n" * 60_000 + "\r\n")

    thread = threading.Thread(target=flood)
    thread.start()
    with edge.client() as client:
        for _ in range(30):
            began = time.monotonic()
            client.get("/health/live")
            worst[0] = max(worst[0], time.monotonic() - began)
    stop.set()
    thread.join()
    assert worst[0] < 0.5, worst  # on a machine with nothing else to do a few milliseconds


def test_pipelined_requests_are_answered_in_order(edge):
    text = "".join(edge.head("GET", "/health/live", f"X-Request-ID: n{n}") for n in range(50))
    answer = edge.say(text + edge.head("GET", "/health/live", "Connection: close"))
    assert re.findall(rb"x-request-id: n(\d+)", answer) == [str(n).encode() for n in range(50)]


def test_security_headers_everywhere(edge, read):
    with edge.client(read) as client:
        answers = [
            client.get("/v1/recommend/1"),
            client.get("/v1/recommend/1?k=0"),
            client.get("/nothing"),
            client.post("/docs"),
            client.get("/health/live"),
            client.get("/metrics"),
            client.get("/openapi.json"),
            client.get("/version"),
            client.get("/demo/start"),
            client.get("/v1/recommend/1", headers={"X-API-Key": "wrong"}),
            client.get("/v1/recommend/1", headers={"Host": "evil.example"}),
            client.post("/v1/recommend", content="{", headers={"Content-Type": "application/json"}),
        ]
        pages = [client.get("/demo"), client.get("/docs")]
    assert [a.status_code for a in answers] == [200, 422, 404, 405, 200, 200, 200, 200, 200, 401, 421, 400] and [
        p.status_code for p in pages
    ] == [200, 200]
    for a in answers + pages:
        assert (
            a.headers["x-content-type-options"] == "nosniff"
            and a.headers["referrer-policy"] == "no-referrer"
            and a.headers["x-frame-options"] == "DENY"
            and a.headers["cache-control"] == "no-store"
            and a.headers["x-request-id"]
        ), a.url
        assert "server" not in a.headers
    for a in answers:
        assert a.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    for p in pages:
        policy = dict(part.strip().split(" ", 1) for part in p.headers["content-security-policy"].split(";"))
        assert (
            policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            and "sha256-" in policy["script-src"]
            and "unsafe" not in p.headers["content-security-policy"]
        )


def test_wrong_keys_are_limited(edge, read):
    with edge.client() as client:
        refused = [client.get("/v1/recommend/1", headers={"X-API-Key": f"guess{n}"}) for n in range(60)]
        codes = {(a.status_code, a.json()["code"]) for a in refused}
        assert (
            codes == {(401, "unauthorized"), (429, "too_many_wrong_keys")}
            and client.get("/v1/recommend/1", headers={"X-API-Key": ""}).status_code == 401
        )
        assert (
            client.get("/v1/recommend/1", headers={"X-API-Key": read}).status_code == 200
        )  # others' guesses take nothing from a valid key
    time.sleep(1)


def test_requests_without_a_key_are_bounded(edge, read):
    "Many scrapes at the same time do not take the threads from those that have a key."
    text = edge.head("GET", "/metrics").encode()
    connections = [edge.connect() for _ in range(60)]
    for connection in connections:
        connection.sendall(text)
    statuses = [read_answer(connection)[0] for connection in connections]
    for connection in connections:
        connection.close()
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 8


@pytest.fixture(scope="module")
def limited(bundle, tmp_path_factory):
    with launch(bundle, tmp_path_factory.mktemp("limited"), "--env", "test", RATE_LIMIT=5) as running:
        yield running


def test_forwarded_for_counts_for_nothing(limited):
    with limited.client() as client:
        time.sleep(1)
        statuses = [
            client.get("/v1/recommend/1", headers={"X-Forwarded-For": f"10.0.0.{n}"}).status_code for n in range(40)
        ]
    assert statuses.count(200) <= 15 and 429 in statuses


def test_a_batch_takes_as_many_tokens_as_it_has_requests(limited):
    with limited.client() as client:
        time.sleep(1.1)
        assert (
            client.post("/v1/recommend:batch", json={"requests": [{"user_id": n} for n in range(20)]}).status_code
            == 200
        )
        again = client.get("/v1/recommend/1")
        assert again.json()["code"] == "rate_limited"
        assert again.status_code == 429 and 2 <= int(again.headers["retry-after"]) <= 4  # 16 tokens at 5 a second
        time.sleep(3.5)
        assert client.get("/v1/recommend/1").status_code == 200


def test_forwarded_for_of_a_trusted_proxy(bundle, tmp_path):
    with (
        launch(bundle, tmp_path, "--env", "test", RATE_LIMIT=5, TRUSTED_PROXIES="127.0.0.1") as running,
        running.client() as client,
    ):

        def status(forwarded):
            return client.get("/v1/recommend/1", headers={"X-Forwarded-For": forwarded}).status_code

        assert {status(f"10.0.0.{n}") for n in range(40)} == {200}
        assert 429 in [
            status(f"198.51.100.{n}, 10.9.9.9") for n in range(40)
        ]  # the last address is the one that the proxy wrote
        assert 429 in [status(f"2001:db8:0:1::{n}") for n in range(1, 40)]  # one network


def start(ready_file, *words):
    "Code and place of the error that keeps it from starting."
    with pytest.raises(SystemExit) as ended:
        serving_main([*words, "--env", "test", "--port", "0", "--ready-file", str(ready_file)])
    error = json.loads(ready_file.read_text())["error"]
    assert error["message"] in str(ended.value)
    return error["code"], error["where"]


def test_refuses_to_start(tmp_path, monkeypatch, capsys):
    for name in [n for n in os.environ if n.startswith("AEREC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AEREC_PATHS__VAR_DIR", str(tmp_path / "var"))
    words = [tmp_path / "ready.json", "--bundle", str(tmp_path / "none")]
    no_bundle = start(*words)
    exposed = ("exposed_without_keys", "serving.host")
    assert start(*words, "--host", "0.0.0.0") == exposed != no_bundle
    assert start(*words, "--host", "0.0.0.0", "--allow-unauthenticated") == no_bundle  # it gets as far as the bundle
    monkeypatch.setenv("AEREC_SERVING__ALLOW_UNAUTHENTICATED", "true")
    assert start(*words, "--host", "0.0.0.0") == no_bundle
    monkeypatch.delenv("AEREC_SERVING__ALLOW_UNAUTHENTICATED")
    assert start(*words, "--host", "not a host") == ("invalid_host", "serving.host")
    with monkeypatch.context() as m:
        m.setenv("AEREC_SERVING__TRUSTED_PROXIES", "*")
        assert start(*words) == ("invalid_address", "serving.trusted_proxies")
    with monkeypatch.context() as m:
        m.setenv("AEREC_SERVING__ALLOWED_HOSTS", "http://a.example")
        assert start(*words) == ("invalid_host", "serving.allowed_hosts")
    with monkeypatch.context() as m:
        m.setattr(resource, "getrlimit", lambda what: (100, 100))
        m.setattr(resource, "setrlimit", lambda what, limits: None)
        assert start(*words) == ("too_few_open_files", "ulimit -n")
    assert aerec_main(["serve", "--host", "0.0.0.0", "--env", "test"]) == 2
    assert "0.0.0.0" in capsys.readouterr().err
    assert aerec_main(["serve", "--host", "0.0.0.0", "--allow-unauthenticated", "--env", "test"]) == 2
    assert "0.0.0.0" not in capsys.readouterr().err  # it gets as far as the alias


def test_stopping_with_connections_open(bundle, tmp_path):
    "Idle connections, half heads and unread answers do not keep it from stopping."
    with launch(bundle, tmp_path, "--env", "test") as running:
        idle, half, refused = (running.connect() for _ in range(3))
        half.sendall(b"GET / HTTP/1.1\r\n")
        refused.sendall(running.head("POST", "/nothing", BODY).encode())
        idle.sendall(running.head("GET", "/health/live").encode())
        assert read_answer(idle)[0] == 200 and read_answer(refused)[0] == 404
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert (
            running.process.wait(20) == 0 and time.monotonic() - began < MAX_WAIT
        )  # which it would take if it waited for one of them
