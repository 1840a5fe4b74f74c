"""Curves are readable at once, and a resumed run's are those of a run that never stopped."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from fused_rec.runs.loggers import CurveLogger

ROOT = Path(__file__).parents[1]


@pytest.fixture
def curves(tmp_path):
    with CurveLogger(tmp_path / "run") as opened:
        yield opened


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "curves.jsonl").read_text().splitlines()]


def scalars(tmp_path):
    """What TensorBoard shows: events file by file, those at or after a session's start step hidden when it starts."""
    shown = []
    for file in sorted((tmp_path / "run" / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # a record: length as uint64, its CRC, the event, its CRC
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                shown = [entry for entry in shown if entry[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


def test_values_are_readable_at_once(curves, tmp_path):
    curves.write(5, {"loss": 0.5, "valid/ndcg@10": 0.25})
    curves.write(10, {"loss": 0.25})
    assert lines(tmp_path) == [{"step": 5, "loss": 0.5, "valid/ndcg@10": 0.25}, {"step": 10, "loss": 0.25}]
    assert scalars(tmp_path) == [(5, "loss", 0.5), (5, "valid/ndcg@10", 0.25), (10, "loss", 0.25)]


def test_what_is_not_finite_stays_json(curves, tmp_path):
    curves.write(1, {"loss": float("nan"), "norm": float("inf")})
    assert (tmp_path / "run" / "curves.jsonl").read_text() == '{"step": 1, "loss": null, "norm": null}\n'


def test_step_is_no_name_for_a_value(curves):
    with pytest.raises(ValueError, match='named "step"'):
        curves.write(1, {"step": 2.0})


def test_a_resumed_run_logs_as_if_never_stopped(tmp_path):
    for step in (1, 2, 3, 4):
        if step in (1, 3):
            curves = CurveLogger(tmp_path / "run")
            curves.rewind(step - 1)
        curves.write(step, {"loss": 8.0 - step})
        if step == 2:
            curves.write(3, {"loss": 99.0})  # past the checkpoint at step 2, then killed
            curves.close()
    curves.close()
    assert lines(tmp_path) == [{"step": step, "loss": 8.0 - step} for step in (1, 2, 3, 4)]
    assert scalars(tmp_path) == [(step, "loss", 8.0 - step) for step in (1, 2, 3, 4)]
    assert sorted(os.listdir(tmp_path / "run")) == ["curves.jsonl", "tensorboard"]


def test_rewind_to_before_the_first_step_drops_all(curves, tmp_path):
    curves.write(3, {"loss": 1.0})
    curves.rewind(0)
    assert lines(tmp_path) == [] and scalars(tmp_path) == []
    curves.write(1, {"loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_torn_last_line_is_dropped_with_a_warning(curves, tmp_path, caplog):
    curves.write(1, {"loss": 1.0})
    with (tmp_path / "run" / "curves.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with caplog.at_level(logging.WARNING):
        again = CurveLogger(tmp_path / "run")
    again.write(2, {"loss": 0.5})
    again.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    assert '{"step": 2, "lo' in caplog.text


@pytest.mark.parametrize("damage", ["not json", '{"loss": 1}', '{"step": "2"}', "3"])
def test_a_damaged_line_is_named_and_nothing_dropped(curves, tmp_path, damage):
    curves.write(1, {"loss": 1.0})
    path = tmp_path / "run" / "curves.jsonl"
    whole = path.read_text() + damage + "\n" + '{"step": 3}\n'
    path.write_text(whole)
    with pytest.raises(ValueError, match="curves.jsonl, line 2 is no record of a step"):
        curves.rewind(1)
    assert path.read_text() == whole


def test_a_killed_process_leaves_every_written_line(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from fused_rec.runs.loggers import CurveLogger
curves = CurveLogger(sys.argv[1])
curves.write(1, {{"loss": 1.0}})
print("written", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    assert scalars(tmp_path) == [(1, "loss", 1.0)]
