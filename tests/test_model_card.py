import pytest

from saelens_cosine import CosineJumpReLUSAEConfig
from saelens_cosine.model_card import model_card


def test_the_card_of_a_cosine_sae_says_what_to_install_and_import():
    config = CosineJumpReLUSAEConfig(d_in=4, d_sae=16)
    config.metadata.hook_name, config.metadata.model_name = "blocks.0.hook_resid_post", "bundled"
    config.metadata.max_norm_multiple, config.metadata.high_norm_share_dropped = 10.0, 0.0125
    card = model_card(config, 'SAE.from_pretrained("me/saes", "layer_0")')
    assert "pip install saelens-cosine" in card
    assert "import saelens_cosine  # without it: KeyError: 'cosine_jumprelu'" in card
    assert card.index("import saelens_cosine") < card.index("SAE.from_pretrained")
    assert "above 10 times the median norm dropped in training: 1.25% of the tokens" in card


@pytest.mark.parametrize("name", ["TopKSAEConfig", "JumpReLUSAEConfig"])
def test_an_inner_product_sae_needs_saelens_only(name):
    import sae_lens

    card = model_card(getattr(sae_lens, name)(d_in=4, d_sae=16), "...")
    assert "saelens_cosine" not in card
    assert "pip install sae-lens" in card
