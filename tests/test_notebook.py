"""The notebook's cells run, one after the other, in a folder with nothing in it."""

import json
from pathlib import Path

import pytest

from clipkit.data.drawings import PAIRS

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "quickstart.ipynb"


def test_the_quickstart_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    assert (tmp_path / "heart.gif").stat().st_size > 1000
    assert names["drawn"].images.shape == (8, 3, 24, 24)
    expected = [" ".join(reversed(PAIRS[picture.label])) for picture in names["pictures"]]
    assert [guess[0].label for guess in names["guesses"]] == expected
