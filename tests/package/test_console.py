"""Names from outside reach the terminal as they are."""

import ast
import os
from pathlib import Path

import pytest
from helpers import make_sae
from rich.console import Console
from rich.table import Table

import saelens_cosine
from saelens_cosine.cli import main
from saelens_cosine.console import PlainTable, literal, plain_table, say, shown_number, visible
from saelens_cosine.sharing.neuronpedia import _read
from saelens_cosine.terminal.bar import progress_bar

NAMES = ["lr[a]", "[bold]x[/bold]", "a[/]", "x:key:", "\\[a]", "[link=http://x]y"]


def printed(capsys, *shown):
    console = Console(width=200)
    for part in shown:
        console.print(part)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_table_shows_its_strings_as_they_are(name, capsys):
    table = PlainTable(title=f"of {name}", caption=f"about {name}", title_justify="left")
    table.add_column(f"head {name}")
    table.add_row(f"cell {name}")
    table.add_row(literal("nan", "red"))
    out = printed(capsys, table)
    for where in ("of", "about", "head", "cell"):
        assert f"{where} {name}" in out
    assert "nan" in out
    assert table.title == f"of {name}"  # printing changes nothing
    assert next(iter(table.columns[0].cells)) == f"cell {name}"


def test_a_table_is_as_wide_and_as_coloured_as_any(capsys):
    def made(kind):
        table = kind(title="a title", caption="a caption", title_style="bold red")
        table.add_column("figure", justify="right", style="blue")
        table.add_row("1.5")
        return table

    shown = []
    for kind in (Table, PlainTable):
        Console(width=60, force_terminal=True, color_system="standard").print(made(kind))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_line_and_a_bar_show_names_as_they_are(name, capsys):
    say(Console(width=200), f"Written to {name}")
    assert f"Written to {name}" in capsys.readouterr().out
    with progress_bar(quiet=False) as progress:
        progress(f"{name}: fve", 1, 2)
    assert f"{name}: fve" in capsys.readouterr().err


def test_a_terminal_obeys_no_name(capsys):
    assert visible("a\x1b[2Jb\r\x07\x9b\n\tc") == "a\\x1b[2Jb\\x0d\\x07\\x9b\n\tc"
    assert visible("sae-\udcff") == "sae-\\udcff"
    assert main(["share", "no\x1b[2Jwhere", "--repo", "me/saes"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_tables_of_the_commands_show_arms_as_they_are(capsys):
    table = plain_table("title [a]", ["arm"], ["x"])
    table.add_row("lr[a]", shown_number(float("nan"), "{:.4f}"))
    other = plain_table("Left out", ["arm [b]"])
    other.add_row("lr[c]")
    out = printed(capsys, table, other)
    assert all(part in out for part in ("title [a]", "lr[a]", "nan", "arm [b]", "lr[c]"))
    assert "[red]" not in out


def test_every_table_of_the_package_is_a_plain_one():
    """Made in one place: no other module calls rich's class or ours."""
    package = Path(saelens_cosine.__file__).parent
    makers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "from rich.table import Table" in (text := path.read_text()) or "PlainTable" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Table", "PlainTable")
    }
    assert makers == {"console.py"}
    assert isinstance(plain_table("", [""]), PlainTable)


def test_a_place_is_shown_as_it_is_by_convert(tmp_path, capsys):
    source = tmp_path / "lr[a]"
    make_sae("cosine_topk").save_inference_model(source)
    assert main(["convert", str(source), str(tmp_path / "to[b]")]) == 0
    assert "to[b]" in capsys.readouterr().out.replace("\n", "")


def test_a_pipe_in_place_of_the_record_of_an_upload_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "neuronpedia.json")
    assert _read(tmp_path / "neuronpedia.json") == {}
