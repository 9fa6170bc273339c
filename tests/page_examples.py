"""Pages for the tests of the report: every kind of chart and table, small, hostile, and as large as they come."""

import math

import torch

from saelens_cosine.metrics.dictionary.features import Context, TokenValue
from saelens_cosine.report.browser import Browser, Feature
from saelens_cosine.report.chart import Arms, Axis, Chart, Plot, cut
from saelens_cosine.report.estimate import Estimate
from saelens_cosine.report.page import Page, Section
from saelens_cosine.report.table import Table

EVIL = '</script ><script>window.hacked=1</script ><img src=x onerror="window.hacked=1">\'"&amp;<!--<b>'
# with blanks, or it would be taken for a path and cut
LINK = '<a href="javascript:window.hacked=1">click</a>'


def chart(arms: Arms, note: str = "Two of each.") -> Chart:
    """Two estimates of each arm, joined, with their numbers."""
    plot = Plot(arms, Axis("features ablated", log=True, ticks={1: "1", 10: "10"}), Axis("precision"))
    values = {arm: [Estimate(1.5 + i, 1.0 + i, 2.0 + i), Estimate(1.0 + i)] for i, arm in enumerate(arms.names)}
    for arm, found in values.items():
        plot.line(arm, [1, 10], found)
    table = Table("Precision", ("arm", "1", "10"), tuple((arm, *found) for arm, found in values.items()))
    return Chart("Precision", note, plot.figure, table)


def charts(arms: Arms, dots: int = 300) -> tuple[Chart, ...]:
    """Every kind of mark there is."""
    rng = torch.Generator().manual_seed(0)
    first = arms.names[0]
    lines = Plot(arms, Axis("training tokens", ends=(0, 2e6)), Axis("FVE", ends=(0.4, 1)))
    steps = Plot(arms, Axis("norm exponent a"), Axis("share of features"))
    for i, arm in enumerate(arms.names):
        lines.line(
            arm, [1e5 * t for t in range(1, 20)], [0.9 - (0.3 + 0.1 * i) / t for t in range(1, 20)], marked=False
        )
        if i:
            steps.line(arm, [0.1 * i] * 2, [0, 0.2], [f"one exponent for all features, {0.1 * i}"] * 2)
        else:
            values = (torch.randn(500, generator=rng) * 0.2 + 0.3).tolist()
            steps.steps(arm, [*values, math.nan], [-0.6 + 0.05 * j for j in range(40)])
    steps.guide([0, 0], [0, 0.2])
    tasks = ["a sentiment", "a task whose name is much too long to be shown", "news"]
    ticks = {float(i): cut(task, 18) for i, task in enumerate(tasks)}
    probes = Plot(arms, Axis("probe accuracy"), Axis("", ends=(2.5, -0.5), ticks=ticks))
    for i, arm in enumerate(arms.names):
        found = [Estimate(v, v - 0.05, v + 0.03) for v in (0.7 + 0.05 * i, 0.8, math.nan)]
        probes.line(arm, found, [t + 0.2 * i for t in range(3)], joined=False)
    x, y, shades = torch.rand(3, dots, generator=rng).tolist()
    scatter = Plot(arms, Axis("correlation", ends=(-0.02, 1.02)), Axis("cosine", ends=(-0.02, 1.02)))
    tips = [f"{i}: {a:.2f}, {b:.2f}" for i, (a, b) in enumerate(zip(x, y, strict=True))]
    scatter.dots(first, x, y, tips, features=list(range(dots)), shades=[math.nan, *shades[1:]], shade="top quartile")
    norms = Plot(arms, Axis("‖x‖", log=True, ends=(0.01, 1)), Axis("‖f‖", log=True, ends=(0.01, 1)))
    norms.band([0.01, 1], [0.008, 0.8], [0.012, 1.2])
    norms.guide([0.01, 1], [0.01, 1])
    norms.dots(first, x, y, tips)
    return (
        Chart("FVE", "One line per seed.", lines.figure),
        Chart("Norm exponents", "", steps.figure),
        Chart("Probing", "All features.", probes.figure, height=260),
        Chart(f"{first} matched", "Choose a point.", scatter.figure, height=408),
        Chart("ZF plot", "On the dashed line they are equal.", norms.figure, height=408),
    )


def features(n: int, arms: Arms) -> tuple[Feature, ...]:
    """n features of 8 contexts of 29 tokens, 20,000 different tokens."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20_000, (n, 8, 29), generator=rng).tolist()
    strengths = (torch.rand(n, 8, 29, generator=rng) ** 12 * 50).tolist()
    found = []
    for i in range(n):
        contexts = []
        for tokens, values in zip(ids[i], strengths[i], strict=True):
            words, codes = [f" token{t}" for t in tokens], [v if v > 5 else 0.0 for v in values]
            words[20], codes[20] = (" needle" if i % 500 == 7 else " common"), 50 + (i % 500) / 10
            if i in (3, 5, 9):  # not active, active on both words but not between them, active on both in one run
                straw = {3: (" straw", "berry", " of"), 5: (" straw", " of", "berry"), 9: (" straw", "berry", " of")}
                words[:3] = straw[i]
                codes[:3] = {3: (0.0, 0.0, 0.0), 5: (2.0, 0.0, -2.0), 9: (2.0, 2.0, 0.0)}[i]
            contexts.append(Context(tuple(words), tuple(codes)))
        exponent = i / n if i % 2 else None
        found.append(Feature(arms.names[i % 2], i, 10 ** (-1 - i % 4), exponent, tuple(contexts)))
    return tuple(found)


def page(n_features: int = 20) -> Page:
    """Two arms and everything that a page can hold."""
    arms = Arms(("one", "two"))
    comparison = Table(
        "Comparison",
        ("measure", *arms.names),
        (("FVE", Estimate(0.9, 0.8, 0.95), Estimate(0.8, 0.7, 0.85)), ("L0", Estimate(31.5), Estimate(math.nan))),
    )
    wide = tuple(f"column {i} of a wide table" for i in range(20))
    sections = (
        Section("comparison", "Comparison", "Each value.", (comparison, "A word on it.")),
        Section("saes", "SAEs", "What each one is.", (Table("SAEs", wide, (wide,)),)),
        Section("empty", "Empty", "Nothing.", ()),
        Section("charts", "Charts", "Of all kinds.", (chart(arms), *charts(arms, 2000))),
        Section("features", "Features", "Search.", (Browser(features(n_features, arms)),)),
    )
    return Page("Title", {"model": "bundled"}, (), arms, sections)


def evil_page() -> Page:
    """Every text of a page tries to leave its place."""
    arms = Arms((EVIL, LINK, "<i>", "&lt;b&gt;"))
    context = Context((EVIL, "\n", "\ud800", "\0", "é\u2028"), (1.0, 0.5, 0.25, -0.5, 2.0))
    feature = Feature(EVIL, 7, 0.1, None, (context,), (TokenValue(EVIL, 1.0),), (TokenValue("\t", -1.0),))
    plot = Plot(arms, Axis(EVIL), Axis(LINK, ticks={1.0: EVIL, 2.0: LINK}))
    for i, arm in enumerate(arms.names):
        plot.line(arm, [1, 2], [1 + i / 5, 2], [LINK, EVIL])
    scatter = Plot(arms, Axis("%{x}<b>"), Axis("$x$"))
    scatter.dots(EVIL, [1.0], [1.0], ["%{customdata}"], features=[7], shades=[0.5], shade=LINK)
    table = Table(EVIL, (EVIL, LINK), ((EVIL, LINK), (LINK, Estimate(1.0, 0.5, 2.0))))
    drawn = Chart(EVIL, EVIL, plot.figure, table), Chart(LINK, LINK, scatter.figure)
    content = (table, EVIL, *drawn, Browser((feature,)))
    return Page(EVIL, {EVIL: EVIL}, (EVIL,), arms, (Section("all", EVIL, EVIL, content),))
