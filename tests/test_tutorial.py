"""The tutorial's chapters run, and show what their code does.

    python tests/test_tutorial.py [CHAPTER.md ...]     # for their writer: refresh figures and output

The ```python blocks of a chapter run in order, in one namespace, as if in tutorial/: `figures/` is empty and
kept apart, `results/` is the real one, the project's modules can be imported. What a block prints stands in
the ```text block right behind it.
"""

import contextlib
import importlib
import io
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "tutorial"
sys.path.append(str(TUTORIAL))
CHAPTERS = sorted(TUTORIAL.glob("[0-9]*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.M | re.S)
each = partial(pytest.mark.parametrize, "chapter", ids=lambda path: path.stem)
MODULES = ["knapsack", "rollout", "reward", "grpo", "train", "evaluate"]


def rerun(chapter: Path, folder: Path) -> str:
    """Runs the blocks in `folder`. Returns the chapter with the output they print now."""
    text, names = chapter.read_text(encoding="utf-8"), {"__name__": chapter.stem}
    (folder / "figures").mkdir()
    (folder / "results").symlink_to(TUTORIAL / "results")

    def block(match: re.Match) -> str:
        line = text.count("\n", 0, match.start(1))  # so that a traceback names the chapter's own line
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + match[1], chapter, "exec"), names)
        shown = out.getvalue() and f"\n```text\n{out.getvalue()}```\n"
        return f"```python\n{match[1]}```\n{shown}"

    with contextlib.chdir(folder):
        return BLOCK.sub(block, text)


def parts(text: str) -> tuple[str, str]:
    """(prose, everything between fences)."""
    pieces = re.split(r"^```.*\n", text, flags=re.M)
    return "\n".join(pieces[::2]), "\n".join(pieces[1::2])


@each(CHAPTERS)
def test_blocks(chapter, tmp_path, monkeypatch):
    """Catches: a block that fails; output or a figure in the chapter that its code no longer makes."""
    table = importlib.import_module("train").ALLOCATORS
    monkeypatch.setattr("train.ALLOCATORS", dict(table))  # chapter 9 adds some
    text = chapter.read_text(encoding="utf-8")
    assert text == rerun(chapter, tmp_path), f"python {__file__} {chapter}"
    assert not re.search("^```(py|text)", BLOCK.sub("", text), re.M), "```text goes right behind ```python"
    for made in (tmp_path / "figures").iterdir():
        # Another matplotlib may round otherwise; another picture differs by more.
        kept, new = (matplotlib.image.imread(p / made.name) for p in (TUTORIAL / "figures", made.parent))
        assert kept.shape == new.shape and np.abs(kept - new).mean() < 0.005, made.name
    others = {"knapsack_growth.png"}  # made by tests/bench/bench_knapsack.py
    shown = {*re.findall(r"\(figures/([\w.]+)\)", text)} - others
    assert shown == {path.name for path in (tmp_path / "figures").iterdir()}


@each([TUTORIAL / "README.md", *CHAPTERS])
def test_names(chapter):
    """Catches: a link or an image to a file that is not there; a function that was renamed."""
    prose, _ = parts(chapter.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        assert target.startswith("https://") or (chapter.parent / target).exists(), target
    for module, name in re.findall(rf"`({'|'.join(MODULES)})\.(?!py\b)([\w.]+)", prose):
        found = importlib.import_module(module)
        for part in name.split("."):
            assert hasattr(found, part), f"{module}.{name}"
            found = getattr(found, part)


@each(CHAPTERS)
def test_numbers(chapter):
    """Catches: a decimal or a percentage in the prose that no block prints or asserts."""
    prose, code = parts(chapter.read_text(encoding="utf-8"))
    known = {number.lstrip("0") for number in re.findall(r"\d*\.?\d+", code)}
    for number, percent in re.findall(r"(?<![\w.])(\d{0,3}\.\d+|\d+(?=\\?%))(\\?%)?(?!\w)", prose):
        forms = {number.lstrip("0"), f".{number:0>2}" if percent else ""}
        assert forms & known, f"{number}{percent}: print it, or assert it in a block"


@each([TUTORIAL / "README.md", *CHAPTERS])
def test_math(chapter):
    r"""Catches: LaTeX that GitHub garbles. Its Markdown takes the backslash off \, and \{ (write \lbrace),
    and wants inline formulas on one line, with no letter, digit or hyphen right before or behind."""
    prose = re.sub(r"`[^`]*`", "code", parts(chapter.read_text(encoding="utf-8"))[0])
    for before, double, formula, behind in re.findall(r"([^$\n]?)\$(\$?)([^$]+)\$\2(.?)", prose):
        assert not re.search(r"\\[^\w\s]|\w<|<\w|\}_", formula), formula
        assert double or not re.search(r"\n|^[\w-]\$|\$\w$", f"{before}${formula}${behind}"), formula


def test_map():
    """Catches: a chapter that the tutorial's README does not link."""
    text = (TUTORIAL / "README.md").read_text(encoding="utf-8")
    assert CHAPTERS and [c.name for c in CHAPTERS if f"({c.name})" not in text] == []


def refresh(chapter: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        new = rerun(chapter, Path(folder))
        shutil.copytree(Path(folder, "figures"), TUTORIAL / "figures", dirs_exist_ok=True)
    chapter.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for path in [Path(a).resolve() for a in sys.argv[1:]] or CHAPTERS:
        refresh(path)
