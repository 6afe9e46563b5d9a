"""reward.py: verdicts on every form of answer, hostile completions, tasks and their faults, own rewards."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward
from reward import Task, Verifier, grade, last_boxed, load_reward, load_tasks, score, split_held_out

ROOT = Path(reward.__file__).parent
LINUX = sys.platform == "linux"  # elsewhere: no /proc to look into, and no memory limit

# ------------------------------------------------------------------------------------- verdicts
# One gold answer a line, then answers that must count as right (RIGHT) or wrong (WRONG), after " ~ ".

RIGHT = r"""
# integers and decimals
10 ~ 10 ~ +10 ~ 10.0 ~ 010 ~ {10} ~ $10$ ~ \approx 10 ~ \text{10}
-5 ~ -5 ~ −5 ~ - 5 ~ -5.
0 ~ -0 ~ 0.0
0.5 ~ .5 ~ 0.50 ~ 1/2
0.333333 ~ 0.3333333
12345678901234567890 ~ 12345678901234567890
# thousands, the decimal comma
1234 ~ 1,234 ~ 1{,}234 ~ 1\,234 ~ 1 234
1,234 ~ 1234 ~ 1234.0
1234567 ~ 1,234,567 ~ 1{,}234{,}567 ~ 1\ 234\ 567
1234.5 ~ 1,234.5
3.5 ~ 3{,}5
# words and signs around a number
500 ~ 5 hundred
12 ~ 12\, ~ 12\; ~ 12\: ~ 12\  ~ 12~ ~ = 12
5000000 ~ 5 million ~ 5\text{ million} ~ \$5 million
2.5\text{ billion} ~ 2500000000 ~ 2.5e9
18 ~ 18 dollars ~ €18 ~ £18
90^\circ ~ 90\degree
28.5\% ~ 28.5
\frac{1}{2} ~ \frac 1 2
C ~ c
29,\!322,\!216 ~ 29322216
\dfrac{1}{29,\!322,\!216} ~ \frac{1}{29322216}
# fractions and mixed numbers
1/2 ~ \frac{1}{2} ~ ½ ~ \frac12 ~ \left(\frac{1}{2}\right)
\frac{1}{2} ~ 0.5 ~ 2/4 ~ \dfrac{1}{2} ~ \tfrac12 ~ \frac{3}{6}
-\frac{1}{2} ~ \frac{-1}{2} ~ \frac{1}{-2} ~ -1/2 ~ -0.5
\frac13 ~ 0.333333 ~ 1/3
\frac{\sqrt{3}}{3} ~ \frac{1}{\sqrt{3}}
3:4 ~ 3/4
\frac{3}{2} ~ 1\frac{1}{2} ~ 1 1/2 ~ 1½ ~ 1.5 ~ 1 \frac{1}{2} ~ 1\frac12
1\frac{1}{2} ~ 3/2 ~ 1.5
1 1/2 ~ 1\frac12
-\frac{3}{2} ~ -1 1/2 ~ -1\frac{1}{2}
# percentages
28\% ~ 28 ~ 28% ~ 28 \% ~ 0.28 ~ \frac{7}{25} ~ 7/25 ~ 28 percent ~ 28\text{ percent}
\frac{7}{25} ~ 28\%
0.28 ~ 28%
28 ~ 28\%
28.5\% ~ 0.285
10\% ~ 10\,\% ~ 10\ \%
60 ~ 60\,\text{km/h} ~ 60\;\mathrm{cm}
12.5\% ~ 1/8
# e-notation and N x 10^k
1.85e5 ~ 185000 ~ 185,000 ~ 1.85 \times 10^{5} ~ 1.85 \cdot 10^5 ~ 1.85 x 10^5 ~ 1.85E5 ~ 18.5e4
185000 ~ 1.85e5 ~ 1.85 \times 10^5
1.6e-19 ~ 1.6 \times 10^{-19} ~ 1.6 \times 10^-19 ~ 1.6 × 10^(-19) ~ 1.60e-19
1.6\times 10^{-19} ~ 1.6E-19
4.5e33 ~ 4.5 \times 10^{33}
6.02e+23 ~ 6.02*10^23
1e-5 ~ 10^{-5} ~ 10^-5 ~ 0.00001
100000 ~ 10^5 ~ 1e5
0.000001 ~ \frac{1}{10^6} ~ 10^{-6}
\frac{100000}{3} ~ \frac{10^5}{3}
1000 ~ (10^3) ~ {10^3}
10\sqrt{10} ~ \sqrt{10^3}
100^n-1 ~ 10^{2n}-1
(1,10^5) ~ (1,100000)
# units, degrees, currencies: dropped
180\text{ miles} ~ 180 ~ 180 miles
180 ~ 180\text{ miles}
5\text{ cm} ~ 5 cm ~ 5 ~ 5\,\text{cm} ~ 5\text{ m}
5 \mathrm{~km} ~ 5
12 ~ 12 \text{ square inches} ~ 12 \text{ cm}^2
5 ~ 5 apples
18 ~ \$18 ~ $18
7\text{ hours}. ~ 7
90^\circ ~ 90 ~ 90^{\circ} ~ 90°
90 ~ 90^\circ ~ 90° ~ 90 degrees
\$18.90 ~ 18.9 ~ \$18.90
$18 ~ 18
-18 ~ -\$18
\$1,234 ~ 1234
5000000 ~ 5{,}000{,}000
# algebra
2x+1 ~ 1+2x
3xy ~ 3 xy
\frac{1}{2}bh ~ \frac{1}{2} bh
(x+1)^2 ~ x^2+2x+1 ~ (1+x)^2
y=2x+1 ~ 2x+1
5 ~ x=5 ~ x = 5 ~ 2+3
x=5 ~ 5
x^2+1=0 ~ x^2=-1
a+b+c ~ a + b + c
\sin^2 t ~ \sin^2(t)
\sin^2 x ~ 1-\cos^2 x
x^2 ~ x²
p - q ~ -q+p
# roots, powers, constants
\sqrt{2} ~ 2^{1/2} ~ 1.41421356 ~ sqrt(2) ~ √2 ~ \frac{2}{\sqrt{2}}
2\sqrt{3} ~ \sqrt{12} ~ 2\sqrt 3 ~ 2√3
\pi ~ π ~ 3.14159265
2\pi ~ 2π
1024 ~ 2^10 ~ 2^{10}
3628800 ~ 10!
\binom{5}{2} ~ 10
\log_2 8 ~ 3
1+2i ~ 2i+1
\infty ~ ∞
# intervals
(1,2] ~ (1,2] ~ (1, 2] ~ \left(1,2\right]
(1,2)\cup(3,4) ~ (3,4)∪(1,2)
(-\infty,3) ~ x<3
x<3 ~ (-\infty,3) ~ 3 > x
[3,\infty) ~ x\ge 3
x \ge 3 ~ x≥3
\left[0,\frac12\right) ~ [0,0.5)
1<x<2 ~ (1,2)
# sets, lists, tuples
\{1,2,3\} ~ \{3,1,2\} ~ 3,1,2
1,2,3 ~ 3,1,2
2,3 ~ \{3,2\}
\pm 3 ~ -3,3 ~ 3,-3
3 \text{ or } 5 ~ 5,3
3 and 5 ~ 3,5
8,2 ~ 8 2
(2,3) ~ (2, 3) ~ 2,3 ~ x=2, y=3 ~ y=3, x=2
3, 125 ~ 3,\ 125 ~ 3,\,125
(2,100) ~ (2,\ 100)
(1,2),(3,4) ~ \{(1,2),(3,4)\}
\left(3,\frac{\pi}{2}\right) ~ (3,\pi/2)
\emptyset ~ \{\}
# matrices
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\begin{pmatrix}1/2\\2\end{pmatrix} ~ \begin{pmatrix}0.5\\ 2\end{pmatrix}
# choices and words
C ~ C ~ \text{(C)} ~ (C) ~ C. ~ \mathrm{C} ~ C) 42
\textbf{(C)} ~ C
\text{(E)}, ~ E ~ \textbf{(E)}\ 12
E ~ \text{(E)}
Evelyn ~ \text{Evelyn}
\text{Evelyn} ~ evelyn
\text{yes} ~ \text{Yes}
\text{no solution} ~ \text{No solution}
05\!:\!00 ~ 05:00
43_5 ~ 43_{5} ~ 43
B ~ Option B ~ B: the second ~ \textbf{(B)}\ 7
infinitely many ~ \text{ infinitely many }
# forms that other verifiers' trackers name
11,\! 222,\! 333 ~ 11222333 ~ 11,222,333
17\pi ~ 17pi
\sqrt{7} ~ √{7} ~ √(7)
1-\frac{1}{\mathrm{e}} ~ 1-e^{-1}
-6 ~ －６ ~ ‒6
8 ~ **8** ~ The answer is 8 ~ "8"
x=2,y=9 ~ (2,9)
2<x<9 ~ (2,9)
4 \text{ or } 6 ~ x=4 or x=6
# units behind more than a digit
3.2e5 ~ 3.2\times10^5\text{ J} ~ 3.2 \times 10^5 \mathrm{~J} ~ 3.2 \times 10^5\text{ m/s}
\frac{1}{2} ~ \frac{1}{2}\text{ J} ~ \frac12\,\mathrm{m}
10\pi ~ 10\pi\text{ N}
5 ~ 5\text{ m}^2 ~ 5\,\mathrm{m}^{2} ~ 5\text{ g/cm}^3 ~ 5~\text{cm} ~ 5\text{ m}^{-1}
1500000 ~ 1.5\text{ million dollars} ~ 1.5\text{ million}
# the imaginary unit
3+4i ~ 3 + 4\mathrm{i} ~ 3+4 i ~ 4 i+3 ~ 3+4\cdot i ~ 3+4\,i
# plus or minus
\frac{-1\pm\sqrt{5}}{2} ~ \frac{-1 \pm \sqrt{5}}{2} ~ \frac{-1+\sqrt{5}}{2}, \frac{-1-\sqrt{5}}{2}
1\pm\sqrt{19} ~ \pm\sqrt{19}+1
# sets that are described
\{0\}\cup[1,2] ~ \{0\} \cup [1,2] ~ [1,2]\cup\{0\}
\{x|-2\leq x < 1\} ~ \{x \mid -2 \leq x < 1\} ~ [-2,1) ~ -2 \le x < 1
[0,1) ~ \{x \mid 0\le x<1\} ~ \{x \in \mathbb{R} : 0 \le x < 1\}
(-\infty,2)\cup(3,\infty) ~ x<2 \text{ or } x>3 ~ x<2 or x>3 ~ x<2 \lor x>3
# signs
100000 ~ 10⁵
10^{-3} ~ 10⁻³ ~ 0.001
x^4+1 ~ x⁴+1
45^\circ ~ 45 ^ \circ ~ 45^∘
x^{-1} ~ x^-1
\frac{1}{8} ~ 2^-3
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix} 1 \\[4pt] 2 \end{pmatrix}
# words
infinitely many ~ Infinitely many
\text{acute triangle} ~ Acute triangle ~ \text{Acute triangle}
A ~ A: 15 km ~ A: Paris
"""

WRONG = r"""
# numbers
43_5 ~ 43_7
5 ~ 5\text{ million}
10 ~ 11 ~ -10 ~ 100 ~ 10.1
5 ~ 5.01 ~ 4.99999
0.5 ~ 0.51 ~ 5
0 ~ \text{none} ~ {} ~ 1e-3
6 ~ six
12345678901234567890 ~ 12345678901234567891
1234 ~ 1,235 ~ 1{,}23
12345 ~ 12\,346
3.5 ~ 3,5
1/2 ~ 1/3 ~ 2
\frac13 ~ 0.333
\frac{1}{2} ~ \frac{2}{1} ~ \frac{1}{0} ~ 1\frac{1}{2}
\frac{3}{2} ~ 11/2 ~ 1 1/3
357 ~ 12 345
# numbers side by side are not added up
10 ~ 8 2 ~ 3 5 2
3 ~ 1 2
# percentages
28\% ~ 29 ~ 2800\% ~ 2.8
28 ~ 0.28
\frac{7}{25} ~ 28
0.28 ~ 0.28\%
# e-notation: tiny is not zero
1.6e-19 ~ 9.1e-31 ~ 0 ~ 1.6 ~ 1.6e19 ~ 1.7e-19
1.6\times 10^{-19}\text{ C} ~ 9.1\times 10^{-31}\text{ C}
1.85e5 ~ 1.85e6
# units, degrees, currencies
180\text{ miles} ~ 181 \text{ miles}
90^\circ ~ 91
\frac{\pi}{2} ~ 90^\circ
\$18.90 ~ 18.99
5 ~ 5 million ~ 5 thousand ~ 5 hundred
2 ~ 2 xy
# algebra
2x+1 ~ 2x-1
x^2 ~ y^2
x=5 ~ x=6
5 ~ x=6
a+b+c ~ a+b+d ~ a + b + g ~ a + b
\sin^2 t ~ \cos^2 t ~ \sin^2 m
(x+1)^2 ~ x^2+1
\sqrt{2} ~ 1.414 ~ 2
\pi ~ 3.14
i ~ -i
# intervals
(1,2] ~ [1,2) ~ (1,2) ~ [1,2]
(-\infty,3) ~ x\le 3
(1,2) ~ (1,3)
x<3 ~ x>3
# sets, lists, tuples
(2,3) ~ (3,2) ~ y=2, x=3
3125 ~ 3,\ 125
\{1,2,3\} ~ \{1,2\} ~ \{1,2,4\}
1,2 ~ 1,3 ~ 1
\pm 3 ~ 3
(1,2,3) ~ (3,2,1)
\emptyset ~ \{0\}
# matrices
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\\3\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1&3\\2&4\end{pmatrix}
# choices, words, number bases
C ~ D ~ (A) ~ 42 ~ A) C
-A ~ A
\sqrt{A} ~ A
\text{(C)} ~ B
Evelyn ~ \text{Navin} ~ nylEve
\text{even} ~ \text{odd} ~ neve
east ~ west ~ seat
no solution ~ solution no
DCBA ~ ABCD
CBA ~ ABC
43_5 ~ 44_5
# a choice must be the only one named
B ~ B or C ~ A, B ~ B) C) D) ~ A. or B. ~ ABC ~ B (C) ~ C, not B
B ~ not B ~ \neg B ~ \text{not }B ~ -B ~ 2B ~ \sqrt{B} ~ B+1 ~ All but B ~ B \text{ is wrong}
# a number inside a formula that math-verify cannot read does not decide
2 ~ \neq 2 ~ 5 \to 2 ~ 2 \lor 5 ~ 5 \Rightarrow 2 ~ \{x|-5\le x<2\} ~ 2 \text{ or another} ~ print('2')
2.9 ~ \langle 2,9\rangle
x \neq \pm 6 ~ 6
\frac{1}{4}E_{1}+\frac{3}{4}E_{2} ~ \frac{3}{4}
20\text{ m}, 30\text{ m} ~ 20
\frac \pi2 + 3 ~ 3 ~ \frac \pi7 + 3
1, 3, \ldots, 2n-1 ~ 2, 4, \ldots, 2n
# a bare letter is a variable, not a unit
6 ~ 6t ~ 6x ~ 6h
6s ~ 6
x+6c ~ x+6
2+5t ~ 7 ~ 2+5
# thousands
222 ~ 111,\! 222
5, 300 ~ 5,300
# sets, tuples, intervals
\{2,9\} ~ 2<x<9 ~ (2,9) ~ [2,9]
2<x<9 ~ \{2,9\}
x=2,y=9 ~ (9,2) ~ 9,2
# tiny numbers are not all the same
\frac{1}{1800!} ~ \frac{1}{1801!} ~ 0
10^{-600} ~ 10^{-500}
# i is no unit, powers are no digits
7 ~ 3+4\mathrm{i}
1 ~ 6-5\mathrm{i}
2 ~ 2\mathrm{e}
105 ~ 10⁵
24 ~ 2⁴
# a ratio is no choice; one of two signs, half of a union
a:b ~ b
\frac{-1\pm\sqrt{5}}{2} ~ \frac{-1+\sqrt{5}}{2} ~ \frac{-1\pm\sqrt{3}}{2}
(-\infty,2)\cup(3,\infty) ~ x<2 ~ x<2 or x>4 ~ x<3 or x>2
[0,1) ~ \{x \mid 0\le x\le 1\} ~ \{0, 1\}
\{0\}\cup[1,2] ~ [1,2] ~ \{0,1,2\}
acute triangle ~ Right triangle
"""

# The same for whole completions; ⏎ is a new line.

RIGHT_TEXTS = r"""
10 ~ 8 10
100 ~ 8 100
-3 ~ 5 -3
5 ~ \boxed{4}, no, \boxed{5} ~ \boxed{5} so 7 apples ~ \boxed{5} and then \boxed{4 ~ \boxed{\boxed{5}}
5 ~ \boxed {5}. ~ a stray { brace, \boxed{5} ~ we get (5)
\frac{1}{2} ~ \[ \boxed{\frac{1}{2}} \]
\{1,2\} ~ \boxed{\{1,2\}}
72 ~ So 48 + 24 = 72.⏎#### 72 ~ The answer is 72. ~ the answer is $72$.
42 ~ \[ x = 42 \] ~ So, **42**
\frac{3}{4} ~ so x = \frac{3}{4}
0.5 ~ The answer is 1/2.
18 ~ it costs $18
1234 ~ answer is 1,234
-5 ~ the answer is −5
11 ~ So the final answer is 3 * 4 = 11.
6 ~ The final answer is: $2 * $3 = $6.
12 ~ Final answer is $3 \cdot 4 = 12$.
1.6e-19 ~ The answer is 1.6 x 10^-19.
28\% ~ it is 28%.
Evelyn ~ Evelyn
C ~ The answer is (C). ~ Answer: C ~ the correct option is **C** ~ the answer is $\text{(C)}$
C ~ Answer: C⏎⏎Explanation: (D) is false.
A ~ The answer is A. Option B is wrong.
B ~ The answer is (B) Paris. ~ The answer is B) Paris ~ Answer: **B) Paris** ~ the correct answer is B: 15 km.
-5 ~ The answer is −5 degrees.
5000000 ~ The answer is 5 million dollars.
1.5 ~ The answer is 1 1/2 hours.
x=5 ~ The answer is x=5 meters.
\sqrt{2} ~ The answer is √2 meters.
B ~ The answer is (B), not (C).
8 ~ The answer is 8. Thanks for reading these 4 lines. ~ Answer: 8⏎⏎Let me check with 2 groups.
8 ~ The answer is 8! ~ **Answer:** 8 ~ Q: how many?⏎A: 8 ~ The answer is 9. No: the answer is 8. ~ 答案是8。
8 ~ \fbox{8}
0.6 ~ The answer is 0.6.⏎```python⏎print(7)⏎```
42 ~ The answer is: `42` ~ The answer is:⏎\[⏎42⏎\] ~ The answer is⏎$$⏎42⏎$$ ~ **Answer:**⏎⏎\[⏎x = 42⏎\]
B ~ The answer is option B. ~ The answer is option (B). ~ The answer is choice B.
B ~ The correct answer is option B: 15 km
A ~ The answer is A: 15 km.
120 ~ The answer is $5! = 120$.
"""

WRONG_TEXTS = r"""
10 ~ 8 11 ~ 10 8 ~ no idea
18 ~ 8 10
5 ~ \boxed{5}, no, \boxed{4} ~ 5 \boxed{} ~ \boxed{
72 ~ The answer is 71.
12 ~ So the final answer is 3 * 4 = 11. ~ 3n = 36 and n = 12. The answer is
24 ~ Therefore, the final answer is 3 * 2 * 4 = 12 = 12.
C ~ The answer is (B). ~ none of them ~ (B) at first, but then (C) ~ The answer is (B), not (C).
B ~ The answer is (A) or (B).
A ~ A train leaves at noon.
D ~ The answer is A, B, C or D.
8 ~ The answer is 8 or 999. ~ The answer is not 8, it is 999. ~ The answer is not 8.
8 ~ The answer is either $8$ or $9$. ~ The final answer is $8$ (or perhaps $9$). ~ The answer is 8x.
8 ~ The answer is 8: 35 ~ The answer is (8, 35). ~ \boxed 8x
9 ~ The answer is either $8$ or $9$.
5 ~ The answer is −5 degrees. ~ The answer is 5 million dollars. ~ The answer is 5 apples and 3 pears.
1 ~ The answer is 1 1/2 hours.
15 ~ \boxed{12}. Then finally \boxed{15
0.6 ~ The answer is 0.6%.
5 ~ The answer is $5! = 120$.
B ~ The answer is option A.
"""


def cases(table: str, form: str) -> list[tuple[str, str]]:
    rows = [line.split(" ~ ") for line in table.splitlines() if line and not line.startswith("# ")]
    return [(gold, form % text.replace("⏎", "\n")) for gold, *texts in rows for text in texts]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, timeout=5) as shared:
        yield shared


BOX = r"We find \boxed{%s}."


@pytest.mark.parametrize(("gold", "completion"), cases(RIGHT, BOX) + cases(RIGHT_TEXTS, "%s"))
def test_right(verifier, gold, completion):
    assert verifier.score_many([completion], [gold])[0] == 1.0


@pytest.mark.parametrize(("gold", "completion"), cases(WRONG, BOX) + cases(WRONG_TEXTS, "%s"))
def test_wrong(verifier, gold, completion):
    """A zero for want of a verdict would pass as a wrong answer."""
    assert verifier.score_many([completion], [gold])[0] == 0.0
    assert not verifier.no_verdict


def test_a_long_text_and_none_at_all(verifier):
    long = "Long reasoning, 3+4=7. " * 60 + "\n#### 72"
    assert verifier.score_many([long, " 72 \n", "", "  \n"], ["72"] * 4).tolist() == [1, 1, 0, 0]


def test_only_a_box_counts_where_a_box_was_asked_for():
    texts = [r"\boxed{5}", "5", "The answer is 5.", r"\boxed{4} or 5", r"\boxed{5} \boxed{", r"so \boxed{5"]
    with Verifier(boxed=True) as strict, Verifier() as lenient:
        assert strict.score_many(texts, ["5"] * 6).tolist() == [1, 0, 0, 0, 1, 0]
        assert lenient.score_many(texts[:5], ["5"] * 5).tolist() == [1, 1, 1, 0, 1]
    assert score("The answer is 5.", "5") == 1.0 and score("The answer is 5.", "5", boxed=True) == 0.0


@given(*2 * [st.fractions(-(10**6), 10**6, max_denominator=10**6)])
@settings(deadline=None)
def test_plain_fractions_against_exact_arithmetic(verifier, x, y):
    """Verdicts on plain fractions must agree with exact arithmetic."""
    sign = "-" if x < 0 else ""
    latex = rf"\boxed{{{sign}\frac{{{abs(x.numerator)}}}{{{x.denominator}}}}}"
    assert verifier.score_many([latex] * 2, [str(x), str(y)]).tolist() == [1, float(x == y)]


@given(st.text(max_size=60), st.sampled_from(["5", "C", "x+1"]))
@settings(deadline=None, max_examples=60)
def test_never_raises(verifier, completion, gold):
    assert verifier.score_many([completion, rf"\boxed{{{completion}}}"], [gold] * 2).max() <= 1


def test_last_boxed_against_a_naive_scan():
    def naive(text):
        for start in reversed([i for i in range(len(text)) if text.startswith("\\boxed{", i)]):
            depth = 0
            for end in range(start + 6, len(text)):
                depth += (text[end] == "{") - (text[end] == "}")
                if depth == 0:
                    return text[start + 7 : end].strip()
        return None

    rng = np.random.default_rng(0)
    pieces = ["\\boxed{", "{", "}", "}", "a", "5 "]
    for _ in range(2000):
        text = "".join(rng.choice(pieces, size=rng.integers(1, 14)))
        assert last_boxed(text) == naive(text), text


# ------------------------------------------------------------------------ hostile completions

HOSTILE = {
    "tower of powers": r"\boxed{9^{9^{9^9}}}",
    "tower in plain text": "the answer is 9^(9^(9^9))",
    "tower of carets": r"\boxed{" + "2^" * 150 + "2}",
    "million digits": "9" * 10**6,
    "digits just short enough": r"\boxed{" + "9" * 499 + "}",
    "huge exponent": r"\boxed{1e999999999}",
    "nested braces": r"\boxed{" + "{" * 5000 + "5" + "}" * 5000 + "}",
    "nested parentheses": r"\boxed{" + "(" * 240 + "7" + ")" * 240 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 50 + "7" + "}" * 50 + "}",
    "megabyte of words": "lorem ipsum " * 90_000,
    "megabyte of formulas": "$x+1$ " * 170_000,
    "thousands of boxes": r"\boxed{4} " * 5000,
    "thousands of open boxes": r"\boxed{" * 100_000,
    "million open braces": "{" * 10**6,
    "factorial of factorials": r"\boxed{((((9!)!)!)!)!}",
    "hundreds of factorials": r"\boxed{5" + "!" * 300 + "}",
    "binomial": r"\boxed{\binom{10^{9}}{5\cdot 10^{8}}}",
    "long sum": r"\boxed{\sum_{n=1}^{10^9} \frac{1}{n^2}}",
    "hard integral": r"\boxed{\int_0^{\infty} \frac{\sin x}{x^5+x^3+\log x} dx}",
    "expansion": r"\boxed{(x+y+z+w+1)^{300}}",
    "undefined": r"\boxed{\frac{1}{0}}",
    "injection in a box": r"\boxed{__import__('os').system('touch PWNED')}",
    "injection in a text": "the answer is __import__('os').system('touch PWNED')",
    "control characters": "\\boxed{\x00\x01\x02\x1b[2J7\x7f}",
    "surrogates": "\\boxed{\ud800\udfff7}",
    "surrogate in a text": "the answer is \udcff7",
    "dollars": "$" * 1000,
    "answers": "answer is " * 100,
    "commas": "1," * 500,
    "backslashes": "\\" * 1000,
    "percent signs": r"\boxed{" + "%" * 400 + "}",
    "emoji": r"\boxed{😀}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completion(hostile_pool, name):
    """Back within the limit plus a second, scored 0, memory bounded, nothing executed. On a busy machine
    a second is soon gone, so the best of three counts: what hangs, hangs each time."""
    verifier, folder = hostile_pool
    for _ in range(3):
        # A worker lost to the last one is started anew: that is not this one's time.
        verifier.score_many([r"\boxed{x+1}", r"\boxed{x+2}"], ["1+x", "2+x"])
        start = time.monotonic()
        rewards = verifier.score_many([HOSTILE[name]] * 2, ["5", "x"])
        seconds = time.monotonic() - start
        if seconds < verifier.timeout + 1:
            break
    assert seconds < verifier.timeout + 1
    assert rewards.tolist() == [0.0, 0.0]
    assert not list(folder.iterdir())
    for worker in verifier._workers:
        if LINUX and worker.process.poll() is None:
            pages = int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[0])
            assert pages * os.sysconf("SC_PAGE_SIZE") <= reward.MEMORY


@pytest.fixture(scope="module")
def hostile_pool(tmp_path_factory):
    """Two workers whose current folder is empty: an injected `touch` would show there."""
    folder, before = tmp_path_factory.mktemp("empty"), Path.cwd()
    os.chdir(folder)
    try:
        with Verifier(workers=2, timeout=1) as verifier:
            yield verifier, folder
            assert verifier.score_many([r"\boxed{x+3}"], ["3+x"])[0] == 1.0  # and it survived them
    finally:
        os.chdir(before)


@pytest.mark.skipif(not LINUX, reason="needs /proc or RLIMIT_AS")
def test_memory_limit_is_set_on_the_worker(verifier):
    verifier.score_many([r"\boxed{x+1}"], ["y"])
    limits = Path(f"/proc/{_running(verifier).pid}/limits").read_text()
    assert str(reward.MEMORY) in next(line for line in limits.splitlines() if "address space" in line)


@pytest.mark.skipif(not LINUX, reason="needs /proc or RLIMIT_AS")
def test_out_of_memory_is_a_failure_not_a_verdict(tmp_path, monkeypatch):
    """A copy of the module in which judging takes 8 GB: the worker dies, and that is counted."""
    source = (ROOT / "reward.py").read_text()
    hungry = source.replace("    found = []", "    [0] * (10**9 * (given != '1'))\n    found = []")
    assert hungry != source
    (tmp_path / "reward_hungry.py").write_text(hungry)
    monkeypatch.syspath_prepend(tmp_path)
    import reward_hungry

    with reward_hungry.Verifier(workers=1, timeout=5) as verifier:
        assert verifier.score_many([r"\boxed{x+1}"], ["1+x"])[0] == 0.0
        assert (verifier.timeouts, verifier.failures) == (0, 1)


# ----------------------------------------------------------------------------------- the pool


def _running(verifier) -> subprocess.Popen:
    return next(worker.process for worker in verifier._workers if worker is not None)


def test_order_duplicates_and_empty_batch(verifier):
    completions = [rf"\boxed{{x+{i % 7}}}" for i in range(60)]
    answers = [f"{i % 5}+x" for i in range(60)]
    rewards = verifier.score_many(completions, answers)
    assert rewards.tolist() == [float(i % 7 == i % 5) for i in range(60)]
    assert rewards.dtype == np.float64 and verifier.score_many([], []).shape == (0,)


def test_arithmetic_starts_no_process():
    with Verifier() as verifier:
        rewards = verifier.score_many(["8 10", "8 11", "10", "-10"] * 128, ["10"] * 512)
        assert rewards.reshape(128, 4).mean(0).tolist() == [1, 0, 1, 0]
        assert verifier._workers == [None, None]


def test_stuck_worker_is_killed_and_replaced():
    """A stopped process ignores its own alarm: only the parent's deadline helps."""
    with Verifier(workers=1, timeout=1) as verifier:
        verifier.score_many([r"\boxed{x+1}"], ["1+x"])
        stuck = _running(verifier)
        os.kill(stuck.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert verifier.score_many([r"\boxed{x+2}"], ["2+x"])[0] == 0.0
        assert time.monotonic() - start < 5 and verifier.timeouts == 1  # and not for ever
        assert stuck.poll() is not None and verifier.no_verdict == {0}
        assert verifier.score_many([r"\boxed{x+3}"], ["3+x"])[0] == 1.0
        assert _running(verifier).pid != stuck.pid


def test_a_worker_that_dies_is_a_failure_and_is_replaced(monkeypatch):
    with Verifier(workers=1) as verifier:
        verifier.score_many([r"\boxed{x+1}"], ["1+x"])
        worker = verifier._workers[0]
        worker.process.kill()
        assert worker.ask((1, ("1", True, "x")), 1) == "failure"
        assert verifier.score_many([r"\boxed{x+2}"], ["2+x"])[0] == 1.0
        monkeypatch.setattr(reward._Worker, "ask", lambda *_: "failure")
        assert verifier.score_many([r"\boxed{x+3}"], ["3+x"])[0] == 0.0
        assert (verifier.timeouts, verifier.failures) == (0, 1)


def test_closed_verifier_leaves_nothing_and_starts_again():
    verifier = Verifier(workers=1)
    assert verifier.score_many([r"\boxed{x+1}"], ["1+x"])[0] == 1.0
    process = _running(verifier)
    verifier.close()
    assert process.poll() is not None
    assert verifier.score_many([r"\boxed{x+2}"], ["2+x"])[0] == 1.0
    verifier.close()


def test_from_several_threads_at_once(verifier):
    """math-verify alone raises in a thread; and two batches must not read each other's replies."""
    results = {}

    def batch(k):
        completions = [rf"\boxed{{x+{k}+{i}}}" for i in range(6)]
        results[k] = verifier.score_many(completions, [f"{k + i}+x" if i % 2 else "y" for i in range(6)])

    threads = [threading.Thread(target=batch, args=(100 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(r.tolist() == [0, 1, 0, 1, 0, 1] for r in results.values())


def test_ctrl_c_in_a_batch_leaves_no_stale_reply(tmp_path):
    """After an interrupted batch, the next one must not get the answers of the first."""
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import os, signal, threading, time\n"
        "from reward import Verifier\n"  # no main guard: starting workers must not run this file again
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "with Verifier(workers=2, timeout=2) as v:\n"
        "    v.score_many(['\\\\boxed{x}', '\\\\boxed{y}'], ['z', 'z'])\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    try:\n"
        "        v.score_many(['\\\\boxed{9^{9^{9^%d}}}' % i for i in range(9)], ['x+5'] * 9)\n"
        "        v.score_many(['\\\\boxed{(9^%d)!}' % i for i in range(8, 20)], ['5'] * 12)\n"
        "        print('not interrupted')\n"
        "    except KeyboardInterrupt:\n"
        "        completions = ['\\\\boxed{x+%d}' % i for i in range(6)]\n"
        "        start = time.monotonic()\n"
        "        rewards = v.score_many(completions, ['%d+x' % i for i in range(6)])\n"
        "        print(rewards)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[1. 1. 1. 1. 1. 1.]\n", done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(not LINUX, reason="needs /proc or RLIMIT_AS")
def test_workers_end_with_their_parent():
    code = (
        "import os\nfrom reward import Verifier\nv = Verifier(workers=1)\n"
        "v.score_many(['\\\\boxed{x+1}'], ['1+x'])\n"
        "print(v._workers[0].process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    for _ in range(50):
        stat = Path(f"/proc/{int(done.stdout)}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_a_worker_that_cannot_start_raises(monkeypatch):
    monkeypatch.setattr(reward.sys, "executable", "/bin/false")
    with Verifier(workers=1) as verifier, pytest.raises(RuntimeError, match="is math-verify installed"):
        verifier.score_many([r"\boxed{x+1}"], ["1+x"])


@pytest.mark.parametrize("bad", [{"workers": 0}, {"timeout": 0}, {"timeout": 1.5}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="whole seconds"):
        Verifier(**bad)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="shorter"):
        Verifier().score_many(["1", "2"], ["1"])


def test_score_warns_where_there_is_no_verdict(monkeypatch):
    assert score(r"\boxed{1+x}", "x+1") == 1.0 and score("8 10", "10") == 1.0
    with Verifier(workers=1, timeout=1) as short:
        monkeypatch.setattr(reward, "_shared", [short])
        with pytest.warns(UserWarning, match="no verdict"):
            assert score(HOSTILE["tower of powers"], "5") == 0.0


def test_import_is_light(tmp_path):
    """Argument checks come before heavy imports, and a file of JSON Lines needs none."""
    path = _write(tmp_path / "t.jsonl", GOOD)
    code = (
        f"import sys, reward; reward.load_tasks('arithmetic'); reward.load_tasks({path!r})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'math_verify', 'sympy', 'numpy'}\n"
        "print(heavy & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


# -------------------------------------------------------------------------------------- tasks


def _write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_arithmetic():
    tasks = load_tasks("arithmetic")
    assert tasks == load_tasks("arithmetic") and len({t.prompt for t in tasks}) == len(tasks) == 1280
    assert tasks[0].id == "arithmetic-0000" and tasks[0].prompt == "7+1+5+9+8+7+5+8="
    terms = [t.prompt.removesuffix("=").split("+") for t in tasks]
    assert all(sum(map(int, digits)) == int(t.answer) for digits, t in zip(terms, tasks, strict=True))
    assert {len(digits) for digits in terms} == set(range(2, 11))


def test_json_lines_keep_ids_stable(tmp_path):
    rows = [
        {"prompt": "1+1?", "answer": "2"},
        "",
        {"prompt": "2+2?", "answer": 4, "id": 7},
        {"prompt": " 1+1?  ", "answer": "2"},
        {"prompt": "3+3?", "answer": " "},
        {"prompt": "half", "answer": 0.5},
        {"prompt": "27", "answer": 27.0},
    ]
    with pytest.warns(UserWarning, match="sums.jsonl: 4 tasks in 6 rows"):
        tasks = load_tasks(_write(tmp_path / "sums.jsonl", *rows))
    assert [t.id for t in tasks] == ["sums-1", "7", "sums-6", "sums-7"]
    assert [t.answer for t in tasks] == ["2", "4", "0.5", "27"]
    with pytest.raises(AttributeError):
        tasks[0].answer = "3"


GOOD = {"prompt": "1+1?", "answer": "2"}
FAULTS = {
    "not json": ("{", "not JSON"),
    "not an object": ([1, 2], "needs the keys"),
    "no answer": ({"prompt": "p"}, "needs the keys"),
    "prompt not text": ({"prompt": 3, "answer": "2"}, "prompt must be text"),
    "prompt blank": ({"prompt": " ", "answer": "2"}, "the prompt is blank"),
    "half an emoji": ({"prompt": "\ud83d?", "answer": "2"}, "half a character"),
    "unknown columns": ({"text": "p", "label": "2"}, r"found \['text', 'label'\]"),
    "messages without a reply": ({"messages": [{"role": "user", "content": "p"}]}, "answer must be text"),
    "a conversation without text": ({"prompt": [{"role": "user"}], "answer": "2"}, "prompt must be text"),
    "answer null": ({"prompt": "p", "answer": None}, "answer must be text or a number"),
    "answer a list": ({"prompt": "p", "answer": ["2"]}, "answer must be text or a number"),
    "answer a truth value": ({"prompt": "p", "answer": True}, "answer must be text or a number"),
    "answer not a number": ('{"prompt": "p", "answer": NaN}', "answer is missing"),
    "id a list": ({"prompt": "p", "answer": "2", "id": []}, r"the id \[\] must be text"),
    "repeated id": ({"prompt": "p", "answer": "2", "id": "bad-1"}, "also in line 1"),
    "open brace": ({"prompt": "p", "answer": r"\frac{1}{"}, "unmatched brace"),
    "stray brace": ({"prompt": "p", "answer": "}{"}, "unmatched brace"),
    "single backslash in json": (r'{"prompt": "p", "answer": "\frac{1}{2}"}', "control character"),
    "leading tab": (r'{"prompt": "p", "answer": "\times"}', "control character"),
    "endless answer": ({"prompt": "p", "answer": "1+" * 500}, "endless"),
    "endless nesting": ("[" * 100_000, "not JSON"),
    "endless number": ('{"prompt": "p", "answer": ' + "9" * 5000 + "}", "not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_row_is_named(tmp_path, fault):
    row, message = FAULTS[fault]
    path = _write(tmp_path / "bad.jsonl", GOOD, "", row)
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks(path)
    assert "bad.jsonl, line 3: " in str(caught.value) and "\n" not in str(caught.value)


def test_legal_answers(tmp_path):
    """What looks odd but can be matched."""
    answers = [r"\{1,2\}", r"\text{(C)}", "05:00", "$18", "a b", r"\left(0,1\right]", "Evelyn's", "π"]
    rows = [{"prompt": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
    tasks = load_tasks(_write(tmp_path / "odd.jsonl", *rows))
    assert [t.answer for t in tasks] == answers
    with Verifier() as quick:
        assert quick.score_many([rf"\boxed{{{a}}}" for a in answers], answers).all()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("bad.jsonl", b"", "no tasks in it"),
        ("bad.jsonl", b"\xff\xfe{", "cannot be read: UnicodeDecodeError"),
        ("bad.jsonl.gz", b"no gzip", "line 1: not JSON"),
        ("bad.jsonl.gz", gzip.compress(b"x" * 999)[:-9], "cannot be read: EOFError"),
        ("bad.parquet", b"no parquet", "cannot be read: ArrowInvalid"),
        ("bad.json", b'[{"prompt": "p"', "cannot be read: JSONDecodeError"),
        ("bad.csv", b"a,b\n1,2\n", r"row 1: needs the keys .* found \['a', 'b'\]"),
        ("bad.csv", b"prompt,answer\nHow much?,1,234\n", "row 1: more cells than columns"),
        ("bad.csv", b'prompt,answer\n1+1?,"2\n2+2?,4\n', "unexpected end of data"),
        ("bad.csv", b"prompt,answer,id\n1+1?,2,x\n2+2?,4,x\n", "row 2: the id 'x' is also in row 1"),
        ("empty.jsonl", b'{"prompt": "p", "answer": ""}', "no tasks in it"),
        ("folder/file", b"", "cannot be read: FileNotFoundError"),
    ],
)
def test_faulty_files(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks(tmp_path / name.removesuffix("/file"))
    assert "\n" not in str(caught.value)


def test_no_such_file():
    with pytest.raises(ValueError, match="neither a file nor one of arithmetic, gsm8k"):
        load_tasks("absent.jsonl")


ROWS = [{"prompt": "1+1?", "answer": "2", "level": 3}, {"prompt": "3+4?", "answer": "007", "level": 5}]
EXPECTED = [Task("sums-1", "1+1?", "2", {"level": 3}), Task("sums-2", "3+4?", "007", {"level": 5})]


@pytest.mark.parametrize("name", ["sums.jsonl", "sums.json", "sums.JSONL", "sums.jsonl.gz", "sums.json.GZ"])
def test_forms_of_json(tmp_path, name):
    """Catches: "007" read as 7, an array read as a line, a suffix in capitals not known."""
    text = json.dumps(ROWS, indent=1) if ".json" in Path(name).suffixes else "\n".join(map(json.dumps, ROWS))
    content = gzip.compress(text.encode()) if name.lower().endswith("gz") else text.encode()
    (tmp_path / name).write_bytes(content)
    assert load_tasks(tmp_path / name) == EXPECTED


def test_an_array_in_a_jsonl(tmp_path):
    assert load_tasks(_write(tmp_path / "sums.jsonl", ROWS)) == EXPECTED


def test_csv(tmp_path):
    (tmp_path / "sums.CSV").write_text('prompt,answer,level\n"1+1?\nSay, please.",007,3\r\n')
    assert load_tasks(tmp_path / "sums.CSV") == [Task("sums-1", "1+1?\nSay, please.", "007", {"level": "3"})]
    excel = "\ufeffprompt,answer\n1+1?,2\n".encode()  # it writes a mark first
    (tmp_path / "excel.csv.gz").write_bytes(gzip.compress(excel))
    assert load_tasks(tmp_path / "excel.csv.gz") == [Task("excel-1", "1+1?", "2")]
    (tmp_path / "one.csv").write_text("prompt,answer\nHalf\u2028of 2?,1\n")  # no quotes around the first
    assert load_tasks(tmp_path / "one.csv") == [Task("one-1", "Half\u2028of 2?", "1")]


def test_a_line_separator_in_a_text_is_no_new_line(tmp_path):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "a\u2028b", "answer": 1}, ensure_ascii=False))
    assert load_tasks(tmp_path / "sums.jsonl")[0].prompt == "a\u2028b"


def test_parquet_and_folders_of_datasets(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "sums.parquet")
    table.save_to_disk(tmp_path / "sums")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "both" / "sums")
    for path in ("sums.parquet", "sums", "both/sums"):
        assert load_tasks(tmp_path / path) == EXPECTED
    datasets.DatasetDict(a=table, b=table).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"no train in it: take a folder of \['a', 'b'\]"):
        load_tasks(tmp_path / "splits")
    assert len(load_tasks(tmp_path / "splits" / "a")) == 2
    # A column of whole numbers with a gap is one of floats.
    rows = [{"prompt": f"{i}?", "answer": "1", "id": i} for i in (3.0, None)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "gap.parquet")
    assert [task.id for task in load_tasks(tmp_path / "gap.parquet")] == ["3", "gap-2"]


TURN = {"role": "user", "content": "1+1?"}
COLUMNS = {  # name: (row, the Task's answer)
    "question and answer": ({"question": "1+1?", "answer": "so <<1+1=2>>\n#### 1,002"}, "1,002"),
    "problem and solution": ({"problem": "1+1?", "solution": r"So $\boxed{2}$. QED"}, "2"),
    "problem, solution, answer": ({"problem": "1+1?", "solution": "s", "answer": "2"}, "2"),
    "prompt and solution": ({"prompt": "1+1?", "solution": "2"}, "2"),
    "verl": ({"prompt": [TURN], "reward_model": {"style": "rule", "ground_truth": "2"}}, "2"),
    "messages": ({"messages": [TURN, {"role": "assistant", "content": "2"}]}, "2"),
    "messages and solution": (
        {"messages": [TURN, {"role": "assistant", "content": "2"}], "solution": "3"},
        "3",
    ),
    "final answers": ({"question": "1+1?", "final_answer": ["2"]}, "2"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_people_have(tmp_path, case):
    row, answer = COLUMNS[case]
    (task,) = load_tasks(_write(tmp_path / "t.jsonl", {"id": "a", "source": "s", **row}))
    assert (task.id, task.prompt, task.answer) == ("a", "1+1?", answer)
    assert task.extra["source"] == "s" and not {"id", "prompt", "question"} & task.extra.keys()


def test_golds_are_cut_out_of_their_text(tmp_path):
    golds = ["The answer is 14.", "Answer: 14", "#### 14", "14", r"It is $\boxed{14}$.", "**Answer:** 14"]
    rows = [{"prompt": f"q{i}", "answer": gold} for i, gold in enumerate(golds)]
    assert [t.answer for t in load_tasks(_write(tmp_path / "t.jsonl", *rows))] == ["14"] * 6
    prose = {"prompt": "p", "solution": "First we note that nothing is known here."}
    with pytest.raises(ValueError, match="no tasks in it"):
        load_tasks(_write(tmp_path / "prose.jsonl", prose))


def test_a_prompt_with_two_answers_is_dropped_with_a_word(tmp_path):
    """Catches: a contradiction dropped as a plain repeat, so that a coin decides which answer is right."""
    pairs = [("a", 1), ("b", 2), ("a ", 3), ("b", 2), ("a", 4)]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    with pytest.warns(UserWarning, match="1 tasks in 5 rows.* 1 prompts whose answers contradict"):
        assert [t.id for t in load_tasks(_write(tmp_path / "t.jsonl", *rows))] == ["t-2"]


def test_a_task_can_be_hashed_and_its_repr_is_the_old_one():
    """Checkpoints hold a hash of the tasks' repr; pictures among the columns would print an address."""
    task = Task("1", "p", "a", {"tests": ["x"]})
    assert repr(task) == "Task(id='1', prompt='p', answer='a')" and hash(task) == hash(Task("1", "p", "a"))
    assert Task("1", "p", "a").extra == {}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for datasets.load_dataset: set .rows or .error, read .asked."""
    import datasets

    class Hub:
        rows, error, asked = (), None, None

        def load_dataset(self, hub_id, config, *, split):
            self.asked = hub_id, config, split
            if self.error is not None:
                raise self.error
            return datasets.Dataset.from_list(list(self.rows))

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


HUB_ROWS = {  # what differs from problem and answer
    "gsm8k": ({"question": "q", "answer": "48/2 = <<48/2=24>>24\n#### 1,234"}, "1,234"),
    "math": ({"problem": "q", "solution": r"So $x = \boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
    "amc23": ({"question": "q", "answer": 27.0}, "27"),
    "olympiadbench": ({"question": "q", "final_answer": ["1", "2"]}, "1, 2"),
    "dapo17k": ({"prompt": "q", "solution": "34"}, "34"),
}


@pytest.mark.parametrize("name", reward.HUB)
def test_hub_names(hub, name):
    row, gold = HUB_ROWS.get(name, ({"problem": "q", "answer": "42", "solution": "s", "id": 60}, "42"))
    hub.rows = [row | {"level": 3}, {**row, "level": 5} | {k: "q2" for k, v in row.items() if v == "q"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tasks = load_tasks(name)
    found = [(t.id, t.prompt, t.answer, t.extra["level"]) for t in tasks]
    assert found == [(f"{name}-1", "q", gold, 3), (f"{name}-2", "q2", gold, 5)]
    hub_id, configuration, split = hub.asked
    assert configuration == {"gsm8k": "main", "dapo17k": "all"}.get(name)
    assert re.match("[a-z]+", name)[0] in hub_id.lower()  # what no test can know is whether the hub has it
    trained_on = name in ("gsm8k", "math", "dapo17k", "aime24")  # (AIME 2024 has no other split)
    assert split == ("train" if trained_on else "test")


def test_hub_faults_are_one_line(hub):
    hub.error = ConnectionError("Couldn't reach\nthe hub")
    with pytest.raises(ValueError, match="gsm8k: cannot be read: ConnectionError: Couldn't reach the hub"):
        load_tasks("gsm8k")
    hub.error, hub.rows = None, [{"text": "q", "label": "s"}]
    with pytest.raises(ValueError, match=r"gsm8k, row 1: needs the keys .* found \['text', 'label', 'id'\]"):
        load_tasks("gsm8k")


def test_split_never_leaks():
    tasks = [Task(f"{i}-{j}", text, "1") for i in range(200) for j, text in enumerate(
        [f"What is {i} plus {i}?", f"  what is {i}\nＰＬＵＳ {i} "])]  # fmt: skip
    train, held_out = split_held_out(tasks, 100)
    assert len(held_out) == 100 and sorted([*train, *held_out], key=tasks.index) == tasks
    assert not {t.id.split("-")[0] for t in train} & {t.id.split("-")[0] for t in held_out}
    assert held_out == sorted(held_out, key=tasks.index)  # in file order
    # Neither order nor ids matter, and the seed does.
    assert set(split_held_out(tasks[::-1], 100)[1]) == set(held_out)
    renamed = [Task(str(i), t.prompt, "2") for i, t in enumerate(tasks)]
    assert [t.prompt for t in split_held_out(renamed, 100)[1]] == [t.prompt for t in held_out]
    assert split_held_out(tasks, 100, seed=1)[1] != held_out
    # An odd number: one less. And a smaller one holds out a part of it, whatever the groups' sizes.
    assert split_held_out(tasks, 101)[1] == held_out
    mixed = tasks[:300] + [Task(f"{i}", f"{i % 7} of them", "1") for i in range(60)]
    parts = [set(split_held_out(mixed, n)[1]) for n in range(10, 200)]
    assert all(a <= b and len(b) <= n for n, (a, b) in enumerate(pairwise(parts), 11))
    with pytest.raises(ValueError, match="cannot hold out 1: too many prompts are alike"):
        split_held_out(tasks, 1)


def test_split_bounds():
    tasks = load_tasks("arithmetic")
    assert [len(side) for side in split_held_out(tasks, 256)] == [1024, 256]
    assert split_held_out(tasks, 0) == (tasks, [])
    brackets = [Task(f"{i}", f"{i:08b}".translate({48: "[", 49: "]"}), "1") for i in range(200)]
    assert [len(side) for side in split_held_out(brackets, 40)] == [160, 40]
    for n in (-1, 1280):
        with pytest.raises(ValueError, match="hold out fewer"):
            split_held_out(tasks, n)


# --------------------------------------------------------------------------------- own rewards

TASKS = [Task("a", "p", "1", {"tests": "f(2) == 4"}), Task("b", "q", "2", {"tests": "f(3) == 9"})]


def test_a_reward_from_a_file(tmp_path):
    """A file with a dataclass, and beside it a module that it imports."""
    (tmp_path / "beside.py").write_text("LIMIT = 3\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside import LIMIT\n"
        "@dataclass\nclass Limit:\n    n: int = LIMIT\n"
        "def short(tasks, texts):\n    return [len(text) < Limit().n for text in texts]\n"
    )
    short = load_reward(f"{tmp_path}/mine.py:short")
    assert grade(short, TASKS, ["xx", "xxx"]).tolist() == [1.0, 0.0]


def test_a_reward_may_use_processes(tmp_path):
    """Catches: a file whose functions cannot be pickled. Unit tests are run that way."""
    (tmp_path / "tests.py").write_text(
        "from concurrent.futures import ProcessPoolExecutor\ndef one(text):\n    return float('5' in text)\n"
        "def mine(tasks, texts):\n    with ProcessPoolExecutor(1) as pool:\n"
        "        return list(pool.map(one, texts))\n"
    )
    assert grade(load_reward(f"{tmp_path}/tests.py:mine"), TASKS, ["5", "6"]).tolist() == [1.0, 0.0]
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match=r"ends\.py failed: SystemExit\(3\)"):
        load_reward(f"{tmp_path}/ends.py:mine")


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", ":short", "absent.py:short", "mine.py:LIMIT"])
def test_rewards_that_are_not_there(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("LIMIT = 3\ndef short(tasks, texts):\n    return [1]\n")
    with pytest.raises(ValueError, match=r"^no function '.*' in '.*': --reward FILE.py:FUNCTION$"):
        load_reward(spec)


def test_what_the_users_code_raises_is_the_users_to_see(tmp_path):
    """Catches: an error in the user's file shown as one line about the command."""
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(RuntimeError, match=r"broken\.py failed: ZeroDivisionError") as caught:
        load_reward(f"{tmp_path}/broken.py:f")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_what_a_reward_raises_is_no_wrong_input():
    """Catches: a ValueError of the user's own function shown as one line about the command."""

    def mine(tasks, texts):
        return [int(text) for text in texts]

    with pytest.raises(RuntimeError, match="reward mine failed: ValueError") as caught:
        grade(mine, TASKS, ["", ""])
    assert isinstance(caught.value.__cause__, ValueError)


def test_kinds_of_numbers():
    import torch

    for values in ([1, 0.5], (True, 0.5), np.array([1, 0.5], np.float32), torch.tensor([1, 0.5]),
                  [np.float64(1), torch.tensor(0.5)], [np.True_, 0.5],
                  torch.tensor([1, 0.5], dtype=torch.bfloat16, requires_grad=True)):  # fmt: skip
        rewards = grade(lambda tasks, texts: values, TASKS, ["", ""])  # noqa: B023
        assert rewards.tolist() == [1.0, 0.5] and rewards.dtype == np.float64
    assert grade(lambda tasks, texts: [], [], []).shape == (0,)


@pytest.mark.parametrize(
    "given, message",
    [
        ([1], "returned 1 for 2 texts"),
        ([1, 0, 1], "returned 3 for 2 texts"),
        (None, "returned NoneType for 2 texts"),
        (1.0, "returned float for 2 texts"),
        ([0.5, float("nan")], r"gave nan to task b"),
        ([float("inf"), 0], r"gave inf to task a"),
        ([1, -1], r"gave -1 to task b"),
        ([1.5, 1], r"gave 1.5 to task a"),
        ([1, "1"], r"gave '1' to task b"),
        ([None, 1], r"gave None to task a"),
        ([[1], [0]], r"gave \[1\] to task a"),
    ],
)
def test_what_is_no_reward_is_one_line(given, message):
    def mine(tasks, texts):
        return given

    with pytest.raises(ValueError, match=f"reward mine {message}") as caught:
        grade(mine, TASKS, ["", ""])
    assert "\n" not in str(caught.value)


def test_a_verifier_is_a_reward(verifier):
    assert grade(verifier, TASKS, ["1", r"\boxed{3}"]).tolist() == [1.0, 0.0]


def test_what_was_taken_is_said(tmp_path):
    """Catches: columns chosen, or answers cut out of texts, without a word."""
    rows = [{"question": "1+1?", "answer": "#### 2"}, {"question": "1+2?", "answer": "3"}]
    path = _write(tmp_path / "t.jsonl", *rows)
    with pytest.warns(UserWarning, match="answers are cut out of a text; read are question and answer"):
        assert [task.answer for task in load_tasks(path)] == ["2", "3"]


def test_a_reward_of_ones_own_may_need_no_answer(tmp_path):
    """Catches: tasks for unit tests or a judge that are refused for want of an answer."""
    code = "def f(x):\n\treturn {x: 1"  # no answer that could be compared, and none that must be
    rows = [{"prompt": "a", "tests": "f(1)"}, {"prompt": "b", "answer": None, "tests": "f(2)"}]
    rows.append({"prompt": "c", "solution": code, "tests": ["f(3)"]})
    path = _write(tmp_path / "t.jsonl", *rows)
    tasks = load_tasks(path, answers=False)
    assert [t.extra["tests"] for t in tasks] == ["f(1)", "f(2)", ["f(3)"]]
    assert tasks[2].answer == tasks[2].extra["solution"] == code
    zero = _write(tmp_path / "n.jsonl", {"prompt": "2-2=", "answer": 0}, {"prompt": "d", "answer": False})
    assert [t.answer for t in load_tasks(zero, answers=False)] == ["0", "False"]
    with pytest.raises(ValueError, match="needs the keys"):
        load_tasks(path)
    chats = [{"messages": [{"role": "system", "content": "Be brief."}, TURN | {"content": x}]} for x in "ab"]
    asked = load_tasks(_write(tmp_path / "chats.jsonl", *chats), answers=False)
    assert [t.prompt for t in asked] == ["Be brief.\n\na", "Be brief.\n\nb"]
    same = [{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 2}]  # nobody compares them
    with pytest.warns(UserWarning, match="1 tasks in 2 rows"):
        assert load_tasks(_write(tmp_path / "same.jsonl", *same), answers=False)[0].answer == "1"
