import pytest
import torch
from helpers import make_sae
from sae_lens import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_cosine.activations.norm_filter import HighNormFilter, token_norms
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.training.train import train


def rows_of_norm(*norms: float) -> torch.Tensor:
    return torch.tensor([[norm, 0.0, 0.0] for norm in norms])


def test_keeps_up_to_the_multiple_of_the_median_and_drops_above():
    # the median of 1, 2, 2, 20, 20.1 is 2: at a multiple of 10 the bound is 20
    keep = HighNormFilter(10.0).keep(rows_of_norm(1, 2, 2, 20, 20.1))
    assert keep.tolist() == [True, True, True, True, False]


def test_a_planted_sink_is_dropped_and_nothing_else():
    x = torch.nn.functional.normalize(torch.randn(999, 8, generator=torch.Generator().manual_seed(0)), dim=-1) * 100
    x = torch.cat([x[:400], 170 * x[:1], x[400:]])
    keep = HighNormFilter(10.0).keep(x)
    assert (~keep).nonzero().flatten().tolist() == [400]


def test_none_keeps_everything():
    assert HighNormFilter(None).keep(rows_of_norm(1, 1, 1e6)).all()


def test_non_finite_activations_are_kept_so_that_training_notices_them():
    assert HighNormFilter(10.0).keep(rows_of_norm(1, 1, float("nan"))).all()
    assert HighNormFilter(10.0).keep(rows_of_norm(1, 1, float("inf"))).all()
    # and the filter still works beside them
    assert HighNormFilter(10.0).keep(rows_of_norm(1, 1, 2, 1000, float("nan"))).tolist() == [True] * 3 + [False, True]


def test_rows_of_zeros_are_no_tokens_for_the_median():
    # six of ten are zeros: a median over all would be 0, and every other token above 10 times that
    keep = HighNormFilter(10.0).keep(rows_of_norm(0, 3, 0, 4, 0, 5, 0, 51, 0, 0))
    # the median of 3, 4, 5, 51 is 4: the bound is 40, and zeros are below it
    assert keep.tolist() == [True] * 7 + [False, True, True]


def test_nothing_but_zeros_is_kept():
    assert HighNormFilter(10.0).keep(torch.zeros(4, 3)).all()
    assert HighNormFilter(10.0).keep(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", [1e20, 1e38, 2e38])
def test_a_norm_whose_square_overflows_is_dropped(norm, dtype):
    x = rows_of_norm(1, 2, norm, 3).to(dtype)
    x[2, 1:] = x[2, 0]  # sqrt(3) times the largest float32 and more: still no reason to keep it
    assert HighNormFilter(10.0).keep(x).tolist() == [True, True, False, True]


def test_norms_out_of_the_range_of_squares():
    # 3, 4, 5 times 1e30 and 1e-30: squares are 1e60 and 1e-60, beyond float32
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [3.0, 4.0], [0.0, 0.0]])
    assert token_norms(x).tolist() == pytest.approx([5e30, 5e-30, 5.0, 0.0])
    # 65,504 sqrt(2), beyond float16
    assert token_norms(torch.full((1, 2), 65504.0).half()).item() == pytest.approx(65504 * 2**0.5)
    assert token_norms(torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])).isfinite().tolist() == [False, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_training_on_activations_that_are_not_finite_stops_with_their_name(value):
    sae = make_sae("cosine_topk", d_in=3, d_sae=4, k=1)
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    norm_filter = HighNormFilter(10.0, saes=[sae])
    norm_filter({"": rows_of_norm(1, 1, 1, 50)})
    with pytest.raises(FloatingPointError, match="2 of 3 activations .* blocks.3.hook_resid_post .* after 4 tokens"):
        norm_filter({"": rows_of_norm(value, value, 1)})
    assert HighNormFilter(10.0)({"": rows_of_norm(value, value, 1)})[""].shape == (3, 3)  # nothing trains on these


def test_counts_the_share_dropped_over_batches():
    norm_filter = HighNormFilter(10.0)
    norm_filter({"": rows_of_norm(1, 1, 1, 50)})
    norm_filter({"": rows_of_norm(1, 1, 1, 1)})
    assert (norm_filter.tokens_seen, norm_filter.tokens_dropped, norm_filter.dropped_share) == (8, 1, 0.125)


def test_a_token_high_at_one_hook_is_dropped_at_all_of_them():
    kept = HighNormFilter(10.0)({"a": rows_of_norm(1, 50, 1, 1), "b": rows_of_norm(2, 3, 90, 4)})
    assert kept["a"][:, 0].tolist() == [1, 1]
    assert kept["b"][:, 0].tolist() == [2, 4]


@pytest.mark.parametrize("multiple", [1.0, 0.0, -3.0, float("inf"), float("-inf"), float("nan")])
def test_a_multiple_that_drops_half_of_all_tokens_is_refused(multiple):
    for make, way_out in (
        (HighNormFilter, "None"),
        (settings_of_compare, "None"),
        (settings_of_evaluate, "sinks='keep'"),
        (train_with, "None"),
    ):
        with pytest.raises(ValueError, match=f"max_norm_multiple={multiple} .* {way_out}"):
            make(multiple)


def settings_of_compare(multiple):
    return ComparisonSettings(max_norm_multiple=multiple)


def settings_of_evaluate(multiple):
    return EvaluationSettings(max_norm_multiple=multiple)


def train_with(multiple):
    return train(["--model_name", "bundled"], multiple)


def store_with_a_sink(context: int = 8) -> ActivationsStore:
    """A store over a one-layer model whose embedding of token 0, the first of each context, is 1000 times longer."""
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=6, n_ctx=context, d_head=3, n_heads=2, d_vocab=20, act_fn="relu", normalization_type="RMS"
    )
    model = HookedTransformer(cfg)
    model.embed.W_E.data[0] *= 1000
    model.pos_embed.W_pos.data.zero_()

    def rows():
        generator = torch.Generator().manual_seed(1)
        for _ in range(64):
            tokens = torch.randint(1, 20, (context - 1,), generator=generator).tolist()
            yield {"tokens": [0, *tokens]}

    from datasets import IterableDataset

    return ActivationsStore.from_config_multi_hook(
        model,
        dataset=IterableDataset.from_generator(rows),
        hook_names=["hook_embed"],
        hook_d_ins={"hook_embed": 6},
        context_size=context,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        train_batch_size_tokens=14,
        activations_mixing_fraction=0.0,
    )


@pytest.mark.parametrize("multi_hook", [False, True])
def test_attached_to_a_store_it_filters_what_trains_an_sae(multi_hook):
    store = store_with_a_sink()
    norm_filter = HighNormFilter(10.0).attach(store)
    source = store.get_multi_hook_data_loader() if multi_hook else iter(store)
    longest = store.model.embed.W_E[1:].norm(dim=-1).max()
    for _ in range(5):
        batch = next(source)["hook_embed"] if multi_hook else next(source)
        assert len(batch) == 14
        assert batch.norm(dim=-1).max() <= longest
    assert norm_filter.dropped_share == pytest.approx(1 / 8)  # one token of each context of 8


def test_the_share_dropped_is_in_the_metadata_of_the_saes():
    from saelens_cosine import CosineTopKTrainingSAE, CosineTopKTrainingSAEConfig

    sae = CosineTopKTrainingSAE(CosineTopKTrainingSAEConfig(d_in=6, d_sae=12, k=2))
    store = store_with_a_sink()
    HighNormFilter(10.0).attach(store, [sae])
    next(store.get_multi_hook_data_loader())
    saved = sae.cfg.get_inference_sae_cfg_dict()["metadata"]
    assert saved["high_norm_share_dropped"] == pytest.approx(1 / 8)
    assert saved["max_norm_multiple"] == 10.0
