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

The paper calls this the outcome reward r in {0, 1}. Your own is a function of a batch of tasks
and texts, in any file: `--reward FILE.py:FUNCTION`. A task's extra has its row's other columns.

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
import numbers
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
from decimal import Decimal
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
    what datasets' save_to_disk makes. One warning says which columns were taken and what was
    dropped. ValueError, in one line that names the file and the row, for what is no task.
    """
    name = str(name_or_path)
    if name == "arithmetic":
        return _arithmetic()
    rows = _hub_rows(name) if name in HUB else _file_rows(Path(name).expanduser())
    unit = "line" if ".jsonl" in name.lower() else "row"
    stem = Path(re.sub(r"(?i)\.gz$", "", name)).stem
    tasks: dict[str, Task | None] = {}  # by the prompt's text, its spacing evened out
    seen: dict[str, int] = {}  # id -> its row
    notes: Counter[str] = Counter()
    conflict = ""
    for number, row in rows:
        where = f"{name}, {unit} {number}"
        task = _task(row, f"{stem}-{number}", where, notes)
        if seen.setdefault(task.id, number) != number:
            raise ValueError(f"{where}: the id {task.id!r} is also in {unit} {seen[task.id]}")
        if not task.answer:
            notes["with an empty answer (dropped)"] += 1
            continue
        key = " ".join(task.prompt.split())
        first = tasks.setdefault(key, task)
        if first is not task:
            notes["with a repeated prompt (dropped)"] += 1
        # Nobody can say which of two answers is right: the prompt goes altogether.
        if first and first.answer != task.answer:
            notes["prompts with different answers (dropped)"] += 1
            conflict = conflict or f"; the first of different answers: {first.id}, {task.id}"
            tasks[key] = None
    kept = [task for task in tasks.values() if task]
    if not kept:
        raise ValueError(f'{name}: no tasks in it: each {unit} needs a "prompt" and an "answer"')
    if +notes:
        counts = ", ".join(f"{count} {note}" for note, count in (+notes).items())
        warnings.warn(f"{name}: of {len(seen)} {unit}s, {counts}{conflict}", stacklevel=2)
    return kept


def _arithmetic(n_tasks: int = 1280) -> list[Task]:
    """Distinct chain sums "3+5+2=" of 2 to 10 digits from 1 to 9, the same every time."""
    rng = random.Random(0)
    answers: dict[str, str] = {}
    while len(answers) < n_tasks:
        digits = [rng.randint(1, 9) for _ in range(rng.randint(2, 10))]
        answers["+".join(map(str, digits)) + "="] = str(sum(digits))
    return [Task(f"arithmetic-{i:04d}", *pair) for i, pair in enumerate(answers.items())]


def _file_rows(path: Path):
    """(number from 1, row) for each row of a file or folder."""
    if not path.exists():
        known = ", ".join(["arithmetic", *HUB])
        raise ValueError(f"no tasks {str(path)!r}: neither a file nor one of {known}")
    kinds = [suffix.lower() for suffix in path.suffixes]
    try:
        if path.is_dir():
            import datasets  # takes seconds

            rows = datasets.load_from_disk(str(path))
            return enumerate(rows["train"] if isinstance(rows, dict) else rows, 1)
        if ".parquet" in kinds:
            import pyarrow.parquet

            return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        opened = gzip.open if ".gz" in kinds else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = file.read()
    # The errors of pyarrow and of Unicode are ValueErrors.
    except (OSError, EOFError, KeyError, ValueError) as error:
        kind = "parquet" if ".parquet" in kinds else "UTF-8 text"
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as {kind}: {reason}") from error
    if ".csv" in kinds:
        return enumerate(csv.DictReader(text.splitlines(keepends=True)), 1)
    if ".json" in kinds and text.lstrip().startswith("["):
        return enumerate(_json(text, str(path)), 1)
    lines = enumerate(text.split("\n"), 1)  # splitlines() would also cut at U+2028
    return [(n, _json(line, f"{path}, line {n}")) for n, line in lines if line.strip()]


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _hub_rows(name: str):
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    hub_id, config, split = HUB[name]
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # network, hub and cache have kinds of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        where = f"{name}: no {hub_id} from the Hugging Face hub"
        raise ValueError(f"{where}: check the network, or give a file ({reason})") from error
    # The hub's own ids may be missing or of an odd type.
    return [(n, {**row, "id": f"{name}-{n}"}) for n, row in enumerate(rows, 1)]


# "... #### 18", "The answer is 14.", "Answer: 14"
GOLD = re.compile(r"(?is).*(?:####|\banswer\s*(?:is\b|:))[\s:*]*(.*?)[\s.*]*")


def _task(row: object, default_id: str, where: str, notes: Counter[str]) -> Task:
    """A row as a Task; ValueError if no completion could ever match its answer."""
    columns = list(row) if isinstance(row, dict) else []
    taken = [next((c for c in names if c in columns), None) for names in (PROMPTS, ANSWERS)]
    if None in taken:
        keys = f'needs the keys "prompt" and "answer" (or {PROMPTS[1:]} and {ANSWERS[1:]})'
        raise ValueError(f"{where}: {keys}; it has {columns}")
    prompt, answer = (row[column] for column in taken)
    id_ = row.get("id", default_id)
    if isinstance(prompt, list):  # a conversation: the text of its turns
        turns = [turn.get("content") if isinstance(turn, dict) else None for turn in prompt]
        answer = turns.pop() if turns and taken[1] == "messages" else answer
        prompt = None if None in turns else "\n\n".join(map(str, turns))
    if isinstance(answer, dict) and taken[1] == "reward_model":  # verl's form
        answer = answer.get("ground_truth")
    if isinstance(answer, list) and taken[1] == "final_answer":  # OlympiadBench's
        answer = answer[0] if answer else ""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # a table that holds 27.0 means 27

    gold = whole = str(answer).rstrip().lstrip(" \n")  # a leading tab is a misread "\\times"
    if (box := last_boxed(whole)) is not None:
        gold = box
    elif end := GOLD.fullmatch(whole):
        gold = end[1].replace(",", "") if "####" in whole else end[1]
    elif taken[1] in ("solution", "messages") and len(whole.split()) > 5:
        gold = ""  # prose that names no answer
    if default_id.rpartition("-")[0] not in HUB:
        notes[f"with {taken[0]!r} and {taken[1]!r} for prompt and answer"] += taken != ["prompt", "answer"]
        notes["with the answer cut out of a text"] += gold not in ("", whole)

    braces = re.sub(r"\\.|[^{}]", "", gold[: MAX_ANSWER + 1])
    while "{}" in braces:
        braces = braces.replace("{}", "")
    faults = {
        "the prompt must be text": not isinstance(prompt, str),
        "the prompt is blank": not str(prompt).strip(),
        "the id must be text or a whole number": type(id_) not in (str, int),
        "the answer must be text or a number": type(answer) not in (str, int, float) or gold == "nan",
        f"the answer has more than {MAX_ANSWER} characters": len(gold) > MAX_ANSWER,
        # "\frac" in JSON is a form feed and "rac".
        "control character (write each \\ twice)": re.search(r"[\0-\x09\x0b-\x1f\x7f]", gold),
        "unmatched brace": braces,
        "unpaired surrogate": re.search("[\ud800-\udfff]", f"{prompt}{gold}{id_}"),
    }
    for fault in filter(faults.get, faults):
        raise ValueError(f"{where}: {fault}: answer {answer!r:.50}, prompt {prompt!r:.50}")
    extra = {column: row[column] for column in columns if column not in (*taken, "id")}
    return Task(str(id_), prompt, gold, extra)


def split_held_out(tasks: list[Task], n_held_out: int, seed: int = 0) -> tuple[list[Task], list[Task]]:
    """(train, held out), each in the order given; a hash of a prompt's text decides its side.

    Prompts that differ only in case, spacing or punctuation fall on the same side; where such a
    group does not fit, a few less are held out. ValueError unless 0 <= n_held_out < len(tasks).
    """
    if not 0 <= n_held_out < len(tasks):
        raise ValueError(f"cannot hold out {n_held_out} of {len(tasks)} tasks: hold out fewer")
    texts = [unicodedata.normalize("NFKC", task.prompt).casefold() for task in tasks]
    texts = ["".join(filter(str.isalnum, text)) for text in texts]
    sizes, held, room = Counter(texts), set(), n_held_out
    for text in sorted(sizes, key=lambda t: hashlib.sha256(f"{seed}:{t}".encode()).digest()):
        if sizes[text] <= room:
            held.add(text)
            room -= sizes[text]
    pairs = list(zip(tasks, texts, strict=True))
    return [t for t, text in pairs if text not in held], [t for t, text in pairs if text in held]


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
    before = _shared.timeouts + _shared.failures
    reward = float(_shared.score_many([completion], [answer], boxed)[0])
    if _shared.timeouts + _shared.failures > before:
        warnings.warn(f"no verdict, so 0.0: a completion ending {completion[-60:]!r}", stacklevel=2)
    return reward


# \boxed 5 is legal TeX, and MATH has some.
BRACES = re.compile(r"(?s)\\f?boxe?d?\s*\{|\\boxed\s*-?[0-9][0-9.,/]*(?![0-9A-Za-z])|\\.|[{}]")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...}, or None: one pass, whatever the nesting."""
    last, opened = (-1, -1), []  # opened: where a box's content starts; -1 for a plain brace
    for token in BRACES.finditer(text):
        start, end = -1, token.start()
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
    r"(.*?)(?:[.!?](?=[\s*]|$)|\b(?:not|because|since)\b|$)"
)
WORD = re.compile(r"(?<![\\\w])(?!(?:and|or|sqrt)\b)[^\W\d_]{2,}")


def _extract(completion: str, boxed: bool) -> tuple[str, bool]:
    """(an answer, True), or (the text in which math-verify has to find it, False)."""
    box = last_boxed(completion[-MAX_TEXT:])
    if box is not None or boxed:
        return box or "", True
    text = completion[-MAX_TAIL:].strip()
    if text and all(map(ONE_NUMBER.fullmatch, text.split())):
        return text.split()[-1], True
    said = SAID.findall(text)
    text = said[-1].strip() if said else text
    words = WORD.search(re.sub(r"\\text\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", text))
    # math-verify would choose one of "either 3 or perhaps 4"; read as one answer, it is neither.
    return text, not words or bool(said and re.search(r"\bor\b", text))


# What math-verify cannot read, or misreads, is first written as it does read it.
CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "‒": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/"}
    | {"°": r"^\circ ", "∞": r"\infty ", "∪": r"\cup ", "√": r"\sqrt ", "²": "^2", "³": "^3"}
    | {"½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
)
DECIMAL = r"([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)"
POWER = r"(?:[eE](?=[-+0-9])|\s*(?:\\times|\\cdot|[x*])\s*10\s*(?:\^|\*\*)\s*)"
EXPONENT = r"([{(])?([-+]?[0-9]{1,2})(?(2)[)}])(?![\w.]*[0-9!^]|[A-Za-z])"
OVER = r"([0-9]{1,9})(?:\}\{|/)([0-9]{1,9})(?:\}|(?![0-9]))"
ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
THIN = r"(?:\{,\}|,?\\[,! ] ?|,\s*\\! ?|[ ~])"  # between thousands
TEXT = r"\\(?:text[a-z]*|math(?:rm|bf|it)|mbox)\s*\{"


def _shifted(number: str, places: int) -> str:
    return f"{Decimal(number.replace(',', '')).scaleb(places):f}"


REWRITES = [
    # 1.85e5, 1.85 x 10^5, 1.85\times10^{5} -> 185000; 5 million -> 5000000; 1 1/2 -> 3/2
    (rf"(?<![\w.^/])(?:{DECIMAL}{POWER}|10\^){EXPONENT}", lambda m: _shifted(m[1] or "1", int(m[3]))),
    (rf"{DECIMAL}\s*(?:\\text\{{)?\s*({'|'.join(ZEROS)})\b\}}?", lambda m: _shifted(m[1], ZEROS[m[2]])),
    (
        rf"(?<![\w.,^/])([0-9]{{1,9}})(?: *\\[dt]?frac\{{| +){OVER}",
        lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}",
    ),
    # These three are safe anywhere, the others where the text is nothing but an answer:
    # 11,\! 111 and 11 111 -> 11111, but 3{,}5 -> 3.5
    (rf"(?<![0-9.,])[0-9]{{1,3}}(?:{THIN}[0-9]{{3}})+(?![0-9])", lambda m: re.sub("[^0-9]", "", m[0])),
    (r"(?<=[0-9])\{,\}(?=[0-9])", "."),
    (r"(?<!\\)\\!|\\(?:left|right|displaystyle)(?![A-Za-z])|^\\approx", ""),
    # 12\text{ and }13 -> 12 and 13; 30\text{ mph}, 40 -> 30, 40; \text{no} -> no; \mathrm{e} -> e
    (rf"{TEXT}\s*(and|or)\b([^{{}}]*)\}}", r" \1 \\text{\2}"),
    (rf"(?<=[0-9])\s*{TEXT}[^{{}}]*\}}(?=\s*(?:,|and\b|or\b))", ""),
    (rf"^{TEXT}([^{{}}]*)\}}$|\\mathrm\{{([a-zA-Z])\}}", r"\1\2"),
    # A column and <3, 7> are tuples; {x | x < 3} is x < 3.
    (r"^\\begin\{[pb]matrix\}([^&]*)\\end.*$", lambda m: f"({m[1]})".replace(r"\\", ",")),
    (r"\\langle(.*)\\rangle", r"(\1)"),
    (r"^\\\{\s*[a-z]\s*(?:\||:|\\mid)(.*)\\\}$", r"\1"),
    (r"\\degree(?![A-Za-z])", r"^\\circ"),
    (r"(\\(?:sin|cos|tan)\s*)[({]?([0-9.]+)\s*\^\{?\\circ\}?[)}]?", r"\1(\2\\pi/180)"),
    (r"0?\.\\overline\{([0-9]+)\}", lambda m: f"{int(m[1])}/{10 ** len(m[1]) - 1}"),
    (r"\\frac\s*([0-9]|\\pi)\s*([0-9])", r"\\frac{\1}{\2}"),
    (r"\\?\bsqrt\s*\(([^()]*)\)|\\sqrt\s*([0-9]+)", r"\\sqrt{\1\2}"),
    # $18 -> 18; 18 dollars -> 18\text{ dollars}; 8 2 -> 8, 2; 5. -> 5
    (r"^(-?)\s*\\?[$€£¥]\s*(?=[0-9.])", r"\1"),
    (r"^(-?[0-9.,]+) ([A-Za-z]{2,}(?: [A-Za-z]+)*)$", r"\1\\text{ \2}"),
    (r"(?<=[0-9])(?<![_^][0-9])\s+(?=[0-9])", ", "),
    (r"(?<=[0-9])\.(?![0-9])", ""),
]
REWRITES = [(re.compile(pattern), new) for pattern, new in REWRITES]


def _tidy(text: str, alone: bool) -> str:
    """The text as math-verify should see it; alone: it is nothing but an answer."""
    if ONE_NUMBER.fullmatch(text):
        return text  # what most answers are
    if alone:
        text = (SAID.findall(text) or [text])[-1]
        text = (last_boxed(text) or text).strip("* \n")
        text = re.sub(r"\$\$|\\[\[\]()]|^\$([^$]*)\$$", r"\1", text)
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS))  # full-width digits
    for pattern, new in REWRITES if alone else REWRITES[:3]:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".,;:? " if alone else None)


NUMBER = re.compile(r"[-+]?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+|/0*[1-9][0-9]*)?")
LETTER = re.compile(r"(?s)[({\s]*([A-J])(?:[\s)}.:,]*|[)}.:,]+\s.*|\s+[(a-z].*)")


def _number(text: str) -> Fraction | None:
    r"""The value of 3, -1,234.5, 7/25 or \frac{7}{25}; None for anything else."""
    text = re.sub(r"^([-+]?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    return Fraction(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def _letter(text: str) -> str | None:
    """The one choice, A to J, that a text names."""
    text = re.sub(r"\\[a-z]+|[{}$*]|\b(?:[Oo]ption|[Cc]hoice)\b", " ", text)
    found = LETTER.fullmatch(text)
    return found[1] if found and set(re.findall(r"\b[A-J]\b", text)) == {found[1]} else None


def _decide(given: str, alone: bool, gold: str) -> float | None:
    """The verdict where text or plain numbers settle it; None where it takes math-verify."""
    # "4, 205" is a list and "4,205" a number: a space after a comma counts.
    a, b = (re.sub(r"(?<!,)\s+", "", text) for text in (given, gold))
    if a == b:
        return 1.0
    if not given or (alone and len(given) > MAX_ANSWER):
        return 0.0
    if letter := _letter(gold):
        return float(letter in (_letter(given), given.upper()))
    if re.fullmatch(r"[A-Za-z']{3,}", a) and re.fullmatch(r"[A-Za-z']{3,}", b):
        return float(a.casefold() == b.casefold())  # math-verify multiplies letters
    # It ignores the base of 43_5, and whether a pair is a set, a tuple or an interval.
    base, gold_base = (re.findall(r"[0-9]_\{?([0-9]+)", text) for text in (given, gold))
    if base and gold_base and base != gold_base:
        return 0.0
    for x, y in ((given, gold), (gold, given)):
        if x.startswith(r"\{") and re.search(r"^[(\[].*,|[<>]|\\[lg]e", y):
            return 0.0
    x, y = _number(given), _number(gold)
    if x is None or y is None:
        return None
    return 1.0 if x == y else 0.0 if abs(x - y) > 1e-5 else None


def _judge(given: str, alone: bool, gold: str) -> bool:
    """math-verify's verdict. Runs in a worker, and raises what math-verify raises."""
    import math_verify

    # "x=3, y=7" has an order where the letters are left out.
    if "=" not in given and re.fullmatch(r"([a-z] ?= ?[^=,]+, ?)+[a-z] ?= ?[^=,]+", gold):
        gold = f"({re.sub('[a-z] ?=', '', gold)})"
    golds, found = _parse(gold, True), _parse(given, alone)
    if not found and not alone and (last := ONE_NUMBER.findall(given)):
        found = _parse(last[-1], True)
    settings = {"allow_set_relation_comp": True, "timeout_seconds": None, "raise_on_error": True}
    if not math_verify.verify(golds, found, **settings):
        return False
    # It takes 1/2004! for 1/2005!, and 1.6e-19 for 0: tiny numbers must agree to 1% as well.
    tiny = [abs(x[0].doit().evalf()) for x in (golds, found) if getattr(x[0], "is_number", False)]
    return len(tiny) < 2 or bool(max(tiny) >= 1e-4 or max(tiny) - min(tiny) <= max(tiny) / 100)


@functools.lru_cache(maxsize=1000)  # a gold answer comes back with every rollout of its prompt
def _parse(text: str, alone: bool) -> list:
    """[sympy object, text], [text] or [], as math-verify reads it."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # math-verify would take the t of 4t for tons, the c of x+4c for cents.
    plain = re.sub(r"\\[A-Za-z]+\s*(?:\{[^{}]*\})?", " ", text)
    letters = alone and re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", plain)
    form = NormalizationConfig(True, not letters, malformed_operators=True, nits=True, boxed="all")
    # An answer is read whole or not at all: not by the one number that a formula contains.
    kinds = [LatexExtractionConfig(not alone, normalization_config=form)]
    kinds += [] if alone else [ExprExtractionConfig()]
    # Its own time limits use the one alarm clock of a process, and fail in threads.
    text = f"\\boxed{{{text}}}" if alone else text
    return parse(text, kinds, parsing_timeout=None, raise_on_error=True)


# --------------------------------------------------------------------------------------- judges

MEMORY = 1 << 30  # bytes of address space of one worker process
START = 120  # seconds in which a new worker must be ready (it takes about one)


class Verifier(AbstractContextManager):
    """Scores batches of completions; math-verify, which can hang, runs in worker processes.

    timeout: seconds for one completion; then its process is killed. boxed: as in `score`.
    timeouts, failures: how many got 0.0 so far for want of time, or because math-verify raised or
    its process died (of its memory limit). no_verdict: where in the latest batch those stand.

    Workers are new processes that do not import your main module: safe beside CUDA and in threads.
    They end with a with statement, close(), or this process. Linux and macOS only.
    """

    def __init__(self, workers: int = 2, timeout: float = 5, boxed: bool = False):
        if workers < 1 or timeout <= 0:
            raise ValueError(f"need workers and timeout above 0, got {workers} and {timeout}")
        self.timeout, self.boxed = timeout, boxed
        self.timeouts = self.failures = 0
        self.no_verdict: set[int] = set()
        self._workers = [_Worker() for _ in range(workers)]
        self._cache = {}  # job (given, alone, gold) -> a worker's reply
        self._lock = threading.Lock()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a later batch starts new ones."""
        for worker in self._workers:
            worker.kill()

    def __call__(self, tasks, texts):
        """A verifier is itself a reward."""
        return self.score_many(texts, [task.answer for task in tasks])

    def score_many(self, completions, answers, boxed: bool | None = None):
        """Rewards (R,) in {0., 1.}: completions[i] against the gold answers[i]."""
        import numpy as np  # not at the top: a worker does without

        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions for {len(answers)} answers")
        boxed = self.boxed if boxed is None else boxed
        golds = {answer: _tidy(answer, alone=True) for answer in set(answers)}
        rewards = np.zeros(len(completions))  # (R,)
        undecided = {}  # job -> where its verdict goes
        for i, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            given, alone = _extract(completion, boxed)
            if len(given) <= MAX_TAIL:
                given = _tidy(given, alone)
            verdict = _decide(given, alone, golds[answer])
            if verdict is None:
                undecided.setdefault((given, alone, golds[answer]), []).append(i)
            else:
                rewards[i] = verdict
        with self._lock:  # one batch at a time
            if len(self._cache) > 50_000:
                self._cache.clear()
            self._judge_all([job for job in undecided if job not in self._cache])
            self.no_verdict = set()
            for job, places in undecided.items():
                rewards[places] = self._cache[job] is True
                if isinstance(self._cache[job], str):
                    self.no_verdict.update(places)
        return rewards

    def _judge_all(self, jobs: list) -> None:
        """Put the verdict on each job into the cache. A thread looks after each worker."""
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
                self._cache[job] = reply
                self.timeouts += reply == "timeout"
                self.failures += reply == "failure"
        finally:  # after Ctrl-C no reply may be left in a pipe: finish the jobs under way
            threads.shutdown(cancel_futures=True)


class _Worker:
    """A process, started when it is first needed, and this end of the pipe to it."""

    process: subprocess.Popen | None = None

    def judge(self, job: tuple, timeout: float) -> bool | str:
        """True, False, "timeout" or "failure". Raises RuntimeError if no process can be started."""
        if self.process is None:
            self.start()
        try:
            self.pipe.send((timeout, job))
            if self.pipe.poll(timeout):
                return self.pipe.recv()
            reply = "timeout"
        except (EOFError, OSError):  # it died
            reply = "failure"
        self.kill()
        return reply

    def start(self) -> None:
        self.pipe, theirs = Pipe()
        end = theirs.fileno()
        # In a session of its own: Ctrl-C is for this process to handle.
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(end)],
            pass_fds=[end],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        with suppress(EOFError):
            if self.pipe.poll(START) and self.pipe.recv() == "ready":
                return
        self.kill()
        raise RuntimeError("a verifier process could not start: is math-verify installed? (see stderr)")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.pipe.close()
            self.process = None


_shared = Verifier(workers=1)  # for score(): no process before it needs one


def _serve(pipe: Connection) -> None:
    """A worker's life: a reply to each job, until the pipe closes."""
    import resource

    import math_verify  # noqa: F401  (takes a second: now, not in the first job's time)

    logging.disable(logging.WARNING)  # it warns that its own time limits are off
    if sys.platform == "linux":  # macOS has the call, but not the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            timeout, job = pipe.recv()
            signal.alarm(int(timeout) + 9)  # ends this process if its parent has died
            try:
                reply = _judge(*job)
            except MemoryError:
                return  # and be replaced: what is left of this process is not worth keeping
            except Exception:
                reply = "failure"
            signal.alarm(0)
            pipe.send(reply)


# ---------------------------------------------------------------------------------- own rewards


def load_reward(spec: str):
    """The function that "FILE.py:FUNCTION" names. What its file raises is not caught."""
    file, colon, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not path.is_file() or path.suffix != ".py":
        raise ValueError(f"reward {spec!r}: no file {file!r}: write FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(f"reward_of_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses look there
    sys.path.append(str(path.parent))  # for modules beside it
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {file} has no function {name!r}")
    return function


def grade(reward, tasks: list[Task], texts: list[str]):
    """reward(tasks, texts) as an array (R,) of floats in [0, 1]; ValueError if it is not that."""
    import numpy as np

    name = getattr(reward, "__name__", type(reward).__name__)
    given = reward(tasks, texts)
    given = given.tolist() if hasattr(given, "tolist") else given  # an array or a tensor
    if not isinstance(given, (list, tuple)) or len(given) != len(texts):
        count = len(given) if hasattr(given, "__len__") else type(given).__name__
        raise ValueError(f"reward {name}: {count} for {len(texts)} texts: return a number for each")
    given = [x.item() if hasattr(x, "item") else x for x in given]
    for i, (task, x) in enumerate(zip(tasks, given, strict=True)):
        if not isinstance(x, numbers.Real) or not 0 <= x <= 1:
            raise ValueError(f"reward {name}: {x!r} for text {i} (task {task.id}): must be in [0, 1]")
    return np.array(given, dtype=float)  # (R,)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
