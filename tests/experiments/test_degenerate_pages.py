"""Pages of SAEs at the ends of what there is."""

from saelens_cosine.experiments.evaluate.evals import Shown
from saelens_cosine.experiments.evaluate.evals.of_sae.features import FEATURES, BrowsedFeatures
from saelens_cosine.metrics.dictionary.features import Context
from saelens_cosine.report.browser import Browser, Feature
from saelens_cosine.report.chart import Arms


def test_features_that_all_fire_on_every_token_have_a_page():
    found = BrowsedFeatures((Feature("a", 3, 1.0, None, (Context(("x",), (2.0,)),)),))
    density, browser = FEATURES.section.draw(Shown(Arms(("a",)), {"a": [found]}, "a", "with_sinks"))
    assert max(density.figure.data[0].y) == 1.0  # all in the last bin, which ends at a density of 1
    assert isinstance(browser, Browser)
