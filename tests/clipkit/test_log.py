import contextlib
import json
import os
import sys

import pytest

from clipkit.errors import UsageError
from clipkit.io import read_object, write_atomically
from clipkit.log import Records, progress, read, say


def test_lines_are_appended_and_rewound_on_resume(tmp_path):
    records = Records(tmp_path, 0, 10, "clip", False, True)
    for step in (2, 4, 6):
        records.write(step, {"loss": step / 2})
    records.close()
    records = Records(tmp_path, 4, 10, "clip", False, True)
    records.write(6, {"loss": 9.0})
    records.close()
    assert read(tmp_path / "log.jsonl") == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 6, "loss": 9.0},
    ]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read(path) == [{"step": 1}]


def test_a_terminal_that_is_gone_ends_nothing(tmp_path, monkeypatch):
    """A run that was disowned hears no signal when its terminal is closed; what it writes there fails."""
    master, slave = os.openpty()
    with contextlib.suppress(OSError), os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        records = Records(tmp_path, 0, 3, "clip", False, True)
        os.close(master)
        with pytest.raises(OSError, match="Input/output"):
            print("hello", file=terminal, flush=True)
        for step in (1, 2, 3):
            records.bar.update(1)
            records.write(step, {"loss": 1.0})
            say("hello")
        records.close()
    assert len(read(tmp_path / "log.jsonl")) == 3


def test_other_ranks_write_nothing(tmp_path):
    records = Records(tmp_path, 0, 10, "clip", False, False)
    records.write(1, {"loss": 1.0})
    records.close()
    assert not list(tmp_path.iterdir())


def test_quiet_without_a_terminal(capsys):
    assert list(progress(range(3), 3, "x")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'clipkit\[track\]'"):
        Records(tmp_path, 0, 10, "clip", True, True)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    records = Records(tmp_path, 0, 10, "clip", True, True)
    records.write(1, {"loss": 1.0})
    records.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("x")
    with pytest.raises(OSError, match="there"):
        write_atomically(tmp_path / "there", "content")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_names_that_are_not_utf8_come_back_out_of_json(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_atomically(tmp_path / "a.json", json.dumps({name: "caf\u00e9"}, ensure_ascii=False))
    assert read_object(tmp_path / "a.json") == {name: "caf\u00e9"}
