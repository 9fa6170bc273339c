"""Builders with defaults and overrides, shared by the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

import saelens_cosine  # registers the architectures

D_IN, D_SAE, K = 7, 13, 3  # odd on purpose


class Selector(NamedTuple):
    """
    What the tests need to know of a selector beyond its code.

    Args:
        settings: Config fields for k active features of d_sae, where it has any for that.
        saved_as: The selector that its SAEs are saved with.
        own: Its tensors in training beside W_enc, W_dec and b_dec: "F" for one number per feature, "" for a single one.
        saved: Those of the saved form.
        entries: Whether the fast path has it.
    """

    settings: Callable[[int, float], dict[str, Any]]
    saved_as: str
    own: dict[str, str]
    saved: dict[str, str]
    entries: bool


def nested(d_sae: int, k: float) -> dict[str, Any]:
    return {"k": k, "matryoshka_widths": [max(1, d_sae // 3), d_sae] if d_sae > 1 else [1]}


BIAS = {"b_enc": "F"}
GATE = {"b_gate": "F", "b_mag": "F", "r_mag": "F"}
THRESHOLD = {**BIAS, "threshold": "F"}
AVERAGED = {**BIAS, "topk_threshold": ""}

SELECTORS = {
    "standard": Selector(lambda d_sae, k: {}, "standard", BIAS, BIAS, False),
    "gated": Selector(lambda d_sae, k: {}, "gated", GATE, GATE, False),
    "jumprelu": Selector(
        lambda d_sae, k: {"target_l0": min(k, d_sae - 1)},
        "jumprelu",
        {**THRESHOLD, "threshold_unit": ""},
        THRESHOLD,
        False,
    ),
    "topk": Selector(lambda d_sae, k: {"k": k}, "topk", BIAS, BIAS, True),
    "abstopk": Selector(lambda d_sae, k: {"k": k}, "abstopk", BIAS, BIAS, True),
    "batchtopk": Selector(lambda d_sae, k: {"k": k}, "jumprelu", AVERAGED, THRESHOLD, True),
    "matryoshka_batchtopk": Selector(nested, "jumprelu", AVERAGED, THRESHOLD, True),
    "top_afa": Selector(lambda d_sae, k: {}, "top_afa", BIAS, BIAS, False),
}
"""A row for each selector: an architecture's name is a score and one of these."""


def selector_of(name: str) -> str:
    return max((selector for selector in SELECTORS if name.endswith(selector)), key=len)


def with_selector(*selectors: str) -> list[str]:
    return [name for name in TRAINING if selector_of(name) in selectors]


TRAINING = list(saelens_cosine.TRAINING_ARCHITECTURES)
COSINE = [name for name in TRAINING if "cosine" in name]
GLOBAL = [name for name in COSINE if not name.startswith("per_feature")]
PER_FEATURE = [name for name in COSINE if name.startswith("per_feature")]
OURS = [name for name in TRAINING if not name.startswith("inner_product")]
"""Saved in a form that SAELens alone cannot load."""
EXPONENT = [name for name in OURS if name != "top_afa"]
"""Saved with a `norm_exponent`."""
TOPK = with_selector("topk")
BATCHTOPK = [name for name in TRAINING if "topk_threshold" in SELECTORS[selector_of(name)].own]
"""With a threshold that is averaged in training."""
FAST = [name for name in TRAINING if SELECTORS[selector_of(name)].entries]
"""Architectures that the fast path trains."""
ONE_PER_SCORE = with_selector("batchtopk")
"""For what a score does, whatever selects."""
ONE_PER_SELECTOR = [name for name in TRAINING if name.startswith(("per_feature_cosine_", "top_afa"))]
"""For what a selector does, whatever the score."""

FREE_DECODER = {"unit_decoder": False, "rescale_acts_by_decoder_norm": True}
"""Overrides for an SAE whose decoder norms are its own and count in the selection, as SAELens' TopK trains."""


def make_config(name: str, **overrides: Any) -> Any:
    """Training config of an architecture, `d_in = 7`, `d_sae = 13`, and what its selector needs for about 3 active features.

    `k` means that number for every selector. `rescale_acts_by_decoder_norm` is left out where there is no such field.
    """
    config_class = get_sae_training_class(name)[1]
    settings: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "k": K, **overrides}
    names = {field.name for field in fields(config_class)}
    needed = SELECTORS[selector_of(name)].settings(settings["d_sae"], settings.pop("k"))
    if "rescale_acts_by_decoder_norm" not in names:
        settings.pop("rescale_acts_by_decoder_norm", None)
    return config_class(**{**needed, **settings})


def make_sae(name: str, seed: int | None = 1, **overrides: Any) -> TrainingSAE[Any]:
    """Training SAE in eval mode with `randomize`d parameters; `seed=None` leaves SAELens' start."""
    torch.manual_seed(0)
    config = make_config(name, **overrides)
    sae = get_sae_training_class(name)[0](config)
    if seed is not None:
        randomize(sae, seed)
    return sae.eval()


@torch.no_grad()
def randomize(sae: TrainingSAE[Any], seed: int = 1) -> None:
    """Parameters far from their starts: exponents spread over [-0.5, 1.5], or 0.7 when there is one for all."""
    rng = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, std: float) -> torch.Tensor:
        return (torch.randn(like.shape, generator=rng, dtype=torch.float64) * std).to(like.dtype)

    sae.W_enc.copy_(normal(sae.W_enc, 1.0))
    sae.W_dec.copy_(normal(sae.W_dec, 0.5))
    sae.b_dec.copy_(normal(sae.b_dec, 0.5))
    for bias in ("b_enc", "b_gate", "b_mag", "r_mag"):
        tensor = getattr(sae, bias, None)
        if tensor is not None and tensor.requires_grad:
            tensor.copy_(normal(tensor, 0.3))
    if hasattr(sae, "norm_exponent"):
        a = sae.norm_exponent
        a.copy_(torch.linspace(-0.5, 1.5, a.numel()) if a.ndim else torch.tensor(0.7))
        sae.log_scale.copy_(0.3 + normal(sae.log_scale, 0.4))
    if hasattr(sae, "norm_exponent_base"):
        sae.norm_exponent_base.fill_(0.2)
    if getattr(sae.cfg, "unit_decoder", False):
        sae.normalize_decoder()
    x = make_activations(64, sae.cfg.d_in, seed=seed).to(sae.dtype)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold = middle_score(sae, x, sae.cfg.k).to(sae.topk_threshold.dtype)
    elif hasattr(sae, "threshold_unit"):
        sae.threshold_unit.fill_(1.7)
        unit = 1.7 * sae.cfg.threshold_lr_multiplier
        sae.threshold.copy_(
            middle_score(sae, x, sae.cfg.target_l0 or K) / unit * torch.linspace(0.8, 1.25, sae.cfg.d_sae)
        )


@torch.no_grad()
def middle_score(sae: TrainingSAE[Any], x: torch.Tensor, k: float) -> torch.Tensor:
    """The threshold that k features per row of `x` are above on average, halfway between two scores."""
    scores = sae.encode_with_hidden_pre(x)[1].flatten().sort(descending=True).values
    cut = min(int(k * len(x)), len(scores) - 1)
    return (scores[cut - 1] + scores[cut]) / 2


def make_activations(*shape: int, seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float32):
    """Gaussian directions with log-normal norms: `spread` is the standard deviation of the log norm."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.randn(shape, generator=rng, dtype=torch.float64)
    norms = torch.exp(spread * torch.randn((*shape[:-1], 1), generator=rng, dtype=torch.float64))
    return (directions * norms).to(dtype)


def codes_and_output(sae: SAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        codes = sae.encode(x)
        return codes, sae.decode(codes)


def save_inference(sae: TrainingSAE[Any], path: Path) -> SAE[Any]:
    """The saved inference form, loaded again by SAELens."""
    sae.save_inference_model(path)
    return SAE.load_from_disk(path)


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "cfg.json").read_text())


def assert_same_function(one: SAE[Any], other: SAE[Any], x: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Same active features and, relative to the largest value, the same codes and reconstructions."""
    for a, b in zip(codes_and_output(one, x), codes_and_output(other, x), strict=True):
        assert_close(a, b, tolerance)
    assert torch.equal(codes_and_output(one, x)[0] != 0, codes_and_output(other, x)[0] != 0)


def assert_close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-6) -> None:
    one, other = one.double(), other.double()
    assert one.shape == other.shape
    assert other.abs().max() > 0
    error = ((one - other).abs().max() / other.abs().max()).item()
    assert error <= tolerance, f"largest difference {error:.2e} of the largest value, allowed {tolerance:.2e}"


def train_step(sae: TrainingSAE[Any], x: torch.Tensor, step: int = 0, logging: bool = False) -> TrainStepOutput:
    """One forward pass of training, as SAELens' trainer calls it."""
    coefficients = {name: getattr(value, "value", value) for name, value in sae.get_coefficients().items()}
    step_input = TrainStepInput(
        sae_in=x,
        coefficients=coefficients,
        dead_neuron_mask=None,
        n_training_steps=step,
        is_logging_step=logging,
    )
    return sae.training_forward_pass(step_input=step_input)


class Batches(Iterator[torch.Tensor]):
    """Endless batches that depend only on how many were taken: a data provider that can be resumed exactly."""

    def __init__(self, sample: Any, start: int = 0):
        self.sample, self.position = sample, start

    def __next__(self) -> torch.Tensor:
        self.position += 1
        return self.sample(self.position)


def planted_batches(
    d_in: int, n_features: int, active: float, batch: int, spread: float = 0.7, scale: float = 1.0
) -> Batches:
    """Sparse sums of `n_features` planted directions, `active` of them per token, times a log-normal norm."""
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n_features, d_in, generator=rng), dim=-1)

    def sample(i: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(1000 + i)
        on = torch.rand(batch, n_features, generator=rng) < active / n_features
        signal = (on * (0.5 + torch.rand(batch, n_features, generator=rng))) @ directions
        noise = 0.05 * torch.randn(batch, d_in, generator=rng)
        norm = torch.exp(spread * torch.randn(batch, 1, generator=rng))
        return scale * norm * (signal + noise)

    return Batches(sample)


def make_trainer(sae: TrainingSAE[Any], data: Iterator[torch.Tensor], steps: int, batch: int, **overrides: Any):
    """SAELens' `SAETrainer`, no logging, no checkpoints."""
    settings = {"lr": 3e-4, "lr_end": 3e-5, "n_batches_for_norm_estimate": 5, **overrides}
    config = SAETrainerConfig(total_training_samples=steps * batch, train_batch_size_samples=batch, **settings)
    return SAETrainer(config, sae, data)


def run_python(code: str, *args: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, outside the repository, with no network."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
        cwd=Path(sys.prefix),
        timeout=600,
    )


# --- a language model and a corpus small enough to train on in a test ---

VOCABULARY = ["<s>", *[f"w{i}" for i in range(31)]]
CONTEXT = 8
HOOK = "blocks.1.hook_resid_pre"


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="<s>",
        pad_token="<s>",
        name_or_path="tiny",
        add_bos_token=True,
    )


def tiny_model():
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=CONTEXT, d_head=8, n_heads=2, d_vocab=len(VOCABULARY), act_fn="gelu",
        init_weights=True, seed=0, device="cpu", model_name="tiny",
    )  # fmt: skip
    model = HookedSAETransformer(config, tokenizer=tiny_tokenizer())
    model.W_E.data.mul_(20)  # mean norm at HOOK about 18 where sqrt(d_model) is 4, so that scaling activations shows
    return model


def tiny_dataset(rows: int = 400) -> IterableDataset:
    """Pretokenised rows of `CONTEXT` tokens that start with the beginning-of-sequence token."""
    tokens = torch.randint(1, len(VOCABULARY), (rows, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    return Dataset.from_dict({"tokens": tokens.tolist()}).to_iterable_dataset()


def tiny_runner_config(sae: Any, path: Path, steps: int = 12, **overrides: Any) -> Any:
    """`LanguageModelSAERunnerConfig` for `tiny_model` and `tiny_dataset`: batches of 64 tokens, no wandb."""
    batch = 64
    settings: dict[str, Any] = {
        "model_name": "tiny",
        "hook_name": HOOK,
        "dataset_path": "tiny",
        "context_size": CONTEXT,
        "training_tokens": steps * batch,
        "train_batch_size_tokens": batch,
        "store_batch_size_prompts": 16,
        "n_batches_in_buffer": 32,
        "n_eval_batches": 1,
        "n_batches_for_norm_estimate": 3,
        "lr": 1e-3,
        "checkpoint_path": None,
        "output_path": str(path / "output"),
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAERunnerConfig(sae=sae, **{**settings, **overrides})
