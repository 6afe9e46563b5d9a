r"""The reward: problems with known answers, and a verdict of 1.0 or 0.0 on each completion.

A completion earns 1.0 when the answer in its last \boxed{} (without one, the answer its text ends
on) equals the gold answer as mathematics. Nothing else counts: no format, no length, no style.

>>> from reward import Verifier, load_tasks, score
>>> load_tasks("arithmetic")[0].prompt
'7+1+5+9+8+7+5+8='
>>> score(r"Half of them, so \boxed{\frac{1}{2}}.", "0.5")
1.0
>>> with Verifier(workers=2) as verifier:
...     verifier.score_many(["8 10", "8 11"], ["10", "10"])
array([1., 0.])

The paper calls this the outcome reward r in {0, 1}; its mean over a prompt's rollouts estimates the
prompt's success probability p. Plain numbers and equal texts are decided on the spot, the rest by
math-verify (sympy), which can hang or eat the memory: it runs in processes that may be killed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import itertools
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np  # imported in score_many: worker processes start from this file without it

# --------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """One problem: a stable id, the prompt's text as it stands, the gold answer as text."""

    id: str
    prompt: str
    answer: str


HUB = {  # name: hub id, configuration, split, prompt column, answer column, what the answer stands in
    "gsm8k": ("openai/gsm8k", "main", "train", "question", "answer", "####"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, "train", "problem", "solution", r"\boxed"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer", None),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer", None),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer", None),
    "amc23": ("math-ai/amc23", None, "test", "question", "answer", None),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer", None),
    "olympiadbench": ("math-ai/olympiadbench", None, "test", "question", "final_answer", list),
    "gpqa": ("fingertap/GPQA-Diamond", None, "test", "question", "answer", None),  # a letter, A to D
    "dapo17k": ("open-r1/DAPO-Math-17k-Processed", "all", "train", "prompt", "solution", None),
}


def load_tasks(name_or_path: str | Path) -> list[Task]:
    """The problems under a name (`arithmetic` or one of HUB), or in a JSON Lines or .parquet file.

    A file's rows hold `prompt`, `answer` and, if you like, `id`; a row without an id gets the file's stem and
    its row number, so that ids stay the same whatever else is dropped. Rows with an empty answer and rows
    that repeat a prompt are dropped, and one warning says how many of each.

    Raises ValueError, in one line that names the file and the row (from 1): unknown name, missing or
    unreadable file, malformed JSON, missing key, wrong type, repeated id, broken gold answer (see _task),
    nothing left, hub out of reach.
    """
    name = str(name_or_path)
    if name == "arithmetic":
        return _arithmetic()
    if name in HUB:
        rows, unit = _hub_rows(name), "row"
    elif not Path(name).exists():
        raise ValueError(f"no tasks {name!r}: neither a file nor one of {', '.join(['arithmetic', *HUB])}")
    else:
        rows, unit = (_parquet_rows(name), "row") if name.endswith(".parquet") else (_json_rows(name), "line")

    tasks: list[Task] = []
    ids: dict[str, int] = {}
    prompts: set[str] = set()
    n_empty = n_repeated = 0
    for number, row in rows:
        task = _task(row, f"{Path(name).stem}-{number}", where=f"{name}, {unit} {number}")
        if ids.setdefault(task.id, number) != number:
            raise ValueError(f"{name}, {unit} {number}: the id {task.id!r} is also in {unit} {ids[task.id]}")
        if not task.answer:
            n_empty += 1
        elif (text := " ".join(task.prompt.split())) in prompts:
            n_repeated += 1
        else:
            prompts.add(text)
            tasks.append(task)
    if not tasks:
        raise ValueError(f'{name}: no tasks in it: each {unit} needs a "prompt" and an "answer"')
    if n_empty or n_repeated:
        counts = f"{n_empty} with an empty answer, {n_repeated} with a repeated prompt"
        warnings.warn(f"{name}: {unit}s dropped: {counts}", stacklevel=2)
    return tasks


def _arithmetic(n_tasks: int = 1280) -> list[Task]:
    """Distinct chain sums "3+5+2=" of 2 to 10 digits from 1 to 9, the same ones every time."""
    rng = random.Random(0)
    answers: dict[str, str] = {}
    while len(answers) < n_tasks:
        digits = [rng.randint(1, 9) for _ in range(rng.randint(2, 10))]
        answers["+".join(map(str, digits)) + "="] = str(sum(digits))
    return [Task(f"arithmetic-{i:04d}", prompt, answer) for i, (prompt, answer) in enumerate(answers.items())]


def _json_rows(path: str) -> Iterator[tuple[int, object]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _parquet_rows(path: str) -> Iterator[tuple[int, object]]:
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from error


def _hub_rows(name: str) -> Iterator[tuple[int, object]]:
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it logs each retry
    hub_id, config, split, prompt, answer, container = HUB[name]
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # network, hub and cache raise kinds of their own: name it and stop
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        advice = "check the network, or give a JSON Lines file instead"
        raise ValueError(f"{name}: no {hub_id} from the Hugging Face hub: {advice} ({reason})") from error
    if missing := {prompt, answer}.difference(rows.column_names):
        raise ValueError(f"{name}: {hub_id} has no column {sorted(missing)}: correct its line in reward.HUB")
    for number, row in enumerate(rows, start=1):
        gold = row[answer]
        if container == "####":
            gold = gold.rpartition("####")[2].replace(",", "")
        elif container == r"\boxed":
            gold = last_boxed(gold) or ""
        elif container is list:
            gold = gold[0] if gold else ""
        yield number, {"prompt": row[prompt], "answer": gold}


def _task(row: object, default_id: str, where: str) -> Task:
    """A row as a Task; ValueError if it is no task, or if no completion could ever match its answer.

    Only what the text shows: loading must not wait for sympy. A sound answer that math-verify cannot read
    ("05:00") is legal, and compared as text.
    """
    if not isinstance(row, dict) or not row.keys() >= {"prompt", "answer"}:
        raise ValueError(f'{where}: needs the keys "prompt" and "answer"')
    prompt, answer, id_ = row["prompt"], row["answer"], row.get("id", default_id)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # a table that holds 27.0 means 27
    text = str(answer).rstrip().lstrip(" \n")  # a leading tab is the start of a misread "\\times"
    braces = [{"{": 1, "}": -1}.get(token, 0) for token in re.findall(r"\\.|[{}]", text)]
    faults = {
        "the prompt must be text": not isinstance(prompt, str) or not prompt.strip(),
        "the id must be text or a whole number": type(id_) not in (str, int),
        "the answer must be text or a number": type(answer) not in (str, int, float) or text == "nan",
        f"the answer has more than {MAX_ANSWER} characters": len(text) > MAX_ANSWER,
        # "\frac" in JSON is a form feed and "rac"
        "control character (write each \\ twice in JSON)": re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text),
        "unmatched brace": sum(braces) or min(itertools.accumulate(braces), default=0) < 0,
        "unpaired surrogate (half a character)": re.search("[\ud800-\udfff]", f"{prompt}{text}{id_}"),
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(f"{where}: {fault}: answer {answer!r:.50}, prompt {prompt!r:.50}")
    return Task(str(id_), prompt, text)


def split_held_out(tasks: Sequence[Task], n_held_out: int, seed: int = 0) -> tuple[list[Task], list[Task]]:
    """(train, held out), each in the order given; a hash of a prompt's text decides its side.

    Prompts that differ only in case, spacing or punctuation fall on the same side, so that no held-out
    problem is trained on; where such a group does not fit, a few less than asked for are held out.
    Raises ValueError unless 0 <= n_held_out < len(tasks).
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
MAX_TAIL = 1000  # characters at the end of a text without a box in which an answer is looked for
MAX_TEXT = 100_000  # characters at the end of a completion in which a box is looked for


def score(completion: str, answer: str) -> float:
    r"""The reward of one completion: 1.0 if its answer equals the gold answer, 0.0 if not.

    Where the answer is: in the last complete \boxed{...} (one cut off by the length limit is none).
    Without a box: if the text is nothing but numbers and spaces, its last number (so "8 10" answers
    3+5+2= with running totals; math-verify reads "8 100" as 8100); if the gold answer is a letter from
    A to J, the last choice named, as in "the answer is (B)"; else what math-verify extracts from the
    last MAX_TAIL characters ("the answer is ..." before other formulas before other numbers); else the
    last number in them. A truncated completion is a text like any other.

    What is equal: equal texts; equal numbers; else what math-verify says. Its conventions hold, but for
    those marked * where it misreads or contradicts itself:
    - decimals are equal if they agree to six places, * tiny ones only if also within 1% (1.6e-19 is not 0)
    - 28% equals 0.28 and 7/25, and also 28 if the gold answer has the % or is a whole number without it
    - 1\frac{1}{2} and * 1 1/2 are 3/2; * 1.85e5, 1.85 x 10^5 and 1.85\cdot10^{5} are 185000
    - 1,234 and 1{,}234 and * 1\,234 are 1234; 3,5 is a list of two, * 3{,}5 is the decimal 3.5
    - * 5 million is 5000000
    - * 8 2 is a list of two (math-verify adds them up to 10); 3+5 equals 8, worked out or not
    - * "the final answer is 3 * 4 = 11" says 11
    - units, currencies and degree signs are dropped, not converted: 5 cm equals 5 and 5 m
    - sets and lists in any order, tuples and intervals in theirs; x < 3 equals (-\infty, 3); x = 5 equals 5
    - words in \text{} and single letters in either case; 43_5 equals 43 * but not 43_7

    Never raises on a completion, whatever is in it: one that math-verify does not finish gets 0.0 and a
    warning. Keeps one worker process for the life of this one; for a batch, use a Verifier of your own.
    """
    before = _shared.timeouts + _shared.failures
    reward = float(_shared.score_many([completion], [answer])[0])
    if _shared.timeouts + _shared.failures > before:
        warnings.warn(f"no verdict, so 0.0, on a completion that ends {completion[-60:]!r}", stacklevel=2)
    return reward


BRACES = re.compile(r"\\boxed\s*\{|\\boxed\s*-?[0-9][0-9.,/]*|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...}, or None: one pass, whatever the nesting."""
    last, opened = (-1, -1), []  # opened: where the content of each open brace starts; -1 if not a box's
    for token in BRACES.finditer(text):
        start, end = -1, token.start()
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else -1)
        elif token[0] == "}" and opened:
            start = opened.pop()
        elif token[0].startswith(r"\boxed"):  # \boxed 5 is legal TeX, and MATH has some
            start, end = token.start() + len(r"\boxed"), token.end()
        last = max(last, (start, end) if start >= 0 else last)
    return text[slice(*last)].strip() if last[0] >= 0 else None


ONE_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
LETTER = re.compile(  # C, (C), \text{(C)}, C) 42
    r"(?:\\[a-z]+\{)*[({\[]*([A-J])[)}\].:]*(?:(?<=[).:])\}?\s.*)?", re.DOTALL
)
CHOICE = re.compile(
    r"(?i:answer|option|choice)(?i:\s+is)?[^A-Za-z0-9]{0,9}(?:[a-z]+\{\(?)?([A-J])\b|\(([A-J])\)"
)

WORKING = re.compile(  # "the final answer is 3 * 4 = 12": math-verify takes the 3 * 4, whatever it says next
    r"(?i)(final answer is:?\s*\$?)(?:[0-9][0-9.,\s+\-*/×÷x()$]*=\s*)+(?=[-$]?\.?[0-9])"
)


def _extract(completion: str, gold: str) -> tuple[str, bool]:
    """(the answer, True), or (the text in which math-verify has to find it, False)."""
    boxed = last_boxed(completion[-MAX_TEXT:])
    if boxed is not None:
        return (_tidy(boxed, alone=True) if len(boxed) <= MAX_ANSWER else boxed), True
    tail = completion[-MAX_TAIL:].strip()
    if tail and all(map(ONE_NUMBER.fullmatch, tail.split())):
        return tail.split()[-1], True
    if LETTER.fullmatch(gold) and (choices := CHOICE.findall(tail)):
        return max(choices[-1]), True
    return _tidy(WORKING.sub(r"\1", tail), alone=False), False


# What math-verify cannot read, or reads as something else, is first written as it does read it.
CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "°": r"^\circ "}
    | {"∞": r"\infty ", "∪": r"\cup ", "²": "^2", "³": "^3", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
    | {"\u00a0": " ", "\u202f": " "}
)
SCIENTIFIC = (  # 1.85e5, 1.85 x 10^5, 1.85\times10^{5}, 10^-5; but not x_2 x 10^5, 10^5^2, 10^5x
    r"(?<![\w.^/])(?:([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)"
    r"(?:[eE](?=[-+0-9])|\s*(?:\\times|\\cdot|[x*])\s*10\s*(?:\^|\*\*)\s*)|10\^)"
    r"([{(])?([-+]?[0-9]{1,2})(?(2)[)}])(?![\w.]*[0-9!^]|[A-Za-z])"
)
LARGE = r"([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)\s*(\\text\{)?\s*(thousand|million|billion|trillion)\b"
ZEROS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MIXED = r"(?<![\w.,^/])([0-9]{1,9})(?: *\\[dt]?frac\{| +)([0-9]{1,9})(?:\}\{|/)([0-9]{1,9})(?:\}|(?![0-9]))"
THIN = r"(?:\{,\}|,?\\[,! ]|,\\!|[ ~])"  # what stands between thousands, besides a plain comma
REWRITES = [
    (SCIENTIFIC, lambda m: f"{Decimal((m[1] or '1').replace(',', '')).scaleb(int(m[3])):f}"),  # 185000
    (MIXED, lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}"),  # 1 1/2, 1\frac{1}{2} -> 3/2
    (LARGE, lambda m: f"{Decimal(m[1].replace(',', '')).scaleb(ZEROS[m[3]]):f}{m[2] or ''}"),  # 5 million
    # so far safe anywhere; from here on only in a text that is nothing but the answer
    (rf"(?<![0-9.,])[0-9]{{1,3}}(?:{THIN}[0-9]{{3}})+(?![0-9])", lambda m: re.sub("[^0-9]", "", m[0])),
    (r"(?<=[0-9])\{,\}(?=[0-9])", "."),  # 3{,}5 -> 3.5
    (r"(?<!\\)\\!|\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\degree(?![A-Za-z])", r"^\\circ"),
    (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
    (r"(?:√|\\?\bsqrt)\s*\(([^()]*)\)|√\s*([0-9]+|[a-z])", r"\\sqrt{\1\2}"),
    (r"\s*(?:\\text\{\s*)?\bpercent\b\s*\}?|\s*(?<!\\)%", r"\\%"),
    (r"^(-?)\s*\\?[$€£¥]\s*(?=[0-9.])", r"\1"),  # $18 -> 18
    (r"(?<=[0-9])(?<![_^][0-9])\s+(?=[0-9])", ", "),  # 8 2 -> 8, 2
    (r"(?<=[0-9])\.(?![0-9])", ""),  # 5. -> 5
    (r"^(-?[0-9.,]+) ([A-Za-z]{3,}(?: [A-Za-z]+)*)$", r"\1\\text{ \2}"),  # 18 dollars
]
REWRITES = [(re.compile(pattern), new) for pattern, new in REWRITES]


def _tidy(text: str, alone: bool) -> str:
    """The text as math-verify should see it; alone: it is nothing but the answer."""
    if ONE_NUMBER.fullmatch(text):
        return text  # what most answers are
    if alone:
        text = (last_boxed(text) or text).strip()
        if text[:1] == text[-1:] == "$" and text.count("$") == 2:
            text = text[1:-1]
    text = text.translate(CHARACTERS)
    for pattern, new in REWRITES if alone else REWRITES[:3]:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".,;: " if alone else None)


BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
NUMBER = re.compile(r"[-+]?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+|/0*[1-9][0-9]*)?")


def _number(text: str) -> Fraction | None:
    r"""The value of 3, -1,234.5, 7/25 or \frac{7}{25}; None for anything else."""
    text = re.sub(r"^([-+]?)\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text)
    return Fraction(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def _decide(given: str, alone: bool, gold: str) -> float | None:
    """The verdict where text or plain numbers settle it; None where it takes math-verify."""
    if "".join(given.split()) == "".join(gold.split()):
        return 1.0
    if not given or (alone and len(given) > MAX_ANSWER):
        return 0.0
    if (letter := LETTER.fullmatch(given)) and (gold_letter := LETTER.fullmatch(gold)):
        return float(letter[1] == gold_letter[1])
    if (based := BASED.fullmatch(given)) and (gold_based := BASED.fullmatch(gold)):
        return float(based.groups() == gold_based.groups())  # math-verify drops the bases of 43_5 and 43_7
    a, b = _number(given.removesuffix(r"\%")), _number(gold.removesuffix(r"\%"))
    if a is None or b is None:
        return None
    percent, gold_percent = given.endswith("%"), gold.endswith("%")
    pairs = [(a / 100 if percent else a, b / 100 if gold_percent else b)]
    if percent != gold_percent and (gold_percent or b.denominator == 1):
        pairs.append((a, b))  # a percent sign left out, or put in
    for x, y in pairs:
        to_six_places = "." in given + gold and round(x, 6) == round(y, 6)
        if x == y or (to_six_places and not _differ_below_six_places(x, y)):
            return 1.0
    return 0.0


def _differ_below_six_places(x: complex | Fraction, y: complex | Fraction) -> bool:
    largest = max(abs(x), abs(y))
    return largest < 1e-4 and abs(x - y) > largest / 100


def _judge(given: str, alone: bool, gold: str) -> bool:
    """math-verify's verdict. Runs in a worker, and raises what math-verify raises."""
    import math_verify

    found = _parse(f"\\boxed{{{given}}}" if alone else given)
    if not found and not alone and (numbers := ONE_NUMBER.findall(given)):
        found = _parse(numbers[-1])
    settings = {"timeout_seconds": None, "raise_on_error": True, "allow_set_relation_comp": True}
    error = None
    for a, b in itertools.product(_parse(f"\\boxed{{{gold}}}"), found):
        try:
            if math_verify.verify(a, b, **settings):
                numbers = [complex(x.doit().evalf()) for x in (a, b) if getattr(x, "is_number", False)]
                return len(numbers) < 2 or not _differ_below_six_places(*numbers)
        except Exception as e:  # these two cannot be compared; the next two (as texts) may
            error = e
    if error is not None:
        raise error
    return False


@functools.lru_cache(maxsize=1000)  # a gold answer comes back with every rollout of its prompt
def _parse(text: str) -> list:
    """[sympy object, text], [text] or [], as math-verify reads it.

    Its own time limits are off: they would take the one alarm clock a process has, and that is ours.
    """
    import math_verify
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig

    found = math_verify.parse(text, parsing_timeout=None, raise_on_error=True)
    if found and isinstance(found[0], str):  # it takes some letters for units ("a + b + c" ends on a cent)
        keep_units = NormalizationConfig(True, units=False, malformed_operators=True, nits=True, boxed="all")
        config = [math_verify.LatexExtractionConfig(normalization_config=keep_units)]
        found = math_verify.parse(text, config, parsing_timeout=None, raise_on_error=True)
    return found


# ----------------------------------------------------------------------------------------- pool

MEMORY = 1 << 30  # bytes of address space of one worker process
GRACE = 0.5  # seconds beyond its time limit after which a worker is stuck, and is killed
START = 120  # seconds in which a new worker must be ready (it takes about one)


class Verifier:
    """Scores batches of completions; what takes math-verify, in worker processes that may be killed.

    workers: how many processes. None starts before a completion needs it; plain arithmetic never does.
    timeout: whole seconds for one completion.
    timeouts, failures: how many got 0.0 without a verdict so far, because time ran out, or because
        math-verify raised or its process died (of its memory limit, most likely).
    no_verdict: where in the latest batch those without a verdict stand.

    Workers are new processes, not forks, and do not import your main module as multiprocessing's do: safe
    beside CUDA, from threads, in pytest, in a script without a main guard. Use a with statement or call
    close(); they also end by themselves when this process does. Linux and macOS only.
    """

    def __init__(self, workers: int = 2, timeout: int = 5):
        if workers < 1 or timeout < 1 or timeout != int(timeout):
            raise ValueError(f"need workers >= 1 and whole seconds >= 1, got {workers} and {timeout}")
        self.timeouts = self.failures = 0
        self.no_verdict: set[int] = set()
        self._workers = [_Worker(int(timeout)) for _ in range(workers)]
        self._cache: dict[tuple[str, bool, str], bool | str] = {}  # job -> a worker's reply
        self._lock = threading.Lock()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a later batch starts new ones."""
        for worker in self._workers:
            worker.kill()

    def score_many(self, completions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Rewards (R,) in {0., 1.}: completions[i] against the gold answers[i], as `score` has it.

        What has been judged before is remembered. Raises ValueError if the lengths differ, RuntimeError
        if a worker cannot start; nothing because of a completion.
        """
        import numpy as np

        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions for {len(answers)} answers")
        golds = {answer: _tidy(answer, alone=True) for answer in set(answers)}
        rewards = np.zeros(len(completions))  # (R,)
        undecided: dict[tuple[str, bool, str], list[int]] = {}  # job -> where its verdict goes
        for i, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            given, alone = _extract(completion, golds[answer])
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

    def _judge_all(self, jobs: list[tuple[str, bool, str]]) -> None:
        """Put the verdict on each job into the cache. A thread looks after each worker."""
        idle = list(self._workers)  # as many as threads: pop() always finds one

        def judge(job: tuple[str, bool, str]) -> bool | str:
            worker = idle.pop()
            try:
                return worker.judge(job)
            finally:
                idle.append(worker)

        threads = ThreadPoolExecutor(len(self._workers))
        try:
            for job, reply in zip(jobs, threads.map(judge, jobs), strict=True):
                self._cache[job] = reply
                self.timeouts += reply == "timeout"
                self.failures += reply == "failure"
        finally:  # after Ctrl-C: wait for the jobs under way only, so that no reply is left in a pipe
            threads.shutdown(cancel_futures=True)


class _Worker:
    """A process, started when it is first needed, and this end of the pipe to it."""

    def __init__(self, timeout: int):
        self.timeout = timeout
        self.process: subprocess.Popen | None = None

    def judge(self, job: tuple[str, bool, str]) -> bool | str:
        """True, False, "timeout" or "failure". Raises RuntimeError if no process can be started."""
        if self.process is None:
            self.start()
        try:
            self.pipe.send(job)
            if self.pipe.poll(self.timeout + GRACE):
                return self.pipe.recv()
            reply = "timeout"
        except (EOFError, OSError):  # it died
            reply = "failure"
        self.kill()
        return reply

    def start(self) -> None:
        self.pipe, theirs = Pipe()
        command = [sys.executable, "-P", __file__, str(theirs.fileno()), str(self.timeout)]
        self.process = subprocess.Popen(  # in a session of its own: Ctrl-C is for this process to handle
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        try:
            if self.pipe.poll(START) and self.pipe.recv() == "ready":
                return
        except EOFError:
            pass
        self.kill()
        raise RuntimeError("a verifier process could not start: is math-verify installed? (see stderr)")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.pipe.close()
            self.process = None


_shared = Verifier(workers=1)  # for score(): no process before it needs one
atexit.register(_shared.close)


class _TimeUp(BaseException):
    """Not an Exception: sympy catches those."""


def _serve(pipe: Connection, timeout: int) -> None:
    """A worker's life: a reply to each job, until the pipe closes."""
    import resource

    import math_verify  # noqa: F401  (takes a second: now, not in the first job's time)

    def time_up(*_: object) -> None:
        raise _TimeUp

    logging.disable(logging.WARNING)  # it warns that its own time limits are off
    signal.signal(signal.SIGALRM, time_up)
    if sys.platform == "linux":  # macOS has the call, but not the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send("ready")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            signal.alarm(timeout)
            try:
                reply = _judge(*job)
            finally:
                signal.alarm(0)
        except _TimeUp:
            reply = "timeout"
        except MemoryError:
            return  # and be replaced: what is left of this process is not worth keeping
        except Exception:
            reply = "failure"
        pipe.send(reply)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
