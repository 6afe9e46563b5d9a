r"""The reward: problems with known answers, and a number in [0, 1] for each completion.

A completion earns 1.0 if the answer in its last \boxed{} (without one, the answer it
gives) equals the gold answer as mathematics: the paper's outcome reward r in {0, 1}.

>>> from reward import Task, Verifier, grade
>>> Verifier().score_many([r"So \boxed{\frac{1}{2}}.", "8 10"], ["0.5", "11"])
array([1., 0.])

A reward of your own is a function of a batch (`--reward FILE.py:FUNCTION`):

>>> def fruit(tasks, texts):  # extra: the other columns of a task's row
...     return [task.extra["fruit"] in text for task, text in zip(tasks, texts)]
>>> grade(fruit, [Task("1", "Name a fruit.", "", {"fruit": "fig"})], ["A fig."])
array([1.])
"""

import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """One problem. Its id stays the same whatever other rows are dropped."""

    id: str
    prompt: str
    answer: str  # the gold answer, as text
    # Not in the repr: checkpoints hold a hash of it.
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
# Columns for the prompt and the gold answer: the first that a row has counts.
PROMPTS = ["prompt", "question", "problem", "messages"]
ANSWERS = ["answer", "final_answer", "reward_model", "solution", "messages"]


def load_tasks(name_or_path: str | Path, answers: bool = True) -> list[Task]:
    """The problems under a name ("arithmetic" or one of HUB), or in a file or folder.

    A file is JSON Lines, a JSON array or CSV, gzipped or not, or parquet; a folder is
    one of datasets' save_to_disk. A warning says what was taken and dropped. ValueError,
    with file and row, for what is no task. answers=False: a reward needs none.
    """
    name = str(name_or_path)
    if name == "arithmetic":
        return _arithmetic()
    file = Path(re.sub(r"(?i)\.gz$", "", name))
    numbers, prompts = {}, {}  # id -> number of its row; prompt -> its tasks
    notes = set()  # what was read in other ways than as it stands
    for number, row in enumerate(_rows(name, file.suffix.lower()), 1):
        if row == "":
            continue  # a blank line
        place = "line" if isinstance(row, str) else "row"
        where = f"{name}, {place} {number}"
        try:
            row = json.loads(row) if isinstance(row, str) else row
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        default_id = f"{file.stem}-{number}"
        if name in HUB:
            row["id"] = default_id  # its own may be missing or of an odd type
        task = _task(row, default_id, where, answers, notes)
        # The tracker knows a prompt by its id.
        if (first := numbers.setdefault(task.id, number)) != number:
            raise ValueError(f"{where}: the id {task.id!r} is also in {place} {first}")
        if task.answer or not answers:
            prompts.setdefault(" ".join(task.prompt.split()), []).append(task)
    # Nobody can say which of two answers is right: such a prompt goes altogether.
    sure = [same for same in prompts.values() if not answers or len({t.answer for t in same}) == 1]
    tasks = [same[0] for same in sure]
    if not tasks:
        raise ValueError(f'{name}: no tasks in it: bring "prompt" and "answer"')
    if len(tasks) < len(numbers):
        odd = f"{len(prompts) - len(tasks)} prompts whose answers contradict each other"
        notes.add(f"dropped are repeats, blank answers and {odd}")
    if notes and name not in HUB:  # whose columns are known
        said = f"{name}: {len(tasks)} tasks in {len(numbers)} rows; "
        warnings.warn(said + "; ".join(sorted(notes)), stacklevel=2)
    return tasks


def _arithmetic(n_tasks: int = 1280) -> list[Task]:
    """Distinct chain sums "3+5+2=" of 2 to 10 digits, the same every time."""
    rng = random.Random(0)  # recorded runs depend on these problems
    sums = {}  # the longer, the harder
    while len(sums) < n_tasks:
        digits = [rng.randint(1, 9) for _ in range(rng.randint(2, 10))]
        sums["+".join(map(str, digits)) + "="] = str(sum(digits))
    return [Task(f"arithmetic-{i:04d}", *item) for i, item in enumerate(sums.items())]


def _rows(name: str, suffix: str) -> list:
    """All rows; those of JSON Lines are still text."""
    path = Path(name).expanduser()
    if name not in HUB and not path.exists():
        known = ", ".join(["arithmetic", *HUB])
        raise ValueError(f"no tasks {name!r}: neither a file nor one of {known}")
    try:
        if name in HUB or path.is_dir():
            import datasets  # takes seconds, so only where it is needed

            if name in HUB:
                hub_id, configuration, split = HUB[name]
                return datasets.load_dataset(hub_id, configuration, split=split).to_list()
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, dict) and "train" not in rows:
                raise ValueError(f"no train in it: take a folder of {list(rows)}")
            return (rows["train"] if isinstance(rows, dict) else rows).to_list()
        if suffix == ".parquet":
            from pyarrow.parquet import read_table

            return read_table(path).to_pylist()
        data = path.read_bytes()
        # Gzip files begin with a mark, and so does the text that Excel writes.
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        text = data.decode("utf-8-sig")
        if suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        if text.lstrip().startswith("["):
            return json.loads(text)
        # splitlines would cut at U+2028 as well.
        return [line.strip() for line in text.split("\n")]
    except Exception as error:  # of the disk, the network, Arrow, gzip, JSON
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ValueError(f"{name}: cannot be read: {reason}") from error


def _task(row: object, default_id: str, where: str, answers: bool, notes: set) -> Task:
    """A row as a Task; ValueError if no completion could ever match its answer."""
    row = row if isinstance(row, dict) else {}
    if None in row:  # csv's name for cells beyond the header
        raise ValueError(f"{where}: more cells than columns: quote those with commas")
    keys = [[key for key in known if key in row] for known in (PROMPTS, ANSWERS)]
    if not answers:
        keys[1].append("answer")  # which may be missing
    if not all(keys):
        wanted = f"prompt and answer, or {PROMPTS[1:]} and {ANSWERS[1:]}"
        raise ValueError(f"{where}: needs the keys {wanted}; found {list(row)}")
    (asked, *_), (solved, *_) = keys
    prompt, answer, id_ = row[asked], row.get(solved, ""), row.get("id")
    id_ = default_id if id_ is None else id_
    if (asked, solved) != ("prompt", "answer"):
        notes.add(f"read are {asked} and {solved}")
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        turns = [turn.get("content") for turn in prompt]  # a conversation
        said = asked == "messages" and turns and prompt[-1].get("role") == "assistant"
        reply = turns.pop() if said else None  # an answer, and no part of the question
        answer = reply if solved == "messages" else answer
        # Parts of pictures and the like are no text: such a prompt is refused below.
        prompt = "\n\n".join(turns) if all(isinstance(t, str) for t in turns) else None
    if solved == "reward_model" and isinstance(answer, dict):
        answer = answer.get("ground_truth")  # verl's
    if solved == "final_answer" and isinstance(answer, list):
        answer = ", ".join(map(str, answer))  # OlympiadBench's
    # A table that holds 27.0 means 27.
    answer, id_ = (int(x) if isinstance(x, float) and x.is_integer() else x for x in (answer, id_))
    # "... #### 18" and "The answer is 14." are texts around an answer.
    text = str(answer).rstrip().lstrip(" \n")  # a leading tab is a misread "\\times"
    prose = solved in ("solution", "messages") and len(text.split()) > 5
    gold = last_boxed(text)
    if gold is None:
        gold = (NAMED.findall(text) or ["" if prose else text])[-1]
    if gold not in ("", text):
        notes.add("answers are cut out of a text")
    keys = (asked, solved, "id")
    if not answers:  # nobody compares it with anything: it stays as it is, in extra
        gold, keys = "" if answer is None else str(answer), (asked, "id")
    faults = {
        "prompt must be text": not isinstance(prompt, str),
        "the prompt is blank": not str(prompt).strip(),
        "half a character": re.search("[\ud800-\udfff]", str(prompt)),
        f"the id {id_!r:.50} must be text or a number": type(id_) not in (str, int),
    }
    if answers:
        faults |= {
            "answer must be text or a number": type(answer) not in (str, int, float),
            "answer is missing or endless": gold == "nan" or len(gold) > MAX_ANSWER,
            # "\frac" in JSON is a form feed and "rac".
            "control character (write \\ twice)": re.search(r"[\0-\x09\x0b-\x1f]", gold),
            "unmatched brace": last_boxed(rf"\boxed{{{gold}}}") != gold,
        }
    for fault in filter(faults.get, faults):
        raise ValueError(f"{where}: {fault}: {answer!r:.50} for {prompt!r:.50}")
    extra = {key: row[key] for key in row if key not in keys}
    return Task(str(id_), prompt, gold, extra)


def split_held_out(tasks: list[Task], n_held_out: int, seed: int = 0):
    """(train, held out), both in the order given; a hash of a prompt decides its side.

    Prompts that differ only in case, spacing or punctuation stay together. A few less are
    held out where the last such group does not fit: what a smaller n_held_out holds out,
    a larger one does, too.
    """
    if not 0 <= n_held_out < len(tasks):
        raise ValueError(f"cannot hold out {n_held_out} of {len(tasks)}: hold out fewer")
    texts = [unicodedata.normalize("NFKC", task.prompt).casefold() for task in tasks]
    texts = ["".join(filter(str.isalnum, text)) or text for text in texts]
    hashes = {t: hashlib.sha256(f"{seed}:{t}".encode()).digest() for t in texts}
    sizes, held, room = Counter(texts), set(), n_held_out
    # Hashes, not positions, so that neither order nor ids decide.
    for text in sorted(hashes, key=hashes.get):
        if (room := room - sizes[text]) < 0:
            break
        held.add(text)
    if n_held_out and not held:
        raise ValueError(f"cannot hold out {n_held_out}: too many prompts are alike; hold out more")
    pairs = list(zip(tasks, texts, strict=True))
    return tuple([t for t, text in pairs if (text in held) == side] for side in (0, 1))


# ---------------------------------------------------------------------------- verdicts

MAX_ANSWER = 500  # characters; the longest gold answer of the usual suites has 210
MAX_TEXT = 100_000  # characters at its end in which a box is looked for


def score(completion: str, answer: str, boxed: bool = False) -> float:
    r"""1.0 if the completion's answer equals the gold answer, 0.0 if not.

    That is what its last \boxed{...} holds. Without a box it is none (boxed=True), or the
    last of nothing but numbers, or what follows "answer is", or what math-verify finds.
    What is not judged in time gets 0.0 and a warning.
    """
    judge = _shared[boxed]
    reward = float(judge.score_many([completion], [answer])[0])
    if judge.no_verdict:
        warnings.warn(f"no verdict, so 0.0: {completion[-60:]!r}", stacklevel=2)
    return reward


def last_boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} holds: one pass, whatever the nesting."""
    last, opened = (0, 0), []  # opened: where a box's content starts; 0 for a brace
    for token in re.finditer(r"(?s)\\(?:boxed|fbox)\s*\{|\\.|[{}]", text):
        if token[0] == "}" and opened:
            last = max(last, (opened.pop(), token.start()))
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if "box" in token[0] else 0)
    return text[slice(*last)].strip() if last[0] else None


NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
WORD = re.compile(r"(?<![\\\w{])(?!(?:and|or|sqrt)\b)[^\W\d_]{2,}")
# What is said to be the answer, up to the end of the sentence or to its reasons.
IS = r"####|\b(?:answer|choice|option)[\s*]*(?:is\b|:)"
END = r"(?<!\\)[.?](?=[\s*]|$)|(?<!\\)!(?=[\s*]*(?:$|(?-i:[A-Z])))|\b(?:not|because|since)\b|$"
NAMED, SAID = (  # "option B", `42`, and a formula on a line of its own
    re.compile(
        rf"(?ims)(?:{start})[\s:*`]*(?:(?:option|choice)\b[\s:*]*)?(?:(?:\\\[|\$\$)\s*)?"
        rf"(.*?)[\s*`]*(?:{END})"
    )
    for start in (IS, rf"{IS}|^(?-i:A):")  # "A: 15 km" alone may be a choice
)


def _extract(completion: str, boxed: bool) -> tuple[str, bool]:
    """(an answer, True), or (the text in which math-verify has to find it, False)."""
    box = last_boxed(completion[-MAX_TEXT:])
    if box is not None or boxed:
        return _tidy((box or "")[: 2 * MAX_ANSWER]), True
    text = completion[-2 * MAX_ANSWER :].strip()
    if text and all(map(NUMBER.fullmatch, text.split())):
        return text.split()[-1], True  # "8 10": running totals, then the sum
    # The last time that an answer is named counts.
    text = (SAID.findall(text) or [text])[-1]
    tidy = _tidy(text)
    if WORD.search(re.sub(rf"{TEXT}[^{{}}]*\}}$", "", tidy)):  # a unit is no prose
        return text.translate(str.maketrans(CHARACTERS)), False
    return tidy, True


# What math-verify cannot read, or misreads, is first written as it does read it.
CHARACTERS = {"−": "-", "–": "-", "‒": "-", "°": r"^\circ ", "∞": r"\infty "}
CHARACTERS |= {"√": r"\sqrt ", "½": " 1/2", "∘": r"\circ "}
TEXT = r"\\(?:text[a-z]*|mathrm|mbox)\s*\{"
UNIT = rf"(?!\\(?:mathrm|text)\{{[ie]\}}){TEXT}[^{{}}]*\}}"  # \mathrm{i} is none
UNITS = "[cmk]m|[mk]g|m[lLi]|lb|oz|ft|in|hr"  # of two letters
ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
REWRITES = {
    rf"(\\text\{{\s*(?:{'|'.join(ZEROS)})\b)(?!\}})": r"\1}\\text{",  # million dollars
    **{  # 5 million
        rf"\s*(?:\\text\{{)?\s*{word}\b\}}?": rf"\\times 10^{n}" for word, n in ZEROS.items()
    },
    r"(?<=[0-9])([eE](?=[-+0-9])| ?x ?10\^)": r"\\times 10^",  # 1.85e5
    r"10\^(?:\(([-+]?[0-9]+)\)|([-+]?[0-9]+))": r"10^{\1\2}",  # 10^-5
    # 11,\! 111 and 1 234
    r"(?<![0-9]{4})(?<=[0-9])(\{,\}|,?\s*\\! ?|\s*\\[, ] ?|[ ~])(?=[0-9]{3}(?![0-9]))": "",
    r"(?<=[0-9])\{,\}(?=[0-9])": ".",  # 3{,}5 is 3.5
    r"(?<![\w.,^/])([0-9]+)\s+([0-9]+)/([0-9]+)": r"\1\\frac{\2}{\3}",  # 1 1/2
    r"\\frac\s*([0-9]|\\pi)\s*([0-9])": r"\\frac{\1}{\2}",  # \frac 1 2
    r"(?<=[0-9])(?<![_^][0-9])\s+(?=[0-9])": ", ",  # 8 2 are two numbers
    r"(?<![A-Za-z\\])(pi|sqrt)\b": r"\\\1",  # 19pi
    r"\\sqrt\s*\(([^()]*)\)|\\sqrt\s*([0-9]+)": r"\\sqrt{\1\2}",  # √(2)
    r"(?<!\\)\\!|\\(left|right)(?![A-Za-z])|^(\\approx|=)": "",  # no meaning
    rf"(?<!\\)\\[,;: ](?=\s*(?:\\%|{TEXT}))": "",  # 60\,\text{km}
    rf"{TEXT}\s*(and|or)\b([^{{}}]*)\}}": r" \1 \\text{\2}",  # 3\text{ and }4
    # 18 dollars, but not 3 xy
    rf"(?<=[0-9}}])\s+((?:[A-Za-z]{{3,}}|{UNITS})(?: [A-Za-z]+)*)$": r"\\text{ \1}",
    rf"(?<=[0-9])\s*{UNIT}(?=,|$)": "",  # 3\text{ m}
    # 10\pi~\text{m/s}^2
    rf"^((?:(?!{TEXT}).)*(?:[0-9}}]|\\pi))(?:[\s~]|\\[,;: ])*{UNIT}(\^\{{?-?[0-9]\}}?)?$": r"\1",
    # 4\mathrm{i}, 4 i and 4\cdot i
    r"(?<=[0-9])(?:[\s~]|\\[,;: ]|\\cdot)*(?:\\(?:mathrm|text)\{i\}|i)(?![A-Za-z])": "i",
    # \{x \mid x < 1\}
    r"^\\\{\s*([a-z])(?:\s*\\in\s*\\mathbb\{?R\}?)?\s*(?:\||\\mid|:)(.*)\\\}$": r"\2",
    rf"^{TEXT}([^{{}}]*)\}}$|\\mathrm\{{([a-z])\}}": r"\1\2",  # \mathrm{e}
    r"^(-?)\s*\\?[$€£¥]\s*(?=[0-9.])": r"\1",  # $18
    r"\\degree(?![A-Za-z])|\^\s+\\circ": r"^\\circ",
    r"\\\\\[[0-9.]+ ?(?:pt|ex|em|mm|cm)\]": r"\\\\",  # space between rows
    r"\^-([0-9]+|[a-z])(?![\w^])": r"^{-\1}",  # 2^-3
    r"\\(?:lor|vee)(?![A-Za-z])": " or ",
    # y=7, x=3 is (3,7)
    r"^([a-z]) ?= ?([^=,]+), ?(?!\1)([a-z]) ?= ?([^=,]+)$": lambda found: (
        "({1},{3})" if found[1] < found[3] else "({3},{1})"
    ).format(*found.groups()),
}


# A letter, after whose mark the choice's text may stand: \textbf{(B)} Paris. Not "all but B", -B or B + 1.
CHOICE = (
    r"(?:\\(?:text|math)[a-z]*)?[\s{(*]*(?:(?i:option|choice)[\s:{(*]*)?"
    r"[A-J][\s}*]*(?:[).:}](?s:.*))?"
)


@functools.lru_cache(maxsize=1000)  # each rollout of a prompt has the same gold answer
def _tidy(text: str) -> str:
    """An answer as math-verify should see it."""
    text = (NAMED.findall(text) or [text])[-1].strip("* \n`")  # "Answer is 3" in a box
    # Dollars and brackets around a formula, not the $ of $18.
    text = re.sub(r"\$\$|(?<!\\)\\[\[\]()]|^\$([^$]*)\$$", r"\1", text)
    plain = functools.partial(unicodedata.normalize, "NFKC")  # of which 10⁵ would be 105
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda power: f"^{{{plain(power[0])}}}", text)
    text = plain(text.translate(str.maketrans(CHARACTERS)))  # full-width digits, too
    for pattern, new in REWRITES.items():
        text = re.sub(pattern, new, text)
    return text.strip().rstrip(".,;:?~\\ ")  # punctuation and spaces, as in 5\,


def _decide(given: str, alone: bool, gold: str) -> bool | None:
    """The verdict where no algebra is needed; None where it takes math-verify."""
    if given in (gold, gold.removesuffix(r"\%")):  # a percent sign may be left out
        return True
    # math-verify would multiply the letters of words. Of "cab" and "abc" that is right.
    ours, letters = (text.replace(" ", "").casefold() for text in (given, gold))
    if len(letters) > 2 and letters.isalpha() and ours.isalpha():
        if ours == letters or len(letters) > 3 or gold.isupper():
            return ours == letters
    if not given or (alone and len(given) > MAX_ANSWER):
        return False  # nothing, or too much to be an answer
    # A choice must be the only one named: "B or C" is neither.
    if letter := re.fullmatch(r"(?:\\(?:text|math)[a-z]*)?[\s{(*]*([A-J])[\s}):.*]*", gold):
        named = re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z^_])", given)
        alone = alone or re.match(r"\W*[A-J][).:]", given)  # (B) Paris
        chosen = set(named) == {letter[1]} and re.fullmatch(CHOICE, given)
        return bool(alone and (chosen or given == letter[1].lower()))
    if all(re.fullmatch("-?[0-9]+", text) for text in (given, gold)):
        return int(given) == int(gold)  # most answers
    # math-verify ignores the base of 43_5, and whether a pair is a set or a tuple.
    bases = [re.findall(r"[0-9]_\{?([0-9]+)", text) for text in (given, gold)]
    if all(bases) and bases[0] != bases[1]:
        return False
    listed, spread = r"\\\{[^{}|<>]*\\\}", r"^[(\[][^()]*,[^()]*[)\]]$|\\cup|[<>]|\\[lg]e"
    for x, y in ((given, gold), (gold, given)):
        if re.fullmatch(listed, x) and re.search(spread, y):
            return False
    return None


def _union(x):
    """{x < 2, x > 3}, as math-verify reads "x < 2 or x > 3", as a set of numbers."""
    from sympy import FiniteSet, Union
    from sympy.core.relational import Relational

    parts = x.args if isinstance(x, FiniteSet) and len(x.args) > 1 else ()
    if not parts or not all(isinstance(r, Relational) for r in parts):
        return x
    bounds = all(r.rel_op not in ("==", "!=") and len(r.free_symbols) == 1 for r in parts)
    return Union(*(r.as_set() for r in parts)) if bounds else x


def _judge(given: str, alone: bool, gold: str) -> bool:
    """math-verify's verdict. Runs in a worker, and raises what math-verify raises."""
    from math_verify import parser, verify

    found = []  # for the gold and the given answer: [sympy object, text], [text] or []
    for text, boxed in ((gold, True), (given, alone)):
        # math-verify would take the t of 4t for tons, the c of x+4c for cents.
        units = not boxed or not re.search(r"(?<![A-Za-z\\{])[A-Za-z](?![A-Za-z])", text)
        form = parser.NormalizationConfig(True, units, malformed_operators=True, nits=True)
        # An answer is read whole: not by the one number that a formula contains.
        kinds = [parser.LatexExtractionConfig(not boxed, normalization_config=form)]
        kinds += [] if boxed else [parser.ExprExtractionConfig()]
        if boxed and r"\pm" in text and "," not in text:  # means both
            signs = ("+-", "-+")
            text = ", ".join(text.replace(r"\pm", a).replace(r"\mp", b) for a, b in signs)
        text = f"\\boxed{{{text}}}" if boxed else text
        # Its own time limits use the one alarm clock of a process.
        parsed = parser.parse(text, kinds, parsing_timeout=None, raise_on_error=True)
        found.append([_union(x) for x in parsed])
    # It finds no number in "答案是48。" or "we get (5)": the last one counts.
    if not found[1] and not alone and (last := NUMBER.findall(given)):
        return _judge(last[-1], True, gold)
    settings = {"timeout_seconds": None, "allow_set_relation_comp": True}
    if not verify(*found, raise_on_error=True, **settings):
        return False
    # It takes 1/2004! for 1/2005! and 1.6e-19 for 0: tiny numbers must agree to 1%.
    numbers = [x for x, *_ in found if getattr(x, "is_number", False)]
    sizes = [abs(x.doit().evalf()) for x in numbers] or [1]
    return bool(max(sizes) > 1e-4 or min(sizes) >= 0.99 * max(sizes))


# ------------------------------------------------------------------------------ judges

MEMORY = 1 << 30  # bytes of address space of one worker process
START = 120  # seconds in which a new worker must be ready (it takes about one)


class Verifier(AbstractContextManager):
    """Scores batches of completions; math-verify, which can hang, has worker processes.

    timeout: whole seconds for one completion. timeouts, failures: how many got 0.0 for
    want of time, or of memory or an answer. no_verdict: where in the latest batch.
    """

    def __init__(self, workers: int = 2, timeout: int = 5, boxed: bool = False):
        if workers < 1 or timeout < 1 or timeout != int(timeout):
            raise ValueError(f"{workers} workers, {timeout} s: need whole seconds >= 1")
        self.timeout, self.boxed = int(timeout), boxed
        self.timeouts = self.failures = 0
        self.no_verdict = set()
        self._workers = [None] * workers  # the idle ones; None is yet to be started
        self._lock = threading.Lock()  # one batch at a time

    def close(self, *_: object) -> None:
        """End the processes; a later batch starts new ones."""
        for worker in filter(None, self._workers):
            worker.kill()

    __exit__ = close

    def __call__(self, tasks, texts):
        """A verifier is itself a reward."""
        return self.score_many(texts, [task.answer for task in tasks])

    def score_many(self, completions: list[str], answers: list[str]):
        """Rewards (R,) in {0., 1.}: completions[i] against the gold answers[i]."""
        import numpy as np  # not at the top: a worker does without

        pairs = zip(completions, answers, strict=True)
        jobs = [(*_extract(text, self.boxed), _tidy(gold)) for text, gold in pairs]
        # What is decided on the spot; then, in worker processes, the rest.
        verdicts = {job: _decide(*job) for job in jobs}
        rest = [job for job, verdict in verdicts.items() if verdict is None]
        # At Ctrl-C, too, this waits for the jobs under way: no reply stays in a pipe.
        with self._lock, ThreadPoolExecutor(len(self._workers)) as threads:
            verdicts |= zip(rest, threads.map(self._ask, rest), strict=True)
        verdicts = [verdicts[job] for job in jobs]
        self.timeouts += verdicts.count("timeout")
        self.failures += verdicts.count("failure")
        self.no_verdict = {i for i, v in enumerate(verdicts) if isinstance(v, str)}
        return np.array([float(v is True) for v in verdicts])  # (R,)

    def _ask(self, job: tuple) -> bool | str:
        worker = self._workers.pop()  # as many as threads: there is always one
        try:
            if worker is None or worker.process.poll() is not None:
                worker = _Worker()
            return worker.ask(job, self.timeout)
        finally:
            self._workers.append(worker)


class _Worker:
    """A process that judges, and this end of the pipe to it."""

    def __init__(self):
        self.pipe, theirs = Pipe()  # closes, and so ends the worker, when we die
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        # In a session of its own, because Ctrl-C is for this process to handle.
        # Its errors are counted; math-verify warns that its time limits are off.
        quiet = {"stderr": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], **quiet)
        theirs.close()
        # The first job takes a second: math-verify is imported.
        if self.ask(("1", True, "2"), START) is not False:
            raise RuntimeError("no verifier process starts: is math-verify installed?")

    def ask(self, job: tuple, seconds: int) -> bool | str:
        """Its verdict; or "timeout" or "failure"."""
        try:
            self.pipe.send((seconds, job))
            # Half a second later, a worker that ignores its alarm is killed.
            if self.pipe.poll(seconds + 0.5):
                return self.pipe.recv()
            self.kill()
            return "timeout"
        except (EOFError, OSError):  # it died
            self.kill()
            return "failure"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


_shared = [Verifier(workers=1, boxed=boxed) for boxed in (False, True)]  # for score()


def _serve(pipe: Connection) -> None:
    """A worker's life: a reply to each job, until the pipe closes."""
    if sys.platform == "linux":  # macOS has the call, but not the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # The alarm raises KeyboardInterrupt: sympy catches many an Exception, not that.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    while True:
        try:
            timeout, job = pipe.recv()
            signal.alarm(timeout)
            reply = _judge(*job)
        except KeyboardInterrupt:
            reply = "timeout"
        except (EOFError, MemoryError):
            return  # what is left after a MemoryError is of no use
        except Exception:  # sympy's are of many kinds; they are counted
            reply = "failure"
        finally:
            signal.alarm(0)
        pipe.send(reply)


def load_reward(spec: str):
    """The function that "FILE.py:FUNCTION" names."""
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    sys.path.append(str(path.parent))  # for modules beside it
    found = None
    if path.suffix == ".py" and path.is_file():
        # A module: its functions can be handed to other processes.
        known_as = f"reward_{path.stem}"
        source = importlib.util.spec_from_file_location(known_as, path)
        module = sys.modules[known_as] = importlib.util.module_from_spec(source)
        try:
            source.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # the user's own: its traceback shows
            raise RuntimeError(f"{file} failed: {error!r}") from error
        found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"no function {name!r} in {file!r}: --reward FILE.py:FUNCTION")
    return found


class BadReward(ValueError):
    """A reward function returned what is no reward."""


def grade(reward, tasks: list[Task], texts: list[str]):
    """reward(tasks, texts) as an array (R,) in [0, 1]; BadReward if it is none."""
    import numpy as np

    name = f"reward {getattr(reward, '__name__', type(reward).__name__)}"
    try:
        given = reward(tasks, texts)
    except Exception as error:  # the user's ValueError is no wrong input of ours
        raise RuntimeError(f"{name} failed: {error!r}") from error
    given = given.tolist() if hasattr(given, "tolist") else given  # an array, a tensor
    count = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
    if count != len(texts):
        raise BadReward(f"{name} returned {count} for {len(texts)} texts")
    # Not float(x): a text like "1" is a mistake, not a reward.
    given = [x.item() if hasattr(x, "item") else x for x in given]
    for task, x in zip(tasks, given, strict=True):
        if type(x) not in (bool, int, float) or not 0 <= x <= 1:
            raise BadReward(f"{name} gave {x!r} to task {task.id}: not in [0, 1]")
    return np.array(given, dtype=float)  # (R,)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
