"""Monitors against the truth of a simulator: every fault is noticed, clean traffic is left in peace, numbers are right,
and whoever must know is told.
"""

import http.server
import json
import logging
import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pandas as pd
import pytest
from conftest import STRESS
from scipy.sparse import csr_matrix

from aerec_nb.core.settings import load_settings
from aerec_nb.data.event_log import EventLog
from aerec_nb.data.events import new_event
from aerec_nb.data_import import load_ratings
from aerec_nb.inference import Recommender
from aerec_nb.models.registry import create_model
from aerec_nb.monitoring import (
    COLORS,
    FAULTS,
    MONITORS,
    AlertBook,
    Visitors,
    Window,
    drift,
    events_of,
    evidence_items,
    evidence_requests,
    evidence_segments,
    exposition,
    ground_truth,
    grown_ratings,
    ips,
    make_traffic,
    make_window,
    measure_window,
    monitor,
    monitor_trend,
    prometheus_rules,
    psi,
    ratings_from_events,
    register,
    report_html,
    retrain_decision,
    run_monitors,
    share,
    simulate_traffic,
    watch,
)
from aerec_nb.packaging import Registry, load_bundle, save_bundle
from aerec_nb.postprocessing import Chain
from aerec_nb.testing import raised, test_error

DAY = 86400.0
NOW = 1.7e9
SETTINGS = load_settings("test", window_hours=24.0).monitoring


def world(seed=0, n_users=600, n_items=400, **kw):
    "Six hundred people with tastes, four hundred items with a long tail."
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=(n_users, 6))
    item = rng.normal(size=(n_items, 6))
    likes = 0.8 * taste @ item.T - 0.9 * np.log(np.arange(1, n_items + 1)) + rng.gumbel(size=(n_users, n_items))
    x = np.zeros((n_users, n_items), np.float32)
    for u in range(n_users):
        x[u, np.argsort(-likes[u])[: rng.integers(8, 60)]] = 1
    x = csr_matrix(x)
    table = pd.DataFrame(
        {
            "item_id": np.arange(n_items) + 1000,
            "title": [f"Item {i}" for i in range(n_items)],
            "genres": [f"g{i}" for i in np.argmax(item, 1)],
        }
    )
    return Recommender(
        create_model("ease", lam=20.0).fit(x),
        np.arange(n_items) + 1000,
        [f"u{i}" for i in range(n_users)],
        x,
        chain=Chain(banned_items=[1003, 1100]),
        item_table=table,
        **kw,
    )


@pytest.fixture(scope="module")
def recommender():
    return world()


@pytest.fixture(scope="module")
def visitors(recommender):
    return [Visitors(recommender, 300, seed=i) for i in range(4)]


def look(visitors, seed, faults=(), n=1000):
    "Two days: the first is the reference; on the second, with other people of the same town, something may be broken."
    before = make_traffic(visitors[seed % 4], n, seed=2 * seed, now=NOW - DAY)
    now = make_traffic(visitors[(seed + seed // 4) % 4], n, seed=2 * seed + 1, now=NOW, faults=faults, prefix="b")
    return run_monitors(events_of([before, now]), visitors[0].recommender, SETTINGS, now=NOW)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_noticed_by_the_right_monitor(fault, visitors):
    n = 20 if STRESS else 3
    tables = [look(visitors, 100 + seed, (fault,)) for seed in range(n)]
    noticed = [bool(set(t[t.status == "firing"].monitor) & set(FAULTS[fault])) for t in tables]
    assert sum(noticed) >= n - (n == 20), f"{sum(noticed)} of {n}"


def test_clean_traffic_is_left_in_peace(visitors):
    n = 200 if STRESS else 20
    fired = [sorted(t[t.status == "firing"].monitor) for t in (look(visitors, seed) for seed in range(n))]
    assert sum(map(bool, fired)) <= 0.02 * n, [f for f in fired if f]


@pytest.mark.parametrize("seed", range(10 if STRESS else 3))
def test_the_numbers_are_those_of_the_truth(recommender, visitors, tmp_path, seed):
    traffic = make_traffic(
        visitors[seed % 4],
        500,
        seed=seed,
        now=NOW,
        explore=0.3,
        impressions=bool(seed % 2),
        faults=[(), ("banned_item",), ("feedback_outage",)][seed % 3],
        error_share=0.03,
    )
    log = EventLog(tmp_path / "events.db")
    for start in range(0, len(traffic.events), 3000):
        log.append(traffic.events[start : start + 3000])
    truth = ground_truth(traffic, recommender, NOW - 60 * SETTINGS.attribution_window_minutes)
    for source in (log, events_of(traffic)):
        found = run_monitors(source, recommender, SETTINGS, now=NOW).set_index("monitor").value
        assert len(truth) >= 13 and max(abs(found[name] - value) for name, value in truth.items()) < 1e-9, {
            n: (found[n], v) for n, v in truth.items()
        }
    log.close()


def test_a_part_of_a_window_is_the_window_of_its_events(recommender, visitors):
    traffic = make_traffic(visitors[0], 600, seed=3, now=NOW, explore=0.2, arms={"a": 0.5, "b": 0.5})
    whole = Window(events_of(traffic), recommender, NOW)
    for begin, end in ((NOW - DAY, NOW - DAY / 2), (NOW - DAY / 3, NOW), (NOW, NOW + 1)):
        kept = {e["request_id"] for e in traffic.events if e["kind"] == "request" and begin <= e["time"] < end}
        alone = Window(
            events_of(type(traffic)([e for e in traffic.events if e["request_id"] in kept], None, None, True)),
            recommender,
            end,
        )
        part = whole.between(begin, end)
        part.begin = alone.begin
        pd.testing.assert_frame_equal(measure_window(part, SETTINGS), measure_window(alone, SETTINGS))
        assert part.id_of(np.arange(len(part.requests))) == [
            e["request_id"] for e in traffic.events if e["request_id"] in kept and e["kind"] == "request"
        ]


@pytest.mark.xdist_group("postgres")
def test_the_same_from_postgres(recommender, visitors, fresh_database):
    traffic = make_traffic(visitors[1], 200, seed=5, now=NOW)
    log = EventLog(fresh_database)
    log.append(traffic.events)
    pd.testing.assert_frame_equal(
        run_monitors(log, recommender, SETTINGS, now=NOW),
        run_monitors(events_of(traffic), recommender, SETTINGS, now=NOW),
    )
    log.close()


def test_counterfactual_estimates_find_what_the_model_would_have_had(recommender, visitors):
    """Over many days the estimates lie around the truth: looking at the last place times how much the model's own
    choice there is liked.
    """
    v = visitors[0]
    own = []
    found = []
    for seed in range(12):
        traffic = make_traffic(v, 400, seed=seed, now=NOW, explore=0.5, error_share=0.0)
        drawn = traffic.places[traffic.places.propensity < 1]
        user = pd.Series(np.arange(len(v.rows)), v.rows)[traffic.requests.user[drawn.request]].to_numpy()
        own.append((v.likes[user, v.lists[user, -1]] / np.log2(v.k + 1)).mean())
        found.append(ips(drawn.clicked, drawn.propensity, drawn.propensity >= 0.5))
    own = np.array(own)
    found = np.array(found)
    for estimate in found.T:
        apart = estimate - own
        assert abs(apart.mean()) < 4 * apart.std(ddof=1) / np.sqrt(len(own)), (own.mean(), estimate.mean())


def test_drift_neither_cries_wolf_nor_sleeps():
    rng = np.random.default_rng(0)
    few = [
        drift(rng.multinomial(10, [0.4, 0.3, 0.2, 0.1], 40), rng.multinomial(10, [0.4, 0.3, 0.2, 0.1], 40)).low
        for _ in range(60)
    ]
    assert max(few) < 0.01, "a small sample is not drift"
    many = drift(
        rng.multinomial(10, [0.40, 0.30, 0.20, 0.10], 20_000),
        rng.multinomial(10, [0.41, 0.29, 0.20, 0.10], 20_000),
        psi,
    )
    assert many.value < 0.01, "a sure difference may be a small one"
    heavy = np.zeros((30, 4))
    heavy[0] = [5000, 0, 0, 0]
    heavy[1:] = rng.multinomial(10, [0.4, 0.3, 0.2, 0.1], 29)
    assert drift(rng.multinomial(10, [0.4, 0.3, 0.2, 0.1], 30), heavy).low < 0.1, (
        "one busy person is not a town that has changed"
    )
    assert (
        drift(rng.multinomial(10, [0.4, 0.3, 0.2, 0.1], 100), rng.multinomial(10, [0.1, 0.2, 0.3, 0.4], 100)).low > 0.05
    )


def test_a_retrained_model_is_compared_user_by_user(tmp_path):
    from aerec_nb.monitoring import _paired_difference, offline_metric

    rng = np.random.default_rng(0)
    users = [f"u{i}" for i in range(300)]
    hard = rng.random(300)
    for name, worse in (("new", 0.02), ("old", 0.0)):
        (tmp_path / name / "validation").mkdir(parents=True)
        value = hard - worse + rng.normal(0, 0.02, 300)
        table = pd.concat(
            [
                pd.DataFrame({"model": m, "on": on, "user_id": users, "ndcg@10": v})
                for m, on, v in (
                    ("ease", "test", value),
                    ("ease", "valid", value * 0),
                    ("popularity", "test", value * 0),
                )
            ]
        )
        table.sample(frac=1, random_state=0).to_parquet(tmp_path / name / "validation" / "per_user.parquet")
        (tmp_path / name / "validation" / "choice.json").write_text(json.dumps({"k": 10, "model": "ease"}))
    found = _paired_difference(tmp_path / "new", tmp_path / "old", "test NDCG@10")
    assert found["users"] == 300 and found["low"] < -0.02 < found["high"] < -0.01, (
        "people differ by thirty times as much as the models: only pairs see it"
    )

    class W:
        recommender = world(n_users=20, n_items=30, info={"card": {"headline": {"value": 0.48}}})
        last = {"value": 0.5, "paired": found}

    figure = offline_metric(W)
    assert abs(figure.value - 0.04) < 1e-12 and 0.02 < figure.low < figure.high < 0.06 and figure.n == 300
    assert _paired_difference(tmp_path / "new", tmp_path / "nowhere", "test NDCG@10") is None


def test_payloads_that_nobody_expects(recommender):
    odd = [
        {},
        {"items": "none"},
        {"items": [1000, None, {"a": 1}], "scores": [1.0]},
        {"items": [1000, 1001], "scores": [1, "x"]},
        {"status": "fast", "ms": "slow"},
        {"items": [], "k": None},
        {"history": 5, "propensities": {"x": 1, "99": 0.5, "1": 0.5}, "items": ["1000"]},
        {"items": [999_999, "1001"], "scores": [None, None], "version": 5, "arm": {"x": 1}},
    ]
    from aerec_nb.monitoring import COLUMNS, check_event

    rows = [
        {**check_event(new_event("request", time=NOW - 9, user_id=None if n % 2 else "u1")), "payload": p}
        for n, p in enumerate(odd)
    ] + [
        {**check_event(new_event("feedback", time=NOW)), "payload": {}},
        {**check_event(new_event("impression", time=NOW, request_id="?", item_id="?")), "payload": {}},
    ]
    table = run_monitors(pd.DataFrame(rows, columns=list(COLUMNS)), recommender, SETTINGS, now=NOW)
    assert table.set_index("monitor").cases["errors"] == len(odd)


def test_real_and_simulated_never_mix(recommender, tmp_path):
    settings = load_settings(
        "test",
        events_url=f"sqlite:///{tmp_path}/events.db",
        runs_dir=str(tmp_path / "runs"),
        var_dir=str(tmp_path / "var"),
        window_hours=24.0,
    )
    log = EventLog(tmp_path / "events.db")
    simulate_traffic(recommender, log, n_users=50, n_requests=200, faults=["banned_item"])
    assert log.read(simulated=False).empty and set(monitor(settings, recommender, say=lambda _: None).status) == {
        "no data"
    }
    assert watch(settings, recommender, once=True, say=lambda _: None) == 0
    test_error(lambda: ratings_from_events(log), "empty_data", log.url)
    assert len(ratings_from_events(log, simulated=True)) > 100
    log.close()


# --- alerts


class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(500 if self.server.broken else 204)
        self.end_headers()
        if not self.server.broken:
            self.server.got.append(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hook():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.got = []
    server.broken = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_watch_tells_log_file_webhook_and_exit_code(recommender, tmp_path, hook, monkeypatch, caplog):
    monkeypatch.setenv(
        "AEREC_MONITORING__WEBHOOK_URL", f"http://127.0.0.1:{hook.server_address[1]}/alerts?token=s3cret"
    )
    settings = load_settings(
        "test",
        events_url=f"sqlite:///{tmp_path}/events.db",
        runs_dir=str(tmp_path / "runs"),
        var_dir=str(tmp_path / "var"),
        window_hours=24.0,
        retention_days=30.0,
    )
    assert "s3cret" not in repr(settings)
    log = EventLog(tmp_path / "events.db")
    said = []

    def once():
        return watch(settings, recommender, once=True, say=said.append)

    def lists(n, items, at=0):
        log.append(
            [
                new_event(
                    "request",
                    request_id=f"q{time.time()}-{i}",
                    user_id=f"u{i}",
                    time=time.time() + at,
                    payload={"status": 200, "ms": 3.0, "k": 1, "items": items, "exclude_seen": False},
                )
                for i in range(n)
            ],
            now=time.time() + at,
        )

    lists(30, [1200])
    lists(2, [1200], at=-40 * DAY)
    with caplog.at_level(logging.INFO, logger="aerec_nb"):
        assert once() == 0 and hook.got == []
        assert log.count() == 30, "what is older than events.retention_days is gone"
        lists(3, [1003])
        hook.broken = True
        assert once() == 3 and hook.got == [], "a critical one fires at once; the hook is away"
        assert (tmp_path / "var/alerts.jsonl").read_text().count("\n") == 1, "the file does not wait for the hook"
        hook.broken = False
        assert once() == 3
    assert [(g["monitor"], g["state"], g["env"]) for g in hook.got] == [("ban violations", "firing", "test")], (
        "told once, when it could be told"
    )
    log.delete_older_than(time.time() + 1)
    lists(30, [1200])
    with caplog.at_level(logging.INFO, logger="aerec_nb"):
        codes = [once(), once(), once()]
    assert codes == [3, 0, 0] and [g["state"] for g in hook.got] == ["firing", "resolved"]
    assert [json.loads(line)["state"] for line in (tmp_path / "var/alerts.jsonl").read_text().splitlines()] == [
        "firing",
        "resolved",
    ]
    told = [r for r in caplog.records if getattr(r, "alert_monitor", None) == "ban violations"]
    assert [(r.alert_state, r.levelname) for r in told] == [("firing", "CRITICAL"), ("resolved", "INFO")]
    assert all("s3cret" not in r.getMessage() for r in caplog.records) and len(said) == 6
    log.close()


def test_what_was_shown_before_it_was_banned_is_no_violation(recommender, tmp_path):
    def settings(banned):
        return load_settings(
            "test",
            events_url=f"sqlite:///{tmp_path}/events.db",
            runs_dir=str(tmp_path / "runs"),
            var_dir=str(tmp_path / "var"),
            window_hours=24.0,
            banned_items=banned,
            blocklist_file="",
        )

    log = EventLog(tmp_path / "events.db")

    def lists():
        log.append(
            [
                new_event(
                    "request", user_id="u1", payload={"status": 200, "items": [1200], "k": 1, "exclude_seen": False}
                )
            ]
        )

    lists()
    assert watch(settings([]), recommender, once=True, say=lambda _: None) == 0
    assert watch(settings([1200]), recommender, once=True, say=lambda _: None) == 0, "it was shown a moment before"
    lists()
    assert watch(settings([1200]), recommender, once=True, say=lambda _: None) == 3, (
        "and now it is shown although it is banned"
    )
    log.close()


def test_whoever_was_forgotten_is_a_stranger(recommender, tmp_path):
    log = EventLog(tmp_path / "events.db")
    user = recommender.users[0]
    owned = recommender.items[recommender.histories[0].indices[0]]

    def ask(at):
        log.append(
            [new_event("request", user_id=user, time=NOW + at, payload={"status": 200, "items": [owned], "k": 1})]
        )

    def seen():
        return run_monitors(log, recommender, SETTINGS, now=NOW + 20).set_index("monitor").value["seen violations"]

    ask(0)
    assert seen() == 1
    assert log.delete_user(user, now=NOW + 5) == 1
    ask(10)
    assert seen() == 0, "nothing is known of them any more, so nothing can be seen"
    log.close()


def test_a_watch_survives_a_log_that_is_away(recommender, tmp_path, caplog):
    (tmp_path / "not.db").write_bytes(b"no database at all, but long enough to look like one" * 9)
    settings = load_settings(
        "test",
        events_url=f"sqlite:///{tmp_path}/not.db",
        runs_dir=str(tmp_path / "runs"),
        var_dir=str(tmp_path / "var"),
    )
    stop = threading.Event()
    threading.Timer(0.6, stop.set).start()
    assert watch(settings, recommender, interval=0.2, stop=stop, say=lambda _: None) == 1
    assert sum(r.levelname == "ERROR" for r in caplog.records) >= 2
    test_error(lambda: watch(settings, recommender, once=True), "damaged", f"sqlite:///{tmp_path}/not.db")


def test_alerts_do_not_flap(tmp_path):
    "A number that dances around its limit for a hundred looks: one call, however it dances."

    def table(status, severity):
        return pd.DataFrame(
            [{"monitor": "x", "value": 1.0, "threshold": 1.0, "status": status, "severity": severity, "definition": ""}]
        )

    rng = np.random.default_rng(0)
    for severity, most in (("critical", 1), ("warning", 1)):
        book = AlertBook(tmp_path / f"{severity}.json")
        changes = []
        for n in range(100):
            changes += book.look(table("firing" if n % 2 == 0 else "ok", severity), SETTINGS, now=n)
        assert len([c for c in changes if c["state"] == "firing"]) <= most and not [
            c for c in changes if c["state"] == "resolved"
        ]
    book = AlertBook(tmp_path / "random.json")
    changes = []
    for n in range(300):
        changes += book.look(
            table("firing" if rng.random() < 0.1 else "ok", "warning"),
            SETTINGS.model_copy(update={"fire_after_checks": 3}),
            now=n,
        )
    assert len(changes) <= 2


def test_prometheus_takes_the_rules_and_the_gauges(recommender, visitors, tmp_path):
    if not shutil.which("promtool"):
        if os.environ.get("CI"):
            pytest.fail("promtool is missing (Debian: apt-get install prometheus)")
        pytest.skip("no promtool here (Debian: apt-get install prometheus)")

    @register('an "own" \\ one', "max_churn", "above", "warning", "mine", 'says "hello"\nand \\ goodbye')
    def own(w):
        return share(w.requests.status > 0)

    try:
        (tmp_path / "rules.yml").write_text(prometheus_rules(SETTINGS))
        (tmp_path / "gauges.prom").write_text(exposition(look(visitors, 7, ("slow_answers",), 200)))
    finally:
        del MONITORS['an "own" \\ one']
    checked = subprocess.run(
        ["promtool", "check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yml"],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0 and f"SUCCESS: {9 + len(MONITORS) + 2} rules found" in checked.stdout, (
        checked.stdout + checked.stderr
    )
    gauges = subprocess.run(
        ["promtool", "check", "metrics"], input=(tmp_path / "gauges.prom").read_bytes(), capture_output=True
    )
    assert gauges.returncode == 0, gauges.stderr
    series = [
        {"series": 'aerec_http_requests_total{route="/v1/recommend",status="200"}', "values": "0+90x30"},
        {"series": 'aerec_http_requests_total{route="/v1/recommend",status="500"}', "values": "0+10x30"},
        {"series": 'aerec_info{model="ease",version="a"}', "values": "1x30"},
        {"series": 'aerec_monitor_firing{monitor="ban violations",severity="critical"}', "values": "0x10 1x20"},
    ]
    cases = [
        {
            "interval": "1m",
            "input_series": series,
            "alert_rule_test": [
                {
                    "eval_time": "20m",
                    "alertname": "aerec_errors",
                    "exp_alerts": [
                        {
                            "exp_labels": {"severity": "critical"},
                            "exp_annotations": {"summary": MONITORS["errors"].definition},
                        }
                    ],
                },
                {"eval_time": "5m", "alertname": "aerec_monitor_ban_violations", "exp_alerts": []},
                {"eval_time": "20m", "alertname": "aerec_several_versions", "exp_alerts": []},
                {
                    "eval_time": "20m",
                    "alertname": "aerec_monitor_ban_violations",
                    "exp_alerts": [
                        {
                            "exp_labels": {"severity": "critical", "monitor": "ban violations"},
                            "exp_annotations": {"summary": MONITORS["ban violations"].definition},
                        }
                    ],
                },
            ],
        }
    ]
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": ["rules.yml"], "tests": cases}))
    tested = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


# --- report and loop


def test_the_report_is_one_page_with_the_lights_on_top(recommender, visitors):
    traffic = [
        make_traffic(visitors[0], 400, seed=1, now=NOW - DAY),
        make_traffic(visitors[0], 400, seed=2, now=NOW, faults=["banned_item"], prefix="b"),
    ]
    window = make_window(events_of(traffic), recommender, SETTINGS, NOW)
    table = measure_window(window, SETTINGS)
    trend = monitor_trend(window, recommender, 6)
    evidence = {
        "requests": evidence_requests(window),
        "segments": evidence_segments(window),
        "items": evidence_items(window),
    }
    assert (evidence["requests"].what == "banned item").sum() == 5 and evidence["requests"].request_id.str.contains(
        "-b2-"
    ).all()
    assert (
        evidence["segments"].lists.iloc[0] == window.is_answered.sum()
        and evidence["segments"].lists.iloc[1:5].sum() == window.is_answered.sum()
    )
    page = report_html(table, trend, evidence, "simulated visitors")
    lights, *parts = page.split("<h2>")
    assert COLORS["firing"] in lights and len(parts) == 5, "the lights come first"
    assert 'src="data:image/png' in parts[0], "then how each number moved"
    assert all(f">{name}</td>" in parts[1] for name in evidence["segments"].segment), "then the groups of users"
    assert (
        page.count("<html") == 1
        and 'src="data:image/png' in page
        and "http" not in page
        and "ban violations <small>(critical)" in page
    )
    assert all(f"<td class=text>{m}</td>" in page for m in table.monitor) and not page.count("{lights}")


def test_the_loop_closes(recommender, visitors, tmp_path):
    """Feedback of a rehearsal becomes ratings, a model is trained on both, is packed, registered and promoted through
    the gates; a worse one is not.
    """
    log = EventLog(tmp_path / "events.db")
    for seed in range(3):
        log.append(make_traffic(visitors[seed], 1500, seed=seed, now=NOW - seed * DAY, impressions=False).events)
    new = ratings_from_events(log, {"click": 1.0}, simulated=True)
    old = recommender.histories.tocoo()
    ratings = pd.DataFrame(
        {
            "user_id": [recommender.users[u] for u in old.row],
            "item_id": [recommender.items[i] for i in old.col],
            "timestamp": 10**9,
        }
    )
    both = load_ratings(grown_ratings(ratings, new))
    assert len(ratings) < len(both) <= len(ratings) + len(new) and both.item_id.dtype == ratings.item_id.dtype
    table = run_monitors(log, recommender, SETTINGS, now=NOW)
    decision = retrain_decision(table, recommender, len(new), SETTINGS)
    assert decision.retrain and [reason.code for reason in decision.reasons] == ["new_feedback"], decision
    assert f"{len(new):,}" in decision.reasons[0].message
    assert not retrain_decision(table, recommender, 3, SETTINGS).retrain
    drifted = retrain_decision(look(visitors, 3, ("worse_model",)), recommender, 0, SETTINGS).reasons
    assert [reason.code for reason in drifted] == ["drift"] and "CTR" in drifted[0].message
    users = sorted(set(both.user_id))
    items = recommender.items
    x = csr_matrix(
        (
            np.ones(len(both), np.float32),
            (pd.Index(users).get_indexer(both.user_id), pd.Index(items).get_indexer(both.item_id)),
        ),
        shape=(len(users), len(items)),
    )
    retrained = Recommender(
        create_model("ease", lam=20.0).fit(x), items, users, x, chain=Chain(banned_items=[1003, 1100])
    )
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", tmp_path / "bundles")

    def headline(value):
        return {
            "headline": {"metric": "ndcg@10", "value": value, "se": 0.01, "data": "visitors", "split": "leave_last"}
        }

    first, second, worse = (
        registry.register(save_bundle(r, tmp_path / f"bundle{n}", headline(value)))
        for n, (r, value) in enumerate(((recommender, 0.2), (retrained, 0.21), (retrained, 0.1)))
    )
    for version in (first, second):
        moved = registry.promote(version, "stage", by="ann", why="retrained")
    assert registry.current("stage") == second and moved.gates.set_index("gate").result.to_dict() == dict.fromkeys(
        ("golden requests", "metric", "latency", "size"), "passed"
    )
    raised(lambda: registry.promote(worse, "stage", by="ann", why="retrained"))
    gates = registry.check_gates(worse, "stage").set_index("gate").result
    assert gates["metric"] == "failed" and registry.current("stage") == second
    assert registry.history().action.iloc[-1] == "refuse"
    live = load_bundle(registry.resolve("stage"))
    assert live.histories.nnz == len(both)
    again = run_monitors(log, live, SETTINGS, now=NOW, previous=load_bundle(registry.resolve(first))).set_index(
        "monitor"
    )
    assert (
        again.status["overlap"] == "ok"
        and 0.05 < again.value["overlap"] < 1
        and again.value["golden requests"] == 0
        and again.value["model age"] == 0
    )
    log.close()


def test_what_the_service_writes_is_understood(recommender, tmp_path):
    "Every endpoint once: the contract between serving and monitoring."
    from fastapi.testclient import TestClient

    from aerec_nb.serving import create_app

    log = EventLog(tmp_path / "events.db")
    settings = load_settings("test", var_dir=str(tmp_path / "var"), require_auth=False, blocklist_file="")
    with TestClient(create_app(recommender, settings, log)) as client:
        first = client.get("/v1/recommend/u1?k=5").json()
        asked = [
            client.post("/v1/recommend", json={"history": [1000, 1001], "k": 4}),
            client.post(
                "/v1/recommend:batch", json={"requests": [{"user_id": "u2", "k": 3}, {"user_id": "u3", "k": 3}]}
            ),
            client.get("/v1/similar/1000?k=3"),
            client.get("/v1/popular?k=3"),
            client.post("/v1/rank", json={"items": recommender.items[:6], "user_id": "u4"}),
            client.get("/v1/recommend/nobody?k=3"),
            client.get("/v1/recommend/u1?k=100000"),
        ]
        assert [a.status_code for a in asked] == [200] * 6 + [422], [a.text[:200] for a in asked]
        item = first["items"][1]["item_id"]
        client.post(
            "/v1/events",
            json=[
                {
                    "event_id": f"i{i['rank']}",
                    "kind": "impression",
                    "request_id": first["request_id"],
                    "user_id": "u1",
                    "item_id": i["item_id"],
                }
                for i in first["items"]
            ],
        )
        client.post(
            "/v1/events",
            json={
                "event_id": "c",
                "kind": "feedback",
                "request_id": first["request_id"],
                "user_id": "u1",
                "item_id": item,
                "value": 1,
                "payload": {"type": "click"},
            },
        )
    window = make_window(
        log, recommender, SETTINGS.model_copy(update={"attribution_window_minutes": 0.5}), time.time() + 60
    )
    assert (window.requests.endpoint.value_counts().to_dict(), window.requests.status.value_counts().to_dict()) == (
        {"recommend": 4, "batch": 2, "rank": 1, "popular": 1, "similar": 1},
        {200: 8, 422: 1},
    )
    own = int(np.flatnonzero(np.array(window.id_of(np.arange(len(window.requests)))) == first["request_id"])[0])
    mine = slice(window.offsets[own], window.offsets[own + 1])
    assert [recommender.items[i] for i in window.item[mine]] == [i["item_id"] for i in first["items"]] and np.allclose(
        window.score[mine], [i["score"] for i in first["items"]], atol=1e-6
    )
    assert (
        window.outcomes().clicks.sum() == 1
        and window.outcomes().shown.sum() == 5
        and abs(window.outcomes().ndcg.max() - 1 / np.log2(3)) < 1e-12
    )
    found = measure_window(window, SETTINGS).set_index("monitor")
    assert (
        found.value[
            ["errors", "ban violations", "seen violations", "duplicate items", "bad scores", "short lists", "new items"]
        ]
        .eq(0)
        .all()
    ), found.value
    assert (
        found.cases["errors"] == 9
        and abs(found.value["client errors"] - 1 / 9) < 1e-12
        and abs(found.value["CTR"] - 0.2) < 1e-12
    )
    log.close()
