"""No output about a customer has the id or the name of another one, in a market with ties and with similar users."""

import json
import re
from pathlib import Path

import preloaded
import pyarrow as pa
import pyarrow.csv
import pytest
from market import write_tables

import fused_rec as fr
from fused_rec.explanation import counterfactual
from fused_rec.http.requests import RecommendRequest
from fused_rec.http.served import Source, load_served

ROOT = Path(__file__).parents[1]
MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")
CUSTOMERS = ("C0001", "C0007")
FLAGS = ("--explain", "--sets", "--words", "--names")


@pytest.fixture(autouse=True)
def greedy_beyond_one(monkeypatch):
    """Sets need not be proven the smallest here."""
    monkeypatch.setattr(counterfactual, "MOST_SETS", 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tables whose customers are called Name-0001 and so on, and a run on them."""
    folder = tmp_path_factory.mktemp("anonymity")
    users = pyarrow.csv.read_csv(write_tables(folder / "tables") / "users.csv")
    named = pa.array([user.replace("C", "Name-") for user in users["user_id"].to_pylist()])
    pyarrow.csv.write_csv(users.append_column("name", named), folder / "tables" / "users.csv")
    settings = {
        "text": {"model": MODEL, "cache": str(folder / "cache")},
        "train": {"batch_size": 32, "max_steps": 10, "eval_every": 5, "learning_rate": 0.02},
        "model": {"dim": 8},
    }
    fr.train(fr.configure(**settings), folder / "run", fr.load_dataset(folder / "tables"))
    return folder


@pytest.fixture(scope="module")
def run(folder) -> fr.Run:
    return fr.load(folder / "run")


def others_in(text: str, *own: str) -> set[str]:
    """Numbers of the customers whose ids or names are in a text, without the own ones."""
    return set(re.findall(r"(?:C|Name-)(\d{4})", text)) - {user.removeprefix("C") for user in own}


def test_the_market_has_ties_and_similar_users(run):
    """Without them there would be nothing to keep."""
    rows = [row for user in CUSTOMERS for row in run.explain(user, k=10, user_ids=True)]
    named = {part["kind"].split(":")[0] for row in rows for part in row["parts"] if others_in(str(part))}
    assert {"tie", "similar_text"} <= named
    assert all(others_in(json.dumps(row), row["user_id"]) for row in rows), "user_ids names them"


def test_explanations(run):
    for user, language in zip(CUSTOMERS, ("de", "fr"), strict=True):
        rows = run.explain(user, k=3, language=language, sets=True)
        assert not others_in(json.dumps(rows), user)
        assert {part["kind"].split(":")[0] for row in rows for part in row["parts"]} >= {"tie", "similar_text"}
        last = run.recommend([user], k=30, progress=False)["item_id"][-1].as_py()
        found = [run.counterfactual_set(user, item, k=3) for item in (rows[0]["item_id"], last)]
        assert not others_in(json.dumps(found), user)


def test_files_of_the_command(folder):
    asked = (f"--workdir={folder}/run", "--k=2", *FLAGS, f"--users={CUSTOMERS[0]}", f"--out={folder}/ranked.csv")
    done = preloaded.run("experiments.recommend", *asked, JAX_NUM_CPU_DEVICES="1")
    assert done.returncode == 0, done.stderr
    lines = (folder / "reasons.jsonl").read_text().splitlines()
    assert [json.loads(line)["user_id"] for line in lines] == [user for user in CUSTOMERS[:1] for _ in range(2)]
    for line in (*lines, *(folder / "ranked.csv").read_text().splitlines()[1:]):
        assert not others_in(line, next(user for user in CUSTOMERS if user in line))
    rows = [json.loads(line) for line in lines]
    assert all(row["set"] is None or row["set"]["text"] for row in rows) and any(row["set"] for row in rows)
    for file in (folder / "ranked.csv.audit.json", folder / "run" / "README.md", folder / "run" / "results.json"):
        assert not others_in(file.read_text(), *CUSTOMERS)
    assert not others_in(done.stdout + done.stderr, *CUSTOMERS)


def test_the_page(folder):
    page = fr.report(
        folder / "run", folder / "page.html", baselines=[], users=["C0001", "C0007"], k=3, names=True
    ).read_bytes()
    text = page.decode()
    assert "Name-0001" in text and "You see this because of" in text
    assert not others_in(text, "C0001", "C0007")


def test_the_server(folder, run):
    served = load_served(Source(folder / "run", language="de"))
    for user in CUSTOMERS:
        [best] = run.recommend([user], k=1, progress=False)["item_id"].to_pylist()
        explained = served.explain(user, best, 3)
        assert explained["explanation"]["set"]["text"].startswith(("Sie sehen dies", "Ohne"))
        assert not others_in(json.dumps([explained, served.recommend(RecommendRequest((user,)))]), user)
