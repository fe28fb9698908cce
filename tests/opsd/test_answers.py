"""Which answer a text gives, and whether it equals the reference."""

import pytest

from opsd.answers import extract, last_box

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
