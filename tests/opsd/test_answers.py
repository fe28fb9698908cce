"""Which answer a text gives, and whether it equals the reference."""

import pytest

from opsd.answers import extract, last_box
from opsd.data import Row
from opsd.scorers import math_verify_scorer

BOXES = [
    (r"\boxed{1} then \boxed{ \frac{1}{2} } end", r"\frac{1}{2}"),
    (r"\boxed{\frac{1}{\sqrt{x^{2}}}}", r"\frac{1}{\sqrt{x^{2}}}"),
    (r"\boxed{1} so \boxed{\frac{1}{\sqrt{x^{2^{3}}}}}", r"\frac{1}{\sqrt{x^{2^{3}}}}"),
    (r"\boxed {5}", "5"),
    ("\\boxed{a\nb}", "a\nb"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{\boxed{5} + 1}", r"\boxed{5} + 1"),
    (r"\boxed{8, no, \boxed{7}", "7"),  # the first was never finished, the last was
    (r"the set {1, 2 and \boxed{5}", "5"),
    (r"} \boxed{5} }", "5"),
    (r"\\boxed{5}", "5"),  # written as in JSON
    (r"\boxed{7} so \boxed{8", None),
    (r"\boxed{7} so \boxed{\frac{8}{9}", None),
    (r"\boxed{7} so \boxed{}", None),
    (r"\boxed{7} so \boxed{ }", None),
    (r"\boxed{7} so \boxed 8", None),
    (r"\boxed{\boxed{}}", None),
    (r"\boxedx{5}", None),
    ("5", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), BOXES)
def test_the_last_box_alone_counts_and_braces_are_counted(text, answer):
    assert last_box(text) == answer
    assert extract(text, "boxed") == answer


def test_boxes_without_end_take_no_time():
    # Each of them searched to the end on its own would be 10^10 steps.
    assert last_box("\\boxed{" * 100_000) is None
    assert last_box("\\boxed{" * 100_000 + "5" + "}" * 100_000).count("boxed") == 99_998


def test_a_pattern_of_the_users_is_its_last_match():
    assert extract("#1 #2 \\boxed{3}", r"#(\d)") == "2"
    assert extract("\\boxed{3}", r"#(\d)") is None


PAIRS = [
    # numbers and thousands separators
    ("1,000", "1000", True),
    (r"1\,000", "1000", True),
    ("1 000", "1000", True),
    ("1{,}000", "1000", True),
    ("1e3", "1000", True),
    ("1,000,000", "10^6", True),
    ("1,00", "100", False),
    ("1,200", "1, 200", False),
    ("0.5", r"\frac{1}{2}", True),
    (".5", "1/2", True),
    ("0.3333", "1/3", False),
    ("0.333333", "1/3", False),
    (r"0.\overline{3}", "1/3", True),
    (r"0.1\overline{6}", r"\frac16", True),
    ("0.1", "0.10000001", False),
    ("10^{-20}", "10^{-21}", False),
    (r"1.5\times 10^{3}", "1500", True),
    (r"6.02 \cdot 10^{23}", r"6.03 \cdot 10^{23}", False),
    ("-3", "−3", True),
    ("007", "7", True),
    ("2.50", "2.5", True),
    ("12345678901234567890", "12345678901234567891", False),
    # fractions and mixed numbers
    ("11 5/6", "71/6", True),
    (r"11\frac{5}{6}", r"\frac{71}{6}", True),
    (r"-1\tfrac12", "-1.5", True),
    ("1 1/2", r"\frac{11}{2}", False),
    (r"\frac{-1}{2}", r"-\frac{1}{2}", True),
    ("2/4", "1/2", True),
    (r"\dfrac12", "0.5", True),
    ("1 000/3", r"\frac{1000}{3}", True),
    # percentages
    (r"50\%", "0.5", True),
    (r"50\%", r"\frac{1}{2}", True),
    (r"50\%", "50", True),
    ("50%", "5", False),
    (r"50\%", r"0.5\%", False),
    (r"12.5\%", r"\frac18", True),
    # units: known ones are converted, one side may have none
    ("5 km", "5 m", False),
    ("5 km", "5000 m", True),
    (r"5\text{ cm}", "5", True),
    (r"5\text{ cm}", r"5 \text{ centimeters}", True),
    (r"5\text{ cm}^2", r"5\text{ cm}", False),
    (r"5\ \mathrm{m/s}", r"18 \text{ km/hour}", True),
    (r"5\ \mathrm{m/s}", r"5 \text{ m/s}^2", False),
    ("10 square meters", r"10\text{ m}^2", True),
    (r"3 \text{ apples}", "3", True),
    ("3 apples", "3 oranges", False),
    (r"\$5", "5", True),
    (r"\$5", "5 dollars", True),
    (r"\$5", "€5", False),
    (r"\$1{,}250.00", "1250", True),
    ("$5$", "5", True),
    (r"90^\circ", "90", True),
    (r"90^{\circ}", r"90 \text{ degrees}", True),
    (r"20^\circ C", r"20^\circ F", False),
    (r"5 \text{ million}", "5,000,000", True),
    (r"\text{5 million}", "5", False),
    ("3m", "3", False),
    ("2x", "2", False),
    ("2c", "2", False),
    (r"2\sqrt{3} \text{ cm}", r"\sqrt{12}", True),
    (r"2\sqrt{3} \text{ cm}", r"2\sqrt{3} \text{ m}", False),
    ("2 hours", "120 minutes", True),
    # other bases
    ("101_2", "5", True),
    ("101_2", "101_3", False),
    ("101_2", "101", False),
    # expressions
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False),
    ("5!", "120", True),
    (r"3\sqrt{2}", r"\sqrt{18}", True),
    (r"\sqrt{2}", "1.41421356", False),
    (r"\pi", "3.14159265", False),
    (r"\frac{22}{7}", r"\pi", False),
    ("(x+1)^2", "x^2+2x+1", True),
    ("(x+1)^2", "x^2+2x+1.0000000001", False),
    (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}", True),
    (r"\sin^2 x+\cos^2 x", "1", True),
    ("2^{100}", "1267650600228229401496703205376", True),
    ("2^{100}", "1267650600228229401496703205377", False),
    (r"\binom{5}{2}", "10", True),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt6}", True),
    ("2+3i", "3i+2", True),
    (r"\arctan 1", r"\frac{\pi}{4}", True),
    (r"\sqrt{x^2}", "x", False),
    ("e^{-300}", "e^{-301}", False),
    ("x+10^{-30}", "x", False),
    # pairs and intervals
    ("(1,2)", r"\{1,2\}", False),
    ("(1,000)", "(1,0)", False),
    ("(1,000)", "1000", True),
    ("(2,100)", "(2, 100)", True),
    ("(1,2)", "(2,1)", False),
    ("(1,2]", "[1,2)", False),
    ("[1,2]", "(1,2)", False),
    (r"\left( \frac12, 3\right)", "(0.5,3)", True),
    ("(0.1,2)", "(0.10000001,2)", False),
    ("(1,2,3)", "(1,2)", False),
    # sets and lists
    (r"\{1,2\}", r"\{2,1\}", True),
    (r"\{1,2\}", "2, 1", True),
    (r"\{1,1,2\}", r"\{1,2\}", True),
    (r"1 \text{ and } 2", "1,2", True),
    (r"1 \text{ or } 2", r"\{1, 3\}", False),
    ("x=1, 2", "1,2", True),
    (r"\pm 2", "2,-2", True),
    ("1, 2, and 3", "1,2,3", True),
    (r"\emptyset", r"\{\}", True),
    ("3,5", "3.5", False),
    # inequalities and intervals
    ("x>3", r"(3,\infty)", True),
    ("x>3", r"[3,\infty)", False),
    ("3<x", "x>3", True),
    (r"x \ge 3", r"[3,\infty)", True),
    (r"1<x\le 2", "(1,2]", True),
    (r"2\ge x>1", "(1,2]", True),
    (r"x\in(3,\infty)", "x>3", True),
    ("x>3", "y>3", False),
    ("x>0.1", "x>0.10000001", False),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2", True),
    (r"(1,2)\cup(3,4)", r"(3,4)\cup(1,2)", True),
    (r"\mathbb{R}", r"(-\infty,\infty)", True),
    ("x>y", "y<x", True),
    (r"(-\infty,+\infty)", r"(-\infty,\infty)", True),
    # words
    (r"\text{north}", "north", True),
    (r"\text{North}", "north", True),
    (r"\text{north}", "south", False),
    ("north", "thorn", False),
    (r"\text{(A)}", "A", True),
    ("A", "B", False),
    (r"\textbf{(B)}", "b", True),
    (r"\mathrm{True}", r"\text{true}", True),
    (r"\text{yes}", "no", False),
    ("x", "y", False),
    ("xy", "yx", True),
    # names, and others
    ("x=5", "5", True),
    ("x=5", "y=5", False),
    ("x=5", "x=5.0", True),
    ("y=2x+1", "2x+1", True),
    ("2x+3y=6", "4x+6y=12", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    (r"\begin{pmatrix}1\\ \frac12\end{pmatrix}", r"\begin{pmatrix}1\\0.5\end{pmatrix}", True),
    ("f(x)=x^2", "x^2", True),
    ("2:3", "4:6", True),
    ("5 5/6 hours", "350 minutes", True),
    (r"1\frac{1}{2} \text{ cups}", r"\frac32 \text{ cups}", True),
    ("2 pi", r"2\pi", True),
    ("6abc", "6", False),
    ("5.", "5", True),
    ("x=1,y=2", "(1,2)", True),
    ("x=2,y=1", "(1,2)", False),
    ("y=2, x=1", "(1,2)", True),
    ("x=1, x=2", "(1,2)", False),
    ("(x,y)=(1,2)", "(1,2)", True),
    ("1,2", "(1,2)", False),
    ("x=1,y=2", "x=2,y=1", False),
    (r"\$18", "18 dollars", True),
    (r"16\frac{2}{3}\%", r"\frac{50}{3}\%", True),
    ("$x = 5$", "5", True),
    ("2", r"\boxed{2}", True),
    (r"\frac{3}{4} \text{ of the pie}", r"\frac34", True),
    (r"\text{Monday}", "monday.", True),
    (r"\text{Alice and Bob}", "Alice and Bob", True),
    ("-$5", "-5", True),
    (r"5\text{ feet}", "60 inches", True),
    (r"3 \text{ red marbles}", "3 marbles", True),
    ("0.1x", r"\frac{x}{10}", True),
    ("0.1x", "0.10000001x", False),
    ("x^2+0.3", r"x^2+\frac{3}{10}", True),
    ("x>3", "3>x", False),
    ("5 m", "5", True),
    ("2 cups", "3 cups", False),
    (r"90^\circ", r"\frac{\pi}{3}", False),
    (r"\textbf{1,234}", "1234", True),
    (r"\text{12}", "13", False),
    (r"\text{5 km}", "5000 m", True),
    ("{1,2}", r"\{2,1\}", True),
    ("{1,2}", "(1,2)", False),
    ("10^12", "1,000,000,000,000", True),
    ("10^-3", "0.001", True),
    ("2^10", "1024", True),
    ("Area = 5", "5", True),
    (r"\text{Area} = 5", "6", False),
]


@pytest.mark.parametrize(("given", "reference", "right"), PAIRS)
def test_equal_answers(given, reference, right):
    pytest.importorskip("math_verify")
    score = math_verify_scorer("boxed")
    for answer, of in ((given, reference), (reference, given)):
        assert score(f"So 7 it is not: \\boxed{{{answer}}}.", Row("p", "s", of, None, "rows:1")) is right
