"""Several models on several sets: the table, and the page in a browser."""

import json
import shutil
import subprocess

import pytest
from PIL import Image

from clipkit.cli import cli
from clipkit.zeroshot.datasets import open_set
from clipkit.zeroshot.evaluation import Prompts, evaluate_all, table
from clipkit.zeroshot.report import write_report


@pytest.fixture
def sets(packs, tmp_path):
    for name, colour in (("red_<b>", "red"), ("blue", "blue")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 24), colour).save(tmp_path / "set" / name / f"{i}.png")
    return [f"folder:{tmp_path / 'set'}", f"shards:{packs / 'heldout'}"]


@pytest.fixture
def results(chain, sets, tmp_path):
    return evaluate_all([str(chain)], [open_set(name, tmp_path) for name in sets], Prompts(), "cpu")


def test_the_table_has_a_line_for_each(results, sets):
    lines = table(results).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:2] == ["model", "data"]
    assert all(name in line for name, line in zip(sets, lines[1:], strict=True))
    assert "mAP" not in lines[0]
    assert "top-5" in lines[0]
    assert lines[1].count("%") == lines[2].count("%") - 1  # of three classes there are no five best
    assert "top-5" not in table(results[:1])


def test_the_page_needs_no_other_file(results, tmp_path):
    page = write_report(results, tmp_path / "report").read_text()
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["index.html"]
    assert "http" not in page
    assert "<b>" not in page.replace("red &lt;b&gt;", "")  # names are text
    assert page.count("<section>") == 2
    assert page.count('class="matrix"') == 2


def test_the_page_opens_in_a_browser(results, tmp_path):
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    page = write_report(results, tmp_path / "report")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400"]
    run = {"check": True, "capture_output": True, "timeout": 120}
    shown = subprocess.run([*command, "--dump-dom", page.as_uri()], **run).stdout.decode()
    assert "Zero-shot results" in shown
    assert shown.count('<img class="matrix"') == 2
    subprocess.run([*command, f"--screenshot={tmp_path / 'page.png'}", page.as_uri()], **run)
    with Image.open(tmp_path / "page.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert (0x4A, 0x7F, 0xB5) in {colour for _, colour in colours}  # the bars are drawn


def test_the_command_with_two_sets(chain, sets, tmp_path, capsys):
    words = ["zeroshot", "--model", str(chain), "--dataset", sets[0], "--dataset", sets[1], "--json"]
    cli.main([*words, "--report", str(tmp_path / "page")], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert [result["dataset"] for result in found] == sets
    assert (tmp_path / "page" / "index.html").is_file()
