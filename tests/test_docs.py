"""The documents' promises: their commands print what they show, the how-tos work, generated pages are current."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click import Context

from clipkit.cli import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate, run = script("generate"), script("run")


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_current(name):
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == generate.page(name), "run python docs/generate.py"


@pytest.mark.parametrize("page", run.TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block, output in run.outputs(run.blocks(page.read_text(encoding="utf-8"))):
        if block.runs and block.shown is not None:
            assert run.spelled(output) == run.spelled(block.shown), f"run python docs/run.py: {block.code}"


def test_the_readme_shows_output_of_the_tutorials():
    shown = {b.code: b.shown for page in run.TUTORIALS for b in run.blocks(page.read_text(encoding="utf-8"))}
    readme = [b for b in run.blocks(run.README.read_text(encoding="utf-8")) if b.shown is not None]
    assert len(readme) >= 4
    for block in readme:
        assert shown[block.code] == block.shown, "run python docs/run.py"


def code_lines(code):
    """Lines of code, without imports, comments, docstrings and blank lines."""
    tree = ast.parse(code)
    omitted = set()
    for node in ast.walk(tree):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if text or isinstance(node, ast.Import | ast.ImportFrom):
            omitted |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(code.splitlines(), 1)
    return [line for i, line in lines if i not in omitted and line.strip() and not line.lstrip().startswith("#")]


def install(page, folder):
    """The package that a how-to writes: its module, and its entry point as an installed package has it."""
    text = page.read_text(encoding="utf-8")
    ((module, code),) = re.findall(r"```python\n# ours/(\w+\.py)\n(.*?)```", text, re.DOTALL)
    ((group, point),) = re.findall(r'```toml\n\[project\.entry-points\."([\w.]+)"\]\n(.*?)```', text, re.DOTALL)
    for name, recipe in re.findall(r"```toml\n# (\w+\.toml)\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(recipe)
    (folder / "ours").mkdir()
    (folder / "ours" / module).write_text(code)
    about = folder / "ours-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n" + point.replace('"', ""))
    return code


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=lambda p: p.stem)
def test_a_how_to_works_from_a_separate_package(page, tmp_path):
    code = install(page, tmp_path)
    assert len(code_lines(code)) <= 15
    blocks = run.blocks(page.read_text(encoding="utf-8"))
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"), str(ROOT))))
    for line in [line for block in blocks if block.runs for line in block.commands()]:
        words = [sys.executable, "-m", "clipkit", *shlex.split(line)[1:]]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def anchors(text):
    """The anchors of a page's headings, as Python-Markdown and GitHub make them for plain words."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file(), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def shown_commands():
    """The commands of the guides and tutorials, in fenced and in indented blocks."""
    for page in (*sorted(DOCS.glob("*.md")), *run.TUTORIALS):
        text = page.read_text(encoding="utf-8")
        fenced = [line for block in run.blocks(text) for line in block.commands()]
        for line in [*fenced, *re.findall(r"^    (clipkit .*)$", text, re.MULTILINE)]:
            yield pytest.param(line, id=f"{page.stem}: {line[:60]}")


@pytest.mark.parametrize("line", list(shown_commands()))
def test_every_shown_command_parses(line):
    """Options, arguments and choices are checked by click, without running it."""
    name, *words = shlex.split(line)[1:]
    with cli.commands[name].make_context(name, words, Context(cli)) as context:
        assert context.params


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=lambda p: p.stem)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.-])((?:clipkit|train|zeroshot|guidance|tests|benchmarks|docs)/[\w/-]+\.\w+)", text)
    assert not [name for name in named if not (ROOT / name).exists()]
