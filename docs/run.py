"""Run the commands and the Python of the tutorials, in a folder of their own.

    python docs/run.py

writes their present output and pictures into the pages, and into README.md where it shows the same commands.
tests/test_docs.py compares what is shown with what is printed, numbers apart. Needs Python 3.11.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
TUTORIALS = tuple(DOCS / "tutorials" / f"{name}.md" for name in ("own-data", "zero-shot", "draw"))
_BLOCK = re.compile(r"(<!-- not run: [^\n]* -->\n)?```(sh|python)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code with the output that the page shows after it."""

    language: str
    code: str
    shown: str | None
    runs: bool

    def commands(self) -> list[str]:
        """The lines of a shell block that call clipkit, comments removed."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.split("  #")[0].strip() for line in lines if line.startswith("clipkit ")]


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in order."""
    return [Block(m[2], m[3], m[4], m[1] is None) for m in _BLOCK.finditer(text)]


def outputs(page: list[Block]) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page in the present folder -> each with what it printed. Raises SystemExit when one fails."""
    from clipkit.cli import main

    names: dict[str, object] = {}
    for block in page:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.runs and block.language == "python":
                exec(block.code, names)
            for line in block.commands() if block.runs and block.language == "sh" else ():
                try:
                    main(shlex.split(line)[1:])
                except SystemExit as end:
                    if end.code:
                        raise SystemExit(f"{line}: exit code {end.code}") from None
        yield block, printed.getvalue()


def spelled(output: str) -> list[str]:
    """The words of an output, numbers and spacing apart, so that another machine's rounding is no difference."""
    return re.sub(r"\d+(?:\.\d+)?", "0", output).split()


def main() -> None:
    """Write the present outputs and pictures into the tutorials and the README."""
    printed: dict[str, str] = {}
    for page in TUTORIALS:
        text = page.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for block, output in outputs(blocks(text)):
                if block.shown is not None and block.runs:
                    printed[block.code] = "\n".join(line.rstrip() for line in output.splitlines()) + "\n"
            for picture in re.findall(r"\]\(\.\./images/([\w.-]+)\)", text):
                if Path(picture).is_file():
                    shutil.copy(picture, DOCS / "images" / picture)
        _write(page, printed)
    _write(README, printed)


def _write(page: Path, printed: dict[str, str]) -> None:
    def renewed(match: re.Match[str]) -> str:
        new = printed.get(match[3]) if match[4] is not None else None
        return match[0] if new is None else match[0][: match.start(4) - match.start()] + new + "```\n"

    page.write_text(_BLOCK.sub(renewed, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
