"""The HTTP server as a process of its own: answers, hostile input, load, exchange of the model, end."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from market import write_tables

import fused_rec as fr
from fused_rec.serving.recommender import model_digest

NEEDS = 'the server needs the extra: pip install -e ".[serve,tests]"'
httpx = pytest.importorskip("httpx", reason=NEEDS)
for needed in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason=NEEDS)

ROOT = Path(__file__).parents[1]
RULES = [
    {"name": "withdrawn", "refuse": {"items": ["P007"]}},
    {"name": "risk", "require": ["item.risk_band", "at_most", "user.risk_tolerance"], "allow_unknown": ["user"]},
]
LIMITS = ("--max_users=20", "--max_k=12", "--max_body=4096", "--max_pending=32", "--timeout=5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two runs on the same tables, A and B, rules, and a link to A that is served."""
    folder = tmp_path_factory.mktemp("serve")
    market = fr.load_dataset(write_tables(folder / "tables"))
    for name, seed in (("A", 0), ("B", 1)):
        train = {"batch_size": 32, "max_steps": 4, "eval_every": 2, "learning_rate": 0.02, "seed": seed}
        fr.train(
            fr.configure(train=train, model={"dim": 4, "num_layers": 1, "variant": "graph"}), folder / name, market
        )
    (folder / "rules.json").write_text(json.dumps({"rules": RULES}))
    (folder / "served").symlink_to("A")
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, fr.Run]:
    """Each run by its digest."""
    return {model_digest(folder / name): fr.load(folder / name) for name in "AB"}


@pytest.fixture(scope="module")
def run(folder, runs) -> fr.Run:
    return runs[model_digest(folder / "A")]


class Server:
    """A process that serves, and what it wrote to stderr."""

    def __init__(self, folder: Path, *flags: str):
        command = [sys.executable, "-m", "experiments.serve", f"--workdir={folder}/served", "--port=0", *flags]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        self.log = folder / "server.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        line = self.process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        found = re.search(r"at (http://127\.0\.0\.1:(\d+)) \(model", line)
        assert found, (line, self.log.read_text())
        self.url, self.port = found[1], int(found[2])

    def ended(self, timeout: float = 20) -> int:
        return self.process.wait(timeout)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    server = Server(folder, *flags)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(folder, run) -> Iterator[Server]:
    with serving(folder, f"--rules={folder}/rules.json", *LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def ranked(run: fr.Run, users: list[str], k: int = 10, **settings) -> list[dict]:
    """What the server is to answer with."""
    found: dict[str, list] = {user: [] for user in users}
    for row in run.recommend(users, k, progress=False, **settings).to_pylist():
        found[row.pop("user_id")].append(row)
    return [{"user_id": user, "items": rows} for user, rows in found.items()]


def same(got: list[dict], expected: list[dict]) -> bool:
    """Whether these are the same lists with the same scores, up to rounding."""
    mine, its = ([row for listed in lists for row in listed["items"]] for lists in (got, expected))
    return (
        [(listed["user_id"], len(listed["items"])) for listed in got]
        == [(listed["user_id"], len(listed["items"])) for listed in expected]
        and [row | {"score": 0} for row in mine] == [row | {"score": 0} for row in its]
        and [row["score"] for row in mine] == pytest.approx([row["score"] for row in its], rel=1e-4)
    )


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_equal_those_of_the_run(run, client, folder):
    digest = model_digest(folder / "A")
    got = client.get("/v1/recommend", params={"user": "C0001"})
    assert got.status_code == 200 and got.headers["content-type"] == "application/json"
    assert got.json()["model"] == digest
    assert same(got.json()["recommendations"], ranked(run, ["C0001"], rules=RULES))
    users = [f"C{n:04d}" for n in (3, 1, 2, 9, 8, 7, 6, 5, 4, 12, 11)]
    asked = {"users": [*users, "C0001"], "k": 3, "where": "risk_band <= 4", "include_seen": True}
    got = client.post("/v1/recommend", json=asked).json()["recommendations"]
    assert same(got, ranked(run, users, 3, rules=RULES, where="risk_band <= 4", include_seen=True)), (
        "each once, in order"
    )
    few = client.get("/v1/recommend?user=C0001&k=2&items=P001&items=P002&items=P003&include_seen=true").json()
    among = {"items": ["P001", "P002", "P003"], "include_seen": True}
    assert same(few["recommendations"], ranked(run, ["C0001"], 2, rules=RULES, **among))


def test_rules_hold_for_every_answer(run, client):
    """A request cannot turn them off, and items that nobody may have are not called similar either."""
    asked = {"users": ["C0001"], "items": ["P007"], "include_seen": True}
    assert client.post("/v1/recommend", json=asked).json()["recommendations"][0]["items"] == []
    assert client.post("/v1/recommend", json={"users": ["C0001"], "rules": []}).status_code == 400
    got = client.get("/v1/explain?user=C0001&item=P007")
    assert got.status_code == 403 and "rules of the server refuse" in got.json()["error"]
    similar = run.similar_items("P003", 12)["item_id"].to_pylist()
    assert "P007" in run.similar_items("P003", 29)["item_id"].to_pylist()
    shown = client.get("/v1/similar_items?item=P003&k=12").json()["items"]
    assert [row["item_id"] for row in shown][: len(similar) - 1] == [item for item in similar if item != "P007"][:11]
    assert len(shown) == 12 and [row["rank"] for row in shown] == list(range(1, 13))


def test_explanations_do_not_name_other_users(run, client):
    """A contribution of a social edge has the other user as its source."""
    users = run.prepared.dataset.users["user_id"].to_pylist()
    best = (
        (listed["user_id"], row["item_id"]) for listed in ranked(run, users, 1, rules=RULES) for row in listed["items"]
    )
    explained = (run.explain(user, [item], user_ids=True)[0] for user, item in best)
    expected = next(row for row in explained if any(part["source"] in users for part in row["parts"]))
    got = client.get("/v1/explain", params={"user": expected["user_id"], "item": expected["item_id"]})
    found = got.json()["explanation"]
    assert found["reasons"] == expected["reasons"] and found["score"] == pytest.approx(expected["score"], rel=1e-4)
    values = [part["value"] for part in expected["parts"]]
    assert [part["value"] for part in found["parts"]] == pytest.approx(values, rel=1e-3, abs=1e-6)
    assert set(re.findall(r"C\d{4}", got.text)) == {expected["user_id"]}


def test_an_explanation_has_the_set_of_the_k_best_under_the_rules(run, client):
    [listed] = ranked(run, ["C0001"], 1, rules=RULES)
    best = listed["items"][0]["item_id"]
    got = client.get(f"/v1/explain?user=C0001&item={best}&k=1").json()["explanation"]
    assert got["set"] == run.counterfactual_set("C0001", best, k=1, rules=RULES)
    assert "set" not in client.get(f"/v1/explain?user=C0001&item={best}").json()["explanation"]
    refused(client.get(f"/v1/explain?user=C0001&item={best}&k=0"), 400, "k is 0; it must be an integer from 1 to 12")


def test_health_and_metrics(client, folder):
    health = client.get("/health").json()
    assert health["ready"] and health["model"] == model_digest(folder / "A") and health["history"] == "all"
    assert not health["last_load_failed"] and health["rules"]
    client.get("/v1/recommend?user=C0001")
    client.get("/nothing/C0001")
    metrics = client.get("/metrics").text
    assert 'fused_rec_requests_total{route="/v1/recommend",status="200"}' in metrics
    assert 'fused_rec_requests_total{route="other",status="404"}' in metrics
    assert 'fused_rec_request_seconds_bucket{le="0.01",route="/v1/recommend"}' in metrics
    assert f'fused_rec_model_info{{history="all",model="{health["model"]}",tables="{health["tables"]}"}} 1.0' in metrics
    assert "fused_rec_requests_in_flight 1.0" in metrics and "C0001" not in metrics


# --- hostile input ---------------------------------------------------------------------------------------------------


def refused(response, status: int, message: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and list(response.json()) == ["error"]
    assert re.search(message, response.json()["error"]), response.text
    assert "Traceback" not in response.text and ".py" not in response.text and str(ROOT) not in response.text


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("", 400, "user is missing"),
        ("user=C0001&k=-1", 400, "k is -1; it must be an integer from 1 to 12"),
        ("user=C0001&k=1000000000", 400, "k is 1000000000"),
        ("user=C0001&k=" + "9" * 5000, 400, "k is '9+"),
        ("user=C0001&k=1.5", 400, "k is '1.5'"),
        ("user=C0001&k=%D9%A1", 400, "k is '"),
        ("user=C0001&k=1&k=2", 400, "k is given more than once"),
        ("user=C0001&user=C0002", 400, "user is given more than once"),
        ("user=C0001&rules=none", 400, "'rules' is no parameter"),
        ("user=C0001&include_seen=1", 400, "include_seen is '1'"),
        ("user=", 400, "an id of 0 characters"),
        ("user=" + "x" * 5000, 400, "an id of 5,000 characters; it must have 1 to 1,000"),
        ("user=C9999", 404, "unknown user id 'C9999'|unknown user ids, first 'C9999'"),
        ("user=%00%1B%5B31m%0A", 404, r"'\\x00\\x1b\[31m\\n'"),
        ("user=%FF%FE", 404, "unknown user"),
        ("user=..%2F..%2Fetc%2Fpasswd", 404, "unknown user"),
        ("user=C0001&items=P999", 404, "unknown item"),
        ("user=C0001&where=__import__('os').system('id')", 400, "where is .* cannot be read"),
        ("user=C0001&where=type.__class__=='a'", 400, "where is .* cannot be read"),
        ("user=C0001&where=" + "(" * 1900, 400, "where is .* cannot be read"),
        ("user=C0001&where=" + "not " * 490 + "type=='a'", 200, ""),
        ("user=C0001&where=" + "a" * 3000, 400, "where has 3,000 characters"),
        ("user=C0001&where=nothing==1", 400, "nothing, which is no column"),
        ("user=C0001&where=risk_band==%22x%22", 400, "it must be a number"),
    ],
)
def test_queries_that_do_not_fit(client, query, status, message):
    response = client.get(f"/v1/recommend?{query}")
    if status == 200:
        assert response.status_code in (200, 400), response.text
    else:
        refused(response, status, message)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "cannot be read as JSON"),
        (b"\xff\xfe", 400, "cannot be read as JSON"),
        (b"[" * 4000, 400, "cannot be read as JSON"),
        (b'{"users": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "users has|cannot be read as JSON"),
        (b'{"users": ["C0001"], "k": NaN}', 400, "cannot be read as JSON"),
        (b'{"users": ["C0001"], "k": 1e999}', 400, "k is inf"),
        (b'{"users": ["C0001"], "k": ' + b"9" * 4000 + b"}", 400, "k is 9+"),
        (b'{"users": ["C0001"], "k": true}', 400, "k is True"),
        (b'{"users": ["C0001"], "k": "5"}', 400, "k is '5'"),
        (b"[1]", 400, r"the body is \[1\]"),
        (b'{"users": "C0001"}', 400, "users is 'C0001'; it must be a list"),
        (b'{"users": []}', 400, "users has 0 ids; it must have 1 to 20"),
        (b'{"users": [' + b"1," * 30 + b"1]}", 400, "users has 31 ids"),
        (b'{"users": [1.5]}', 400, "users has 1.5; give ids as text or integers"),
        (b'{"users": [null]}', 400, "users has None"),
        (b'{"users": [["C0001"]]}', 400, "users has"),
        (b'{"users": ["\\ud800"]}', 400, "not valid Unicode"),
        (b'{"users": [123456]}', 404, "123456"),
        (b'{"users": ["C0001"], "where": 3}', 400, "where is 3"),
        (b'{"users": ["C0001"], "items": {"a": 1}}', 400, "items is"),
        (b'{"users": ["C0001"], "include_seen": "yes"}', 400, "include_seen is 'yes'"),
        (b'{"users": ["C0001"], "__class__": 1}', 400, "'__class__' is no field"),
        (b" " * 5000, 413, "the body has 5,000 bytes; 4,096 at most"),
    ],
)
def test_bodies_that_do_not_fit(client, body, status, message):
    response = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    refused(response, status, message)


def test_paths_methods_types_and_hosts_that_are_not_served(client):
    refused(client.get("/v1/nothing"), 404, "the paths are /v1/recommend")
    refused(client.get("/v1/../../etc/passwd"), 404, "the paths are")
    got = client.delete("/v1/recommend?user=C0001")
    refused(got, 405, "the method is 'DELETE'; see the header Allow")
    assert set(got.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    refused(client.post("/v1/recommend", content=b"{}", headers={"content-type": "text/plain"}), 415, "text/plain")
    for host in ("evil.example", "127.0.0.1.evil.example:80", ""):
        refused(client.get("/health", headers={"host": host}), 421, "the header Host is")
    endless = (b" " * 1000 for _ in range(100))  # no Content-Length
    refused(
        client.post("/v1/recommend", content=endless, headers={"content-type": "application/json"}),
        413,
        "more than 4,096 bytes",
    )
    assert client.get("/health").status_code == 200


# --- load and exchange -----------------------------------------------------------------------------------------------


async def gather(url: str, users: list[str], connections: int):
    """The answers to requests that are all sent at once."""
    limits = httpx.Limits(max_connections=connections)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        return await asyncio.gather(*(client.get("/v1/recommend", params={"user": user}) for user in users))


def test_many_requests_at_once_are_answered_or_refused(server, run):
    """A client that does not send the rest of its body holds up nobody."""
    users = [f"C{1 + n % 60:04d}" for n in range(200)]
    head = (
        "POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
        slow.sendall(head.encode() + b"{")
        answers = asyncio.run(gather(server.url, users, connections=200))
        late = b"".join(iter(lambda: slow.recv(10_000), b"")).decode()  # until the server closes the connection
        assert late.startswith("HTTP/1.1 408") and "the body took more than 5 seconds" in late
    expected = {user: ranked(run, [user], rules=RULES) for user in set(users)}
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 32
    for user, answer in zip(users, answers, strict=True):
        if answer.status_code == 200:
            assert same(answer.json()["recommendations"], expected[user])
        else:
            refused(answer, 503, "32 requests are pending, the most")
            assert answer.headers["retry-after"] == "1"


def measured(metrics: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def loads(client, outcome: str) -> float:
    return measured(client.get("/metrics").text, f'fused_rec_model_loads_total{{outcome="{outcome}"}}')


def wait_for_load(server: Server, client, outcome: str) -> None:
    before = loads(client, outcome)
    server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 60
    while loads(client, outcome) == before:
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)


def test_the_model_is_exchanged_under_load(server, client, folder, runs):
    """No request is dropped, and each answer is of the model that it names."""
    answers: list[tuple[str, Any]] = []
    done = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as own:
            while not done.is_set():
                user = f"C{1 + (len(answers) + number) % 60:04d}"
                answers.append((user, own.get("/v1/recommend", params={"user": user})))

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for asker in askers:
        asker.start()
    try:
        (folder / "next").symlink_to("B")
        (folder / "next").replace(folder / "served")
        wait_for_load(server, client, "done")
        more = len(answers) + 40
        while len(answers) < more:
            time.sleep(0.01)
    finally:
        done.set()
        for asker in askers:
            asker.join()
        (folder / "next").symlink_to("A")
        (folder / "next").replace(folder / "served")
    named = [answer.json()["model"] for _, answer in answers]
    assert {answer.status_code for _, answer in answers} == {200} and set(named) == set(runs)
    pairs = {(name, user) for name, (user, _) in zip(named, answers, strict=True)}
    expected = {(name, user): ranked(runs[name], [user], rules=RULES) for name, user in pairs}
    for name, (user, answer) in zip(named, answers, strict=True):
        assert same(answer.json()["recommendations"], expected[name, user])
    wait_for_load(server, client, "done")
    assert client.get("/health").json()["model"] == model_digest(folder / "A")


def test_a_model_that_cannot_be_loaded_changes_nothing(server, client, folder):
    (folder / "rules.json").write_text('{"rules": [{"name": "broken"}]}')
    try:
        wait_for_load(server, client, "failed")
    finally:
        (folder / "rules.json").write_text(json.dumps({"rules": RULES}))
    health = client.get("/health").json()
    assert health["ready"] and health["last_load_failed"] and health["model"] == model_digest(folder / "A")
    assert "the model could not be loaded" in server.log.read_text() and "broken" in server.log.read_text()
    assert client.post("/v1/recommend", json={"users": ["C0001"], "items": ["P007"]}).json()["recommendations"] == [
        {"user_id": "C0001", "items": []}
    ]
    wait_for_load(server, client, "done")
    assert not client.get("/health").json()["last_load_failed"]


def test_it_ends_when_what_it_began_is_answered(folder):
    slow = {"users": [f"C{n:04d}" for n in range(1, 61)], "where": f"risk_band in [{','.join('1' * 300)}]"}
    with serving(folder, "--timeout=60") as server, httpx.Client(base_url=server.url, timeout=60) as watcher:
        answers: list[Any] = []
        ready = threading.Barrier(8)

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as own:
                own.get("/health")  # the connection stands
                ready.wait()
                answers.append(own.post("/v1/recommend", json=slow))

        askers = [threading.Thread(target=ask) for _ in range(8)]
        for asker in askers:
            asker.start()
        arrived = unanswered = 0
        while arrived < 8:
            metrics = watcher.get("/metrics").text
            unanswered = int(measured(metrics, "fused_rec_requests_in_flight") - 1)  # without this one
            finished = r'fused_rec_requests_total{route="/v1/recommend",status="200"}'
            arrived = unanswered + measured(metrics, finished)
        server.process.send_signal(signal.SIGTERM)
        for asker in askers:
            asker.join()
        assert server.ended() == 0 and unanswered > 0
        assert [answer.status_code for answer in answers] == [200] * 8
        assert all(len(answer.json()["recommendations"]) == 60 for answer in answers)
        assert "Traceback" not in server.log.read_text()


def test_what_cannot_be_served_is_said_at_once(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "experiments.serve", f"--workdir={folder}/served", f"--port={port}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"cannot listen at --host=127.0.0.1 --port={port}" in done.stderr
