import json
from pathlib import Path

import pytest
import yaml
from sae_lens import JumpReLUSAEConfig

from saelens_cosine import CosineJumpReLUSAEConfig, CosineTopKSAEConfig
from saelens_cosine.report.model_card import CITATIONS, model_card, repository_card


def config(config_class=CosineJumpReLUSAEConfig, **metadata):
    made = config_class(d_in=4, d_sae=16)
    known = {"hook_name": "blocks.0.hook_resid_post", "model_name": "bundled", "context_size": 128}
    for name, value in {**known, **metadata}.items():
        made.metadata[name] = value
    return made


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_a_cosine_sae_says_what_to_install_and_import():
    made = config(max_norm_multiple=10.0, high_norm_share_dropped=0.0125)
    card = model_card(made, 'SAE.from_pretrained("me/saes", "layer_0")')
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


def test_the_training_settings_are_on_the_card():
    card = model_card(
        config(training_architecture_details={"k": 32, "unit_decoder": True, "log_scale_init": None}), "x"
    )
    assert "| training settings | k 32, unit_decoder True |" in card


def test_filter_off_and_filter_unknown_are_told_apart():
    off = model_card(config(max_norm_multiple=None, high_norm_share_dropped=0.0), "x")
    assert "| high-norm tokens | kept in training |" in off
    assert "high-norm" not in model_card(config(), "x")
    assert "| sinks | planted in each context" in model_card(config(planted_sinks=True), "x")
    assert "planted" not in model_card(config(), "x")


def test_the_front_matter_is_what_the_hub_reads():
    made = config(model_name="gpt2-small", dataset_path="NeelNanda/pile-10k")
    assert front_matter(repository_card("me/saes", {"a": made}, license="mit")) == {
        "library_name": "saelens",
        "license": "mit",
        "base_model": ["gpt2"],
        "datasets": ["NeelNanda/pile-10k"],
        "tags": ["saelens", "saelens-cosine", "sparse-autoencoder", "mechanistic-interpretability"],
    }


@pytest.mark.parametrize(
    "name, base",
    [
        ("pythia-70m-deduped", ["EleutherAI/pythia-70m-deduped"]),
        ("Qwen/Qwen3-0.6B", ["Qwen/Qwen3-0.6B"]),
        ("bundled", None),
        ("/home/someone/model", None),
        ("./model", None),
        (None, None),
    ],
)
def test_base_model_is_a_hub_name_or_absent(name, base):
    assert front_matter(repository_card("me/saes", {"a": config(model_name=name)})).get("base_model") == base


def test_a_local_folder_is_no_base_model(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(repository_card("me/saes", {"a": config(model_name="models/mine")}))


def test_the_code_on_the_card_runs_as_it_stands(tmp_path, monkeypatch):
    import re

    import torch
    from helpers import make_sae, save_inference
    from sae_lens import SAE

    saved = save_inference(make_sae("cosine_batchtopk"), tmp_path)
    asked = []
    monkeypatch.setattr(SAE, "from_pretrained", lambda *names: (asked.append(names), saved)[1])
    (code,) = re.findall(r"```python\n(.*?)```", repository_card("me/saes", {"layer_0": saved.cfg}), re.S)
    assert code.startswith("import saelens_cosine  #")
    assert len([line for line in code.splitlines() if line]) == 5
    names = {"activations": torch.randn(3, 7)}
    exec(code, names)
    assert asked == [("me/saes", "layer_0")]
    assert names["codes"].shape == (3, 13)
    assert names["reconstruction"].shape == (3, 7)


def test_several_saes_share_what_they_have_in_common():
    saes = {"a": config(JumpReLUSAEConfig), "b": config(), "c": config(CosineTopKSAEConfig)}
    card = repository_card("me/saes", saes)
    assert "| hook | `blocks.0.hook_resid_post` |" in card
    assert "| id | architecture |\n| --- | --- |\n| `a` | `jumprelu` |\n| `b` | `cosine_jumprelu` |\n" in card
    assert 'SAE.from_pretrained("me/saes", "b")' in card  # the one that needs the import
    assert "import saelens_cosine  # without it: KeyError: 'cosine_jumprelu'" in card


def comparison(max_norm_multiple):
    arm = {"architecture": "cosine_batchtopk", "seed": 1, "fve": 0.75, "l0": 31.96, "dead_fraction": 0.0625,
           "ce_loss_recovered": 0.5, "dead_window_tokens": 1000, "hook_name": "hook", "k": 32, "lr": 0.001,
           "fve_by_norm_quartile": [{"fve": 0.1}, {"fve": 0.2}, {"fve": 0.3}, {"fve": 0.4}]}  # fmt: skip
    return {
        "arms": [arm],
        "settings": {"recipe": "paper", "tokens": 500_000, "fve_definition": "how FVE is defined",
                     "ce_definition": "how CE is", "dead_definition": "how dead is", "evaluated": "saved form"},
        "high_norm_tokens": {"max_norm_multiple": max_norm_multiple},
        "hooks": [{"hook_name": "hook", "high_norm_share_dropped": 0.0125, "high_norm_share_dropped_heldout": 0.02}],
    }  # fmt: skip


def test_a_comparison_is_shown_with_its_definitions():
    card = repository_card("me/saes", {"a": config()}, comparison(10.0), "comparison.png")
    assert "| recipe | `paper`, 500,000 training tokens |" in card
    assert "| `cosine_batchtopk` | 1 | 0.7500 | 32.0 | 6.2% | 0.5000 | 0.1000 | 0.2000 | 0.3000 | 0.4000 |" in card
    assert "dropped, 1.25% of the tokens in training and 2.00% in evaluation" in card
    for definition in ("how FVE is defined", "how CE is", "how dead is", "(comparison.png)"):
        assert definition in card
    assert "![training curves, exponents" in card
    without = repository_card("me/saes", {"a": config()}, comparison(None))
    assert "High-norm tokens: kept in training and evaluation" in without
    assert "![" not in without


def test_of_a_grid_the_table_tells_k_and_learning_rate_and_the_picture_is_what_it_shows():
    grid = comparison(10.0)
    grid["arms"].append(grid["arms"][0] | {"k": 64, "lr": 0.0003})
    card = repository_card("me/saes", {"a": config()}, grid, "comparison.png")
    assert "| architecture | k | lr | seed |" in card
    assert "| `cosine_batchtopk` | 64 | 0.0003 | 1 | 0.7500 |" in card
    assert (
        "![FVE and cross-entropy recovered against L0, exponents, and FVE by quartile of the norm](comparison.png)"
        in card
    )


def test_the_citations_are_the_readmes():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"```bibtex\n{CITATIONS}```" in readme
    assert CITATIONS in repository_card("me/saes", {"a": config()})


def test_a_config_that_was_saved_and_read_gives_the_same_card(tmp_path):
    made = config(seqpos_slice=[None], training_architecture_details={"k": 3})
    read = type(made).from_dict(json.loads(json.dumps(made.to_dict())))
    assert model_card(read, "x") == model_card(made, "x")
