"""Labels of windows of code, from the syntax tree of the whole file."""

import pytest

from saelens_cosine.experiments.evaluate.texts import code_concepts
from saelens_cosine.experiments.evaluate.texts.code_concepts import CONCEPTS, windows


def by_line(source):
    """Each line of code as a window of its own: what is asked of it, and what of that holds."""
    file = code_concepts._File(source)
    answers = {}
    for line in sorted(file.in_statement):
        window = file.window(line, line)
        asked = {name: concept.holds(window) for name, concept in CONCEPTS.items() if concept.among(window)}
        answers[line] = (set(asked), {name for name, holds in asked.items() if holds})
    return answers


# labels of code

SHELF = '''\
import os


class Shelf:
    """Books,
    by title."""

    def __len__(self):
        if self.books is None:
            return 0
        return len(
            self.books
        )


def total(shelves):
    for shelf in shelves:
        try:
            count = len(shelf)
        except TypeError:
            raise ValueError("no %s" % shelf)
    return count
'''


def test_labels_by_hand():
    answers = by_line(SHELF)
    assert {line: holds for line, (_, holds) in answers.items()} == {
        1: set(),
        4: set(),
        5: {"docstring"},
        6: {"docstring"},
        8: set(),  # the class's line, not the function's
        9: {"method", "special_method"},
        10: {"method", "special_method", "condition", "leaves_block"},
        11: {"method", "special_method", "unfinished"},
        12: {"method", "special_method", "unfinished"},
        13: {"method", "special_method", "leaves_block"},
        16: set(),
        17: set(),
        18: {"loop"},
        19: {"loop", "try"},
        20: {"loop", "raise_or_except"},
        21: {"loop", "try", "raise_or_except", "string_formatting", "leaves_block"},
        22: {"leaves_block"},
    }
    everything = set(CONCEPTS)
    assert answers[1][0] == answers[4][0] == answers[16][0] == set()  # nothing is asked at a module's level
    assert answers[5][0] == answers[8][0] == {"docstring"}
    assert answers[9][0] == everything
    assert answers[11][0] == everything - {"leaves_block"}  # its line is not the statement's last
    assert answers[17][0] == everything - {"special_method"}  # asked of methods only


NESTED = """\
def outer(x):
    if x:
        a = 1
    elif a:
        b = 2
    else:
        while x:
            x -= 1
    class Inner:
        field = 1
        @staticmethod
        def run():
            "{}"
            ...
            "{}".format(x); f"{x}"
    try:
        x = [
            1]
    finally:
        @outer
        def last():
            yield "%d" % x
"""


def test_labels_of_awkward_code_by_hand():
    answers = by_line(NESTED)
    assert {line: holds for line, (_, holds) in answers.items()} == {
        1: set(),
        2: set(),
        3: {"condition"},
        4: set(),  # an elif is on the level of its if
        5: {"condition"},
        6: set(),
        7: {"condition"},
        8: {"condition", "loop"},
        9: set(),
        10: set(),
        11: set(),
        12: set(),
        13: {"docstring"},
        14: {"method"},  # an ellipsis is no docstring
        15: {"method", "string_formatting"},
        16: set(),
        17: {"try", "unfinished"},
        18: {"try"},
        19: set(),
        20: {"try"},
        21: {"try"},
        22: {"try", "string_formatting"},
    }
    assert answers[10][0] == {"docstring"}  # a class's code, though within a function
    assert "special_method" not in answers[9][0]
    assert "special_method" in answers[14][0]


def test_an_expression_counts_where_it_ends():
    file = code_concepts._File('def f(x):\n    raise ValueError("no %s"\n        % x)')
    assert not CONCEPTS["string_formatting"].holds(file.window(2, 2))  # the % is below
    assert CONCEPTS["raise_or_except"].holds(file.window(2, 2))
    assert CONCEPTS["string_formatting"].holds(file.window(2, 3))
    assert not CONCEPTS["raise_or_except"].holds(file.window(3, 3))


def test_windows_are_whole_lines_that_do_not_overlap(monkeypatch):
    monkeypatch.setattr(code_concepts, "WINDOW_CHARACTERS", 12)
    monkeypatch.setattr(code_concepts, "SHORTEST_WINDOW", 4)
    # 1234567890123
    lines = [
        "",
        "alpha = 1",  # with the next 9 + 1 + 3 characters
        "b=2",
        "much_too_long = 1",
        "c=3",  # 3 + 1 + 3 + 1 + 4 = 12, and ends in code only after 7
        "d=4",
        "# e!",
        "",
        "f=5",  # under 4 by itself
    ]
    found = list(windows("\n".join(lines)))
    assert [window.text for window in found] == ["alpha = 1", "c=3\nd=4", "# e!\n\nf=5"]
    assert [window.statement.targets[0].id for window in found] == ["alpha", "d", "f"]
    monkeypatch.setattr(code_concepts, "WINDOW_CHARACTERS", 13)
    assert next(windows("\n".join(lines))).text == "alpha = 1\nb=2"


def test_where_something_is_due():
    source = """\
from a import b  # import
def f(self, x):
    "import return ("
    for y in self.rows[(x in y)]: pass
    if f(x): return
    return
    return (
        not f(
            x))
try: import c
except: pass
except_ = [y for y in c]
"""
    with pytest.raises(SyntaxError):
        list(windows(source + "try:"))
    file = code_concepts._File(source)
    window = file.window(1, 12)
    assert window.text == source.rstrip("\n")
    assert [(name, window.text[:end].split("\n")[-1]) for name, end in window.cuts] == [
        ("imported", "from a import"),
        ("function_name", "def"),
        ("iterable", "    for y in"),
        ("attribute", "    for y in self."),
        ("argument", "    for y in self.rows[("),
        ("tested", "    if"),
        ("argument", "    if f("),
        ("returned", "    return"),  # the one above returns nothing
        ("imported", "try: import"),
        ("caught", "except"),
    ]
