r"""The reward: problems with known answers, and a number in [0, 1] for each completion.

A completion earns 1.0 when the answer in its last \boxed{} (without one, the answer it gives)
equals the gold answer as mathematics. Format, length and style count for nothing.

>>> from reward import Task, Verifier, grade, load_tasks, score
>>> load_tasks("arithmetic")[0].prompt
'7+1+5+9+8+7+5+8='
>>> score(r"Half of them, so \boxed{\frac{1}{2}}.", "0.5")
1.0
>>> Verifier(workers=2).score_many(["8 10", "8 11"], ["10", "10"])
array([1., 0.])

The paper calls this the outcome reward r in {0, 1}. A reward of your own is a function of a batch
(`--reward FILE.py:FUNCTION`); a task's extra holds the other columns of its row:

>>> def names_the_fruit(tasks, texts):
...     return [task.extra["fruit"] in text for task, text in zip(tasks, texts)]
>>> task = Task("1", "Name a fruit.", answer="", extra={"fruit": "fig"})
>>> grade(names_the_fruit, [task, task], ["A fig.", "A car."])
array([1., 0.])

Rewards between 0 and 1 shape the advantages; above 0.5 the tracker counts a success.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import importlib.util
import json
import logging
import random
import re
import signal
import subprocess
import sys
import threading
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

# --------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """One problem. Its id stays the same whatever other rows are dropped."""

    id: str
    prompt: str
    answer: str  # the gold answer, as text
    extra: dict = field(default_factory=dict, repr=False, hash=False)


HUB = {  # name: hub id, configuration, split
    "gsm8k": ("openai/gsm8k", "main", "train"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("math-ai/olympiadbench", None, "test"),
    "gpqa": ("fingertap/GPQA-Diamond", None, "test"),  # a letter, A to D
    "dapo17k": ("open-r1/DAPO-Math-17k-Processed", "all", "train"),
}
# Columns that may hold the prompt and the gold answer: the first that a row has counts.
PROMPTS = ["prompt", "question", "problem", "messages"]
ANSWERS = ["answer", "final_answer", "reward_model", "solution", "messages"]


def load_tasks(name_or_path: str | Path) -> list[Task]:
    """The problems under a name (`arithmetic` or one of HUB), or in a file or folder.

    A file is JSON Lines, a JSON array (.json), CSV, each also as .gz, or parquet; a folder is
    one made by datasets' save_to_disk. A warning says what was taken and dropped. Raises
    ValueError, in one line with the file and the row, for what is no task.
    """
    name = str(name_or_path)
    if name == "arithmetic":
        return _arithmetic()
    kinds = [suffix.lower() for suffix in Path(name).suffixes]  # .jsonl, .gz
    unit = "line" if ".jsonl" in kinds else "row"
    stem = Path(re.sub(r"(?i)\.gz$", "", name)).stem
    tasks = {}  # the prompt's text, its spacing evened out -> Task
    seen = {}  # id -> its row
    notes = Counter()
    for number, row in _rows(name, kinds):
        where = f"{name}, {unit} {number}"
        task = _task(row, f"{stem}-{number}", where, notes)
        if seen.setdefault(task.id, number) != number:
            # The tracker knows a prompt by its id.
            raise ValueError(f"{where}: the id {task.id!r} is also in {unit} {seen[task.id]}")
        key = " ".join(task.prompt.split())
        first = tasks.setdefault(key, task) if task.answer else None
        if first is not task:
            notes["dropped (empty answer or repeated prompt)"] += 1
        # Nobody can say which of two answers is right: the prompt goes altogether.
        if first and first.answer != task.answer:
            notes[f"dropped with it ({task.id} has another answer)"] += 1
            tasks[key] = None
    tasks = [task for task in tasks.values() if task]
    if not tasks:
        raise ValueError(f'{name}: no tasks in it: a {unit} needs a "prompt" and an "answer"')
    if notes:
        said = ", ".join(f"{count} {note}" for note, count in notes.items())
        warnings.warn(f"{name}: of {len(seen)} {unit}s {said}", stacklevel=2)
    return tasks


def _arithmetic(n_tasks: int = 1280) -> list[Task]:
    """Distinct chain sums "3+5+2=" of 2 to 10 digits from 1 to 9, the same every time."""
    rng = random.Random(0)  # recorded runs depend on these problems
    answers = {}
    while len(answers) < n_tasks:
        # The longer the sum, the harder it is.
        digits = [rng.randint(1, 9) for _ in range(rng.randint(2, 10))]
        answers["+".join(map(str, digits)) + "="] = str(sum(digits))
    return [Task(f"arithmetic-{i:04d}", *pair) for i, pair in enumerate(answers.items())]


def _rows(name: str, kinds: list[str]):
    """(number from 1, row) for each row; kinds are the suffixes of the file's name."""
    path = Path(name).expanduser()
    if name not in HUB and not path.exists():
        known = ", ".join(["arithmetic", *HUB])
        raise ValueError(f"no tasks {name!r}: neither a file nor one of {known}")
    kind = "UTF-8 text"
    try:
        if name in HUB or path.is_dir():
            import datasets  # takes seconds, so only where it is needed

            if name in HUB:
                kind = "a set of the Hugging Face hub (is there a network?)"
                rows = datasets.load_dataset(*HUB[name][:2], split=HUB[name][2])
                # The hub's own ids may be missing or of an odd type.
                return [(n, {**row, "id": f"{name}-{n}"}) for n, row in enumerate(rows, 1)]
            kind = "a folder of save_to_disk"
            rows = datasets.load_from_disk(str(path))
            return enumerate(rows["train"] if isinstance(rows, dict) else rows, 1)
        if kinds[-1:] == [".parquet"]:
            kind = "parquet"
            import pyarrow.parquet

            return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        # newline="": csv wants line breaks inside quotes as they are.
        opened = gzip.open if kinds[-1:] == [".gz"] else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = file.read()
        if ".csv" in kinds:
            return enumerate(list(csv.DictReader(text.splitlines(keepends=True))), 1)
    except Exception as error:  # disk, network, Arrow and gzip have kinds of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ValueError(f"{name}: cannot be read as {kind}: {reason}") from error
    # Such an array is one text with all the rows.
    array = ".json" in kinds and text.lstrip().startswith("[")
    rows = []
    # str.splitlines would cut JSON at U+2028 as well.
    for number, line in enumerate([text] if array else text.split("\n"), 1):
        try:
            rows += [(number, json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {number}: not JSON: {error}") from error
    return enumerate(rows[0][1], 1) if array else rows


def _task(row: object, default_id: str, where: str, notes: Counter) -> Task:
    """A row as a Task; ValueError if no completion could ever match its answer."""
    columns = list(row) if isinstance(row, dict) else []
    taken = [next((c for c in names if c in columns), None) for names in (PROMPTS, ANSWERS)]
    if None in taken:
        keys = f'needs the keys "prompt" and "answer" (or {PROMPTS[1:]} and {ANSWERS[1:]})'
        raise ValueError(f"{where}: {keys}; found {columns}")
    prompt, answer, id_ = row[taken[0]], row[taken[1]], row.get("id", default_id)
    if isinstance(prompt, list):  # a conversation: the text of its turns
        turns = [turn.get("content") if isinstance(turn, dict) else None for turn in prompt]
        answer = turns.pop() if turns and taken[1] == "messages" else answer
        prompt = None if None in turns else "\n\n".join(map(str, turns))
    if isinstance(answer, dict) and taken[1] == "reward_model":
        answer = answer.get("ground_truth")  # verl's form
    if isinstance(answer, list) and taken[1] == "final_answer":
        answer = "".join(answer[:1])  # OlympiadBench's
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # a table that holds 27.0 means 27

    # "... #### 1,800" and "The answer is 14." are texts around an answer.
    gold = text = str(answer).rstrip().lstrip(" \n")  # a leading tab is a misread "\\times"
    if (box := last_boxed(text)) is not None:
        gold = box
    elif said := SAID.findall(text):
        gold = said[-1].replace(",", "") if "####" in text else said[-1]
    elif taken[1] in ("solution", "messages") and len(text.split()) > 5:
        gold = ""  # prose that names no answer
    if default_id.rpartition("-")[0] not in HUB:  # whose columns are known
        if taken != ["prompt", "answer"]:
            notes[f"read from {taken[0]} and {taken[1]}"] += 1
        if gold not in ("", text):
            notes["with the answer cut out of a text"] += 1

    faults = {
        "the prompt must be text": not isinstance(prompt, str),
        "the prompt is blank": not str(prompt).strip(),
        "the id must be text or a whole number": type(id_) not in (str, int),
        "the answer must be text or a number": type(answer) not in (str, int, float),
        "the answer is not a number": gold == "nan",
        f"the answer has more than {MAX_ANSWER} characters": len(gold) > MAX_ANSWER,
        # "\frac" in JSON is a form feed and "rac".
        "control character (write \\ twice)": re.search(r"[\0-\x09\x0b-\x1f\x7f]", gold),
        "unmatched brace": last_boxed(rf"\boxed{{{gold}}}") != gold,
        "half a character": re.search("[\ud800-\udfff]", f"{prompt}{gold}{id_}"),
    }
    for fault in filter(faults.get, faults):
        raise ValueError(f"{where}: {fault}: answer {answer!r:.50}, prompt {prompt!r:.50}")
    return Task(str(id_), prompt, gold, {c: row[c] for c in columns if c not in (*taken, "id")})


def split_held_out(tasks: list[Task], n_held_out: int, seed: int = 0):
    """(train, held out), each in the order given; a hash of a prompt's text decides its side.

    Prompts that differ only in case, spacing or punctuation fall on the same side; where such a
    group does not fit, a few less are held out. ValueError unless 0 <= n_held_out < len(tasks).
    """
    if not 0 <= n_held_out < len(tasks):
        raise ValueError(f"cannot hold out {n_held_out} of {len(tasks)} tasks: hold out fewer")
    texts = [unicodedata.normalize("NFKC", task.prompt).casefold() for task in tasks]
    texts = ["".join(filter(str.isalnum, text)) for text in texts]
    # Hashes, not positions, so that neither order nor ids decide.
    sizes, held, room = Counter(texts), set(), n_held_out
    for text in sorted(sizes, key=lambda t: hashlib.sha256(f"{seed}:{t}".encode()).digest()):
        if sizes[text] <= room:
            held.add(text)
            room -= sizes[text]
    sides = [], []
    for task, text in zip(tasks, texts, strict=True):
        sides[text in held].append(task)
    return sides


# ------------------------------------------------------------------------------------- verdicts

MAX_ANSWER = 500  # characters; the longest gold answer of the usual suites has 210
MAX_TAIL = 1000  # characters at the end of a text without a box that are looked at
MAX_TEXT = 100_000  # characters at its end in which a box is looked for


def score(completion: str, answer: str, boxed: bool = False) -> float:
    r"""1.0 if the completion's answer equals the gold answer, 0.0 if not.

    Its answer is what its last complete \boxed{...} holds. Without a box it has none (boxed=True,
    for prompts that ask for a box), or it is the last number of a text of nothing but numbers,
    what follows "answer is" or "####", or what math-verify finds in the text.

    Numbers are equal to six places, 28% is 0.28 and 28, sets have no order, x < 3 is (-\infty, 3).
    Units are dropped, but a bare letter is no unit. Of the choices A to J only one may be named.
    Never raises on a completion; one that is not judged in time gets 0.0 and a warning.
    """
    judge = _shared[boxed]
    reward = float(judge.score_many([completion], [answer])[0])
    if judge.no_verdict:
        warnings.warn(f"no verdict, so 0.0: a completion ending {completion[-60:]!r}", stacklevel=2)
    return reward


# \boxed 5 is legal TeX, and MATH has some.
BRACES = re.compile(r"(?s)\\f?boxe?d?\s*\{|\\boxed\s*-?[0-9][0-9.,/]*(?![0-9A-Za-z])|\\.|[{}]")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...}, or None: one pass, whatever the nesting."""
    last, opened = (-1, -1), []  # opened: where a box's content starts; -1 for a plain brace
    for token in BRACES.finditer(text):
        start, end = -1, token.start()  # of what is in the box that ends here, if any
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else -1)
        elif token[0] == "}" and opened:
            start = opened.pop()
        elif token[0].startswith(r"\boxed"):
            start, end = token.start() + len(r"\boxed"), token.end()
        last = max(last, (start, end) if start >= 0 else last)
    return text[slice(*last)].strip() if last[0] >= 0 else None


ONE_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
# What is said to be the answer, up to the end of the sentence or to its reasons.
SAID = re.compile(
    r"(?ims)(?:####|^A:|\b(?:answer|choice|option)[\s*]*(?:is\b|:))[\s:*]*"
    r"(.*?)[\s*]*(?:(?<!\\)[.!?](?=[\s*]|$)|\b(?:not|because|since)\b|$)"
)
SHORTHAND = re.compile(  # 5 million, 1.6e-19, 1 1/2
    r"\$?[0-9][0-9.,]*(?:\s*(?:thousand|[mbtr]+illion)\b|[eE][-+]?[0-9]+|\s[0-9]+/[0-9]+)"
)
WORD = re.compile(r"(?<![\\\w])(?!(?:and|or|sqrt)\b)[^\W\d_]{2,}")


def _extract(completion: str, boxed: bool) -> tuple[str, bool]:
    """(an answer, True), or (the text in which math-verify has to find it, False)."""
    box = last_boxed(completion[-MAX_TEXT:])
    if box is not None or boxed:
        return _tidy((box or "")[: 2 * MAX_ANSWER]), True
    text = completion[-MAX_TAIL:].strip()
    if text and all(map(ONE_NUMBER.fullmatch, text.split())):
        return text.split()[-1], True  # "8 10": running totals, then the sum
    said = SAID.findall(text)
    text = said[-1] if said else text  # the last time that it is said counts
    words = WORD.search(re.sub(r"\\(?:text|mbox|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", text))
    # math-verify would choose one of "either 3 or perhaps 4"; read as one answer, it is neither.
    if not words or (said and re.search(r"\bor\b", text)):
        return _tidy(text), True
    # A sentence: math-verify picks the number out, but would take the 5 of "5 million".
    return SHORTHAND.sub(lambda m: f" ${_tidy(m[0])}$ ", text), False


# What math-verify cannot read, or misreads, is first written as it does read it.
CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "‒": "-", "°": r"^\circ ", "∞": r"\infty ", "√": r"\sqrt "}
    | {"²": "^2", "³": "^3", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
)
TEXT = r"\\(?:text[a-z]*|math(?:rm|bf|it)|mbox)\s*\{"
REWRITES = [
    *((rf"\s*(?:\\text\{{)?\s*{word}\b\}}?", rf"\\times 10^{zeros}")  # 5 million
      for word, zeros in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))),
    (r"(?<=[0-9])(?:[eE](?=[-+0-9])|\s*[x*]\s*10\s*(?:\^|\*\*)\s*)", r"\\times 10^"),  # 1.85e5
    (r"10\^[({]?([-+]?[0-9]+)[)}]?", r"10^{\1}"),  # 10^-5
    (r"(?<![0-9]{4})(?<=[0-9])(?:\{,\}|,?\s*\\[,! ] ?|[ ~])(?=[0-9]{3}(?![0-9]))", ""),  # 11,\! 111
    (r"(?<=[0-9])\{,\}(?=[0-9])", "."),  # 3{,}5 is 3.5
    (r"(?<![\w.,^/])([0-9]+)\s+([0-9]+)/([0-9]+)", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"\\frac\s*([0-9]|\\pi)\s*([0-9])", r"\\frac{\1}{\2}"),  # \frac \pi4
    (r"(?<=[0-9])(?<![_^][0-9])\s+(?=[0-9])", ", "),  # 8 2 are two numbers
    (r"(?<=[0-9])\.(?![0-9])", ""),  # 5.
    (r"(?<![A-Za-z\\])pi\b", r"\\pi"),  # 19pi
    (r"\\?\bsqrt\s*\(([^()]*)\)|\\sqrt\s*([0-9]+)", r"\\sqrt{\1\2}"),  # sqrt(2)
    (r"(?<!\\)\\!|\\(?:left|right|displaystyle)(?![A-Za-z])|^\\approx", ""),  # no meaning
    (r"\\degree(?![A-Za-z])", r"^\\circ"),  # 90\degree
    (r"^(-?)\s*\\?[$€£¥]\s*(?=[0-9.])", r"\1"),  # $18
    (rf"{TEXT}\s*(and|or)\b([^{{}}]*)\}}", r" \1 \\text{\2}"),  # 3\text{ and }4
    (rf"(?<=[0-9])\s*{TEXT}[^{{}}]*\}}(?=\s*(?:,|and\b|or\b))", ""),  # 3\text{ m}, 4\text{ m}
    (rf"^{TEXT}([^{{}}]*)\}}$|\\mathrm\{{([a-zA-Z])\}}", r"\1\2"),  # \text{no}, \mathrm{e}
    (r"(?<=[0-9}])\s+([A-Za-z]{2,}(?: [A-Za-z]+)*)$", r"\\text{ \1}"),  # 18 dollars
    # a column is a tuple
    (r"^\\begin\{[pb]matrix\}([^&]*)\\end.*$", lambda m: f"({m[1]})".replace(r"\\", ",")),
    (r"^\\\{\s*[a-z]\s*(?:\||:|\\mid)(.*)\\\}$", r"\1"),  # {x | x < 3} is x < 3
    (r"(\\(?:sin|cos|tan)\s*)[({]?([0-9.]+)\s*\^\{?\\circ\}?[)}]?", r"\1(\2\\pi/180)"),  # \sin 60^\circ
]  # fmt: skip
REWRITES = [(re.compile(pattern), new) for pattern, new in REWRITES]


def _tidy(text: str) -> str:
    """An answer as math-verify should see it."""
    if ONE_NUMBER.fullmatch(text):
        return text  # what most answers are
    text = (SAID.findall(text) or [text])[-1]  # "Answer is 3" in a box
    text = (last_boxed(text) or text).strip("* \n")
    # Dollars and brackets around a formula, not the $ of $18.
    text = re.sub(r"\$\$|\\[\[\]()]|^\$([^$]*)\$$", r"\1", text)
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS))  # full-width digits
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".,;:? ")  # punctuation of the sentence around it


NUMBER = re.compile(
    r"([-+]?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?)(?:/0*([1-9][0-9]*))?"
)


def _number(text: str) -> Fraction | None:
    r"""The value of 3, -1,234.5, 7/25 or \frac{7}{25}; None for anything else."""
    text = re.sub(r"^([-+]?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    found = NUMBER.fullmatch(text)
    return found and Fraction(found[1].replace(",", "")) / int(found[2] or 1)


def _decide(given: str, alone: bool, gold: str) -> bool | None:
    """The verdict where text or plain numbers settle it; None where it takes math-verify."""
    # "4, 205" is a list and "4,205" a number: a space after a comma counts.
    a, b = (re.sub(r"(?<!,)\s+", "", text) for text in (given, gold))
    if a == b:
        return True
    if not given or (alone and len(given) > MAX_ANSWER):
        return False  # nothing, or too much to be an answer
    # A choice must be the only one named: "B or C" is neither.
    if letter := re.fullmatch(r"(?:\\[a-z]+)?\W*([A-J])\W*", gold):
        named = re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z^_])", given)
        return alone and (set(named) == {letter[1]} or given == letter[1].lower())
    if re.fullmatch(r"[A-Za-z']{3,}", a) and re.fullmatch(r"[A-Za-z']{3,}", b):
        return a.casefold() == b.casefold()  # math-verify multiplies letters
    # It ignores the base of 43_5, and whether a pair is a set, a tuple or an interval.
    base, gold_base = (re.findall(r"[0-9]_\{?([0-9]+)", text) for text in (given, gold))
    if base and gold_base and base != gold_base:
        return False
    for x, y in ((given, gold), (gold, given)):
        if x.startswith(r"\{") and re.search(r"^[(\[].*,|[<>]|\\[lg]e", y):
            return False
    x, y = _number(given), _number(gold.removesuffix(r"\%"))  # a percent sign may be left out
    if x is not None and x == y:
        return True
    y = _number(gold)
    # Close ones are left to math-verify's six decimal places.
    if x is None or y is None or (x != y and abs(x - y) < 1e-5):
        return None
    return x == y


def _judge(given: str, alone: bool, gold: str) -> bool:
    """math-verify's verdict. Runs in a worker, and raises what math-verify raises."""
    import math_verify

    # "x=3, y=7" has an order where the letters are left out.
    if "=" not in given and re.fullmatch(r"([a-z] ?= ?[^=,]+, ?)+[a-z] ?= ?[^=,]+", gold):
        gold = f"({re.sub('[a-z] ?=', '', gold)})"
    golds, found = _parse(gold, True), _parse(given, alone)
    # It finds no number in "答案是48。" or "we get (5)": the last one counts.
    if not found and not alone and (last := ONE_NUMBER.findall(given)):
        found = _parse(last[-1], True)
    settings = {"timeout_seconds": None, "raise_on_error": True, "allow_set_relation_comp": True}
    if not math_verify.verify(golds, found, **settings):
        return False
    # It takes 1/2004! for 1/2005! and 1.6e-19 for 0: tiny numbers must agree to 1% as well.
    sizes = [abs(x[0].doit().evalf()) for x in (golds, found) if getattr(x[0], "is_number", 0)]
    large = max(sizes, default=1)
    return bool(len(sizes) < 2 or large >= 1e-4 or large - min(sizes) <= large / 100)


@functools.lru_cache(maxsize=1000)  # a gold answer comes back with every rollout of its prompt
def _parse(text: str, alone: bool) -> list:
    """[sympy object, text], [text] or [], as math-verify reads it."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # math-verify would take the t of 4t for tons, the c of x+4c for cents.
    plain = re.sub(r"\\[A-Za-z]+\s*(?:\{[^{}]*\})?", " ", text)
    letters = alone and re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", plain)
    form = NormalizationConfig(True, not letters, malformed_operators=True, nits=True)
    # An answer is read whole or not at all: not by the one number that a formula contains.
    kinds = [LatexExtractionConfig(not alone, normalization_config=form)]
    kinds += [] if alone else [ExprExtractionConfig()]
    # Its own time limits use the one alarm clock of a process, and fail in threads.
    text = f"\\boxed{{{text}}}" if alone else text
    return parse(text, kinds, parsing_timeout=None, raise_on_error=True)


# --------------------------------------------------------------------------------------- judges

MEMORY = 1 << 30  # bytes of address space of one worker process
GRACE = 0.5  # seconds after which a worker that ignores its alarm is killed
START = 120  # seconds in which a new worker must be ready (it takes about one)


class Verifier(AbstractContextManager):
    """Scores batches of completions; math-verify, which can hang, runs in worker processes.

    timeout: whole seconds for one completion. boxed: as in `score`.
    timeouts, failures: how many got 0.0 so far because time ran out, or because math-verify
    raised or met its memory limit. no_verdict: where in the latest batch they stand.

    Workers are new processes that do not import your main module: safe beside CUDA and in
    threads. close(), a with statement or the end of this process ends them. Not on Windows.
    """

    def __init__(self, workers: int = 2, timeout: int = 5, boxed: bool = False):
        if workers < 1 or timeout < 1 or timeout != int(timeout):
            raise ValueError(f"need workers >= 1 and whole seconds >= 1, not {workers}, {timeout}")
        self.timeout, self.boxed = int(timeout), boxed
        self.timeouts = self.failures = 0
        self.no_verdict = set()
        self._workers = [_Worker() for _ in range(workers)]
        self._replies = {}  # job (given, alone, gold) -> verdict, "timeout" or "failure"
        self._lock = threading.Lock()  # one batch at a time

    def close(self, *_: object) -> None:
        """End the processes; a later batch starts new ones."""
        for worker in self._workers:
            worker.kill()

    __exit__ = close

    def __call__(self, tasks, texts):
        """A verifier is itself a reward."""
        return self.score_many(texts, [task.answer for task in tasks])

    def score_many(self, completions: list[str], answers: list[str]):
        """Rewards (R,) in {0., 1.}: completions[i] against the gold answers[i]."""
        import numpy as np  # not at the top: a worker does without

        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions for {len(answers)} answers")
        golds = {answer: _tidy(answer) for answer in set(answers)}
        pairs = zip(completions, answers, strict=True)
        jobs = [(*_extract(text, self.boxed), golds[answer]) for text, answer in pairs]
        with self._lock:
            if len(self._replies) > 50_000:
                self._replies.clear()  # it must not grow for ever
            # First what is decided on the spot, then, in worker processes, the rest.
            for job in set(jobs) - self._replies.keys():
                self._replies[job] = _decide(*job)
            self._ask([job for job in dict.fromkeys(jobs) if self._replies[job] is None])
            replies = [self._replies[job] for job in jobs]
        self.no_verdict = {i for i, reply in enumerate(replies) if isinstance(reply, str)}
        return np.array([float(reply is True) for reply in replies])  # (R,)

    def _ask(self, jobs: list[tuple]) -> None:
        """Put the workers' replies into the table. A thread looks after each worker."""
        idle = list(self._workers)  # as many as threads: pop() always finds one

        def judge(job):
            worker = idle.pop()
            try:
                return worker.judge(job, self.timeout)
            finally:
                idle.append(worker)

        threads = ThreadPoolExecutor(len(self._workers))
        try:
            for job, reply in zip(jobs, threads.map(judge, jobs), strict=True):
                self._replies[job] = reply
                self.timeouts += reply == "timeout"
                self.failures += reply == "failure"
        finally:  # after Ctrl-C no reply may be left in a pipe: finish the jobs under way
            threads.shutdown(cancel_futures=True)


class _Worker:
    """A process, started when it is first needed, and this end of the pipe to it."""

    process: subprocess.Popen | None = None

    def judge(self, job: tuple, timeout: int) -> bool | str:
        """True, False, "timeout" or "failure"."""
        if self.process is None:
            self.start()
        try:
            self.pipe.send((timeout, job))
            if self.pipe.poll(timeout + GRACE):
                return self.pipe.recv()
            reply = "timeout"
        except (EOFError, OSError):  # it died
            reply = "failure"
        self.kill()
        return reply

    def start(self) -> None:
        self.pipe, theirs = Pipe()  # closes, and so ends the worker, when this process dies
        end = theirs.fileno()
        command = [sys.executable, "-P", __file__, str(end)]
        # In a session of its own, because Ctrl-C is for this process to handle.
        popen = functools.partial(subprocess.Popen, stdin=subprocess.DEVNULL)
        self.process = popen(command, pass_fds=[end], start_new_session=True)
        theirs.close()
        with suppress(EOFError):  # it ended before it was ready
            if self.pipe.poll(START) and self.pipe.recv() == "ready":
                return
        self.kill()
        raise RuntimeError("a verifier process could not start: is math-verify installed?")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.pipe.close()
            self.process = None


_shared = [Verifier(workers=1, boxed=boxed) for boxed in (False, True)]  # for score()


class _TimeUp(BaseException):
    """Not an Exception, because sympy catches those."""


def _time_up(*_: object) -> None:
    raise _TimeUp


def _serve(pipe: Connection) -> None:
    """A worker's life: a reply to each job, until the pipe closes."""
    import resource

    import math_verify  # noqa: F401  (takes a second: now, not in the first job's time)

    logging.disable(logging.WARNING)  # it warns that its own time limits are off
    if sys.platform == "linux":  # macOS has the call, but not the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _time_up)
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            timeout, job = pipe.recv()
            try:
                signal.alarm(timeout)
                try:
                    reply = _judge(*job)
                finally:
                    signal.alarm(0)
            except _TimeUp:
                reply = "timeout"
            except MemoryError:
                return  # and be replaced: what is left of this process is of no use
            except Exception:  # sympy's are of many kinds; they are counted
                reply = "failure"
            pipe.send(reply)


# ---------------------------------------------------------------------------------- own rewards


def load_reward(spec: str):
    """The function that "FILE.py:FUNCTION" names. What its file raises is not caught."""
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"reward {spec!r}: no Python file {file!r}: write FILE.py:FUNCTION")
    # By its path, so that a reward.py of the user's does not become this one.
    found = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module  # dataclasses look there
    sys.path.append(str(path.parent))  # for modules beside it
    found.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"reward {spec!r}: there is no function {name!r} in {file}")
    return getattr(module, name)


class BadReward(ValueError):
    """A reward function returned what is no reward."""


def grade(reward, tasks: list[Task], texts: list[str]):
    """reward(tasks, texts) as an array (R,) in [0, 1]; ValueError if it is no such thing."""
    import numpy as np

    name = f"reward {getattr(reward, '__name__', type(reward).__name__)}"
    given = reward(tasks, texts)
    given = given.tolist() if hasattr(given, "tolist") else given  # an array, a tensor
    if not isinstance(given, (list, tuple)) or len(given) != len(texts):
        count = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
        raise BadReward(f"{name} returned {count} for {len(texts)} texts: return a number for each")
    # Not float(x): a text like "1" is a mistake, not a reward.
    given = [x.item() if hasattr(x, "item") else x for x in given]
    for i, (task, x) in enumerate(zip(tasks, given, strict=True)):
        if type(x) not in (bool, int, float) or not 0 <= x <= 1:
            raise BadReward(f"{name} gave {x!r} to text {i} (task {task.id}): not in [0, 1]")
    return np.array(given, dtype=float)  # (R,)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
