"""The feature browser: what it shows of each feature, packed for the page's script.

It is ours because no kept library that was looked at does this part. sae_vis and SAEDashboard compute features themselves from a
model in memory and write pages that load d3 and plotly from other hosts, and SAEDashboard holds torch below 2.8; Neuronpedia's is a
web application with a database behind it. DataTables (900 kB, which itables installs) and Tabulator show tables of cells: search
over runs of active tokens, contexts shaded by code and an opened feature beside the list would still be ours.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from saelens_cosine.files.secrets import published
from saelens_cosine.metrics.dictionary.features import Context, TokenValue
from saelens_cosine.report.chart import Arms
from saelens_cosine.report.table import public


@dataclass(frozen=True)
class Feature:
    """
    What the browser shows of one feature.

    Args:
        arm (str): Whose.
        index (int): Its number in the SAE.
        density (float): Share of the evaluated tokens at which it is not zero.
        exponent (float | None): Its norm exponent; None where the score has none.
        contexts (tuple[Context, ...]): Where it is largest, the largest first.
        promotes (tuple[TokenValue, ...]): Tokens whose logits its decoder row raises most.
        suppresses (tuple[TokenValue, ...]): Those that it lowers most.
    """

    arm: str
    index: int
    density: float
    exponent: float | None
    contexts: tuple[Context, ...]
    promotes: tuple[TokenValue, ...] = ()
    suppresses: tuple[TokenValue, ...] = ()


@dataclass(frozen=True)
class Browser:
    """
    The browser of a page, which has one at most.

    Args:
        features (tuple[Feature, ...]): Of all arms. 2,000 with eight contexts of 29 tokens make 3 to 6 MB.
    """

    features: tuple[Feature, ...]

    def html(self, arms: Arms) -> str:
        """Controls, the places that the script fills, and what it fills them with."""
        options = "".join(
            f'<option value="{arms.number(arm)}">{public(arm)}</option>'
            for arm in dict.fromkeys(feature.arm for feature in self.features)
        )
        choice = f'<label>Arm<select id="arm"><option value="">all</option>{options}</select></label>'
        sorts = ("best match", "number", "density", "exponent", "largest code")
        sort = "".join(f"<option>{name}</option>" for name in sorts)
        return (
            '<noscript><p class="about">The feature browser needs JavaScript.</p></noscript>'
            '<form id="controls" role="search" aria-label="Features">'
            '<label class="wide">Search<input id="query" type="search" autocomplete="off" spellcheck="false" '
            'placeholder="import, #12 …"></label>'
            f'{choice if options.count("<option") > 1 else ""}<label>Sort by<select id="sort">{sort}</select></label>'
            '<label class="check"><input id="anywhere" type="checkbox">also where it is not active</label></form>'
            '<p id="found" role="status"></p><div class="browser"><div id="results"><ol id="list"></ol>'
            '<button id="more" type="button" hidden>Show more</button></div>'
            '<article id="feature" tabindex="-1" aria-label="Chosen feature"></article></div>'
            f'<script type="application/json" id="data">{json_for_script(self.packed(arms))}</script>'
        )

    def packed(self, arms: Arms) -> dict[str, Any]:
        """Every token once, as it was read, contexts as numbers of tokens, and only the codes that are not zero."""
        counts: Counter[str] = Counter()
        for feature in self.features:
            for context in feature.contexts:
                counts.update(context.tokens)
            counts.update(item.token for item in (*feature.promotes, *feature.suppresses))
        tokens = [token for token, _ in counts.most_common()]  # frequent ones get short numbers
        number = {token: i for i, token in enumerate(tokens)}
        packed: list[Any] = []
        for feature in self.features:
            contexts: list[Any] = []
            for context in feature.contexts:
                active = [(i, _rounded(v)) for i, v in enumerate(context.values) if v and math.isfinite(v)]
                contexts.append([[number[t] for t in context.tokens], [i for i, _ in active], [v for _, v in active]])
            logits = [[[number[t], _rounded(v)] for t, v in end] for end in (feature.promotes, feature.suppresses)]
            exponent = feature.exponent if feature.exponent is not None and math.isfinite(feature.exponent) else None
            told = [_rounded(feature.density), None if exponent is None else round(exponent, 4), contexts, *logits]
            packed.append([arms.number(feature.arm), feature.index, *told])
        return {"arms": published(arms.names), "tokens": tokens, "features": packed}


def json_for_script(value: Any) -> str:
    """JSON that no text in it can end as a script."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _rounded(value: float) -> float:
    """Three digits; a whole number without its `.0`; 0 for what is not finite."""
    rounded = float(f"{value:.3g}") if math.isfinite(value) else 0.0
    return int(rounded) if rounded.is_integer() else rounded
