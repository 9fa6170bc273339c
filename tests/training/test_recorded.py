"""What a saved SAE says of its training is shown as far as it is what it should be: metadata are anybody's."""

import pytest
from helpers import make_sae

from saelens_cosine.training.recorded import trained


@pytest.mark.parametrize(
    ("entry", "value", "told"),
    [
        ("recipe", 5, "recipe"),
        ("lr", "fast", "lr"),
        ("training_tokens", [1], "tokens"),
        ("training_architecture", {"a": 1}, "training_architecture"),
        ("max_norm_multiple", "ten", "max_norm_multiple"),
        ("high_norm_share_dropped", True, "high_norm_share_dropped"),
    ],
)
def test_what_is_no_such_value_is_not_known(entry, value, told):
    sae = make_sae("cosine_topk")
    sae.cfg.metadata[entry] = value
    assert trained(sae)[told] is None


def test_a_setting_of_the_selector_is_a_number():
    sae = make_sae("cosine_jumprelu")
    sae.cfg.metadata.training_architecture_details = {"k": "three", "target_l0": 8}
    assert trained(sae)["selector"].get("k") is None
