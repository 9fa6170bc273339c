"""Concepts of Python source code with exact labels: what windows of the bundled corpus can be probed for, or ablated.

A window is some whole lines of a file. Its labels come from the syntax tree of the whole file, so a window may end in a
class that began long before it; a probe then reads what the model concludes from the window, not a word in it.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

WINDOW_CHARACTERS = 250
"""Longest window: 60 tokens of the bundled model on average."""

SHORTEST_WINDOW = 80
"""Shorter ones, at the end of a file or before a long line, are left out."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.ClassDef)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_LEAVE_A_BLOCK = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Window:
    """
    Consecutive lines of a source file that end in code or a string, not in a comment.

    Args:
        text (str): The lines, without blank ones at either end.
        around (tuple[ast.AST, ...]): Nodes that have the last line in a block of theirs, the outermost first.
        within (tuple[ast.AST, ...]): Statements and exception handlers that begin on one of the lines, and expressions that lie on
            them to their end.
        statement (ast.stmt): The innermost statement on the last line.
        goes_on (bool): Whether the last line ends within brackets, within a string, or in a backslash.
        cuts (tuple[tuple[str, int], ...]): Where a concept of `NEXT_TOKENS` comes next, on the same line: its name, and the number
            of characters of `text` before it.
    """

    text: str
    around: tuple[ast.AST, ...]
    within: tuple[ast.AST, ...]
    statement: ast.stmt
    goes_on: bool
    cuts: tuple[tuple[str, int], ...]

    def is_in(self, *kinds: type[ast.AST]) -> bool:
        """Whether the last line is in a block of one of these."""
        return any(isinstance(node, kinds) for node in self.around)

    def has(self, *kinds: type[ast.AST]) -> bool:
        """Whether one of these is within the window."""
        return any(isinstance(node, kinds) for node in self.within)

    @property
    def in_docstring(self) -> bool:
        """Whether the last line is one of a string that stands by itself."""
        value = self.statement.value if isinstance(self.statement, ast.Expr) else None
        return isinstance(value, ast.Constant) and isinstance(value.value, str)

    @property
    def function(self) -> str | None:
        """Name of the function whose code the last line is; None at the level of a module or class, and in a docstring."""
        scopes = [node for node in self.around if isinstance(node, _SCOPES)]
        if not scopes or isinstance(scopes[-1], ast.ClassDef) or self.in_docstring:
            return None
        return scopes[-1].name


class Concept(NamedTuple):
    """
    A binary property of windows.

    Args:
        among (Callable[[Window], object]): True of the windows that are labelled: of a kind, so that only the property differs.
        holds (Callable[[Window], bool]): True of those that have it.
    """

    among: Callable[[Window], object]
    holds: Callable[[Window], bool]


def _is_formatting(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant | ast.JoinedStr)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Attribute) and node.attr == "format")


def _in_function(window: Window) -> object:
    return window.function


CONCEPTS: dict[str, Concept] = {
    "method": Concept(_in_function, lambda w: w.is_in(ast.ClassDef)),
    "special_method": Concept(lambda w: w.function and w.is_in(ast.ClassDef), lambda w: str(w.function).endswith("__")),
    "docstring": Concept(lambda w: w.is_in(*_SCOPES), lambda w: w.in_docstring),
    "condition": Concept(_in_function, lambda w: w.is_in(ast.If)),
    "loop": Concept(_in_function, lambda w: w.is_in(*_LOOPS)),
    "try": Concept(_in_function, lambda w: w.is_in(ast.Try, ast.ExceptHandler)),
    "raise_or_except": Concept(_in_function, lambda w: w.has(ast.Raise, ast.ExceptHandler)),
    "string_formatting": Concept(_in_function, lambda w: any(_is_formatting(node) for node in w.within)),
    "unfinished": Concept(_in_function, lambda w: w.goes_on),
    "leaves_block": Concept(lambda w: w.function and not w.goes_on, lambda w: isinstance(w.statement, _LEAVE_A_BLOCK)),
}
"""Those named for a statement say that the window's last line is in one; in which the model has to keep track of it."""

NEXT_TOKENS: dict[str, Callable[[list[str]], bool]] = {
    "imported": lambda words: words[-1] == "import",
    "function_name": lambda words: words[-1] == "def",
    "attribute": lambda words: words[-2:] == ["self", "."],
    "returned": lambda words: words == ["return"],
    "iterable": lambda words: words[0] == "for" and words[-1] == "in" and words.count("in") == 1,
    "caught": lambda words: words == ["except"],
    "tested": lambda words: words in (["if"], ["elif"]),
    "argument": lambda words: words[-1] == "(" and words[-2:-1] != ["("] and words[0] not in ("def", "class"),
}
"""What comes next, told by the tokens of the statement so far."""


def windows(source: str) -> Iterator[Window]:
    """The windows of a file, in order and without a line in common.

    Raises:
        SyntaxError: not Python, or not of the running version.
    """
    file = _File(source)
    first = 1
    while first <= len(file.lines):
        if not file.line(first).strip():
            first += 1
            continue
        end, size = first, 0  # lines from first to end - 1
        while end <= len(file.lines) and (size := size + len(file.line(end)) + 1) <= WINDOW_CHARACTERS + 1:
            end += 1
        last = end - 1
        while last >= first and not (last in file.in_statement and file.line(last).strip()):
            last -= 1
        if last < first:
            first = max(end, first + 1)
            continue
        window = file.window(first, last)
        if len(window.text) >= SHORTEST_WINDOW:
            yield window
        first = last + 1


class _File:
    """A source file by its lines, which count from 1."""

    def __init__(self, source: str):
        self.lines = source.split("\n")
        self.around: dict[int, list[ast.AST]] = {}
        self.begins: dict[int, list[ast.AST]] = {}
        self.statement: dict[int, ast.stmt] = {}
        self.in_statement: set[int] = set()
        self.goes_on: set[int] = set()
        self.cuts: dict[int, list[tuple[str, int]]] = {}  # by line: name, column
        for node in ast.walk(ast.parse(source)):  # outer nodes before those within
            if isinstance(node, ast.stmt | ast.expr | ast.ExceptHandler):
                self.begins.setdefault(node.lineno, []).append(node)
            if isinstance(node, ast.stmt):
                self.statement |= dict.fromkeys(_lines([node]), node)
            if not isinstance(node, ast.Module):
                for block in _blocks(node):
                    for line in _lines(block):
                        self.around.setdefault(line, []).append(node)
        self._read_tokens(source)

    def line(self, number: int) -> str:
        return self.lines[number - 1]

    def window(self, first: int, last: int) -> Window:
        cuts: list[tuple[str, int]] = []
        before = 0
        for line in range(first, last + 1):
            cuts += [(name, before + column) for name, column in self.cuts.get(line, [])]
            before += len(self.line(line)) + 1
        return Window(
            "\n".join(self.lines[first - 1 : last]),
            tuple(self.around.get(last, ())),
            tuple(node for line in range(first, last + 1) for node in self.begins.get(line, ()) if _counts(node, last)),
            self.statement[last],
            last in self.goes_on,
            tuple(cuts),
        )

    def _read_tokens(self, source: str) -> None:
        words: list[str] = []
        begin = end = (0, 0)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in _LAYOUT:
                continue
            if not words:
                begin = token.start
            if token.type == tokenize.NEWLINE:
                self.in_statement.update(range(begin[0], token.start[0] + 1))
                self.goes_on.update(range(begin[0], token.start[0]))
                words = []
                continue
            if words and token.start[0] == end[0]:  # something does come next
                for name, comes_next in NEXT_TOKENS.items():
                    if comes_next(words):
                        self.cuts.setdefault(end[0], []).append((name, end[1]))
            words.append(token.string)
            end = token.end


def _counts(node: ast.AST, last: int) -> bool:
    return not isinstance(node, ast.expr) or (node.end_lineno or node.lineno) <= last


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list) and block and not _is_elif(node, block[0]):
            yield block


def _is_elif(node: ast.AST, inner: ast.AST) -> bool:
    """An `elif` is an `if` within the `else` to the parser, and the same statement to a reader."""
    return isinstance(node, ast.If) and isinstance(inner, ast.If) and node.col_offset == inner.col_offset


def _lines(block: list[ast.stmt]) -> range:
    decorators = getattr(block[0], "decorator_list", [])
    first = min([block[0].lineno, *(decorator.lineno for decorator in decorators)])
    return range(first, (block[-1].end_lineno or first) + 1)
