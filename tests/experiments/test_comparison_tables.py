"""What `compare` prints of a grid, from figures that are made by hand."""

import io
from dataclasses import replace

from made_comparisons import ARMS, failed, made_comparison
from rich.console import Console

from saelens_cosine.experiments.compare.tables import as_tables


def printed(comparison, width=110):
    console = Console(file=io.StringIO(), width=width)
    for table in as_tables(comparison):
        console.print(table)
    return console.file.getvalue()


def test_names_of_a_grid_make_room_for_its_figures():
    shown = printed(made_comparison(layers=(1, 15), rates=(1e-3, 3e-3), noise=0))
    assert "…" not in shown
    assert "0.6500±0.0000" in shown
    assert "-0.0100 ±0.0000" in shown


def test_what_could_not_be_trained_or_measured_is_told_with_its_place_on_the_grid():
    comparison = failed(made_comparison(layers=(1, 15), rates=(1e-3, 3e-3)), ARMS[1], 64, 1)
    (stopped,) = [line for line in printed(comparison).splitlines() if "the loss is NaN" in line]
    assert "cosine_batchtopk, blocks.1.hook_resid_post, k=64, lr 0.001" in stopped
    first, *others = comparison.arms
    broken = replace(first, reconstruction=replace(first.reconstruction, not_finite=7))
    shown = printed(replace(comparison, arms=(broken, *others)))
    part = shown[shown.index("Not finite") :].splitlines()[4]
    assert part.split() == [f"{ARMS[0]},", "blocks.1.hook_resid_post,", "k=16", "0", "7", "10,000"]
