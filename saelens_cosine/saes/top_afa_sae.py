"""The top-AFA SAE: each token keeps as many features as it takes to match its own norm, so there is no k to choose.

Source: "Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality" (arXiv 2503.24277) and its released
code. AFA, approximate feature activation: where directions are nearly orthogonal, the norm of a token is nearly the norm of its
features' coefficients on unit directions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from torch import nn
from typing_extensions import override

from saelens_cosine.kernels.whole import HERE, Whole, keep_best
from saelens_cosine.registry import register_inference, register_training
from saelens_cosine.saes.choices import check_choices
from saelens_cosine.saes.cosine import PLUGIN_NOTE
from saelens_cosine.saes.recipe.training_sae import RecipeConfig, RecipeTrainingSAE
from saelens_cosine.saes.scored_encoder import rescales_by_decoder_norm
from saelens_cosine.saes.scored_sae import InnerProductScore
from saelens_cosine.score import wide

FIRST_WIDTH = 64
"""Coefficients per token that are sorted at first; four times as many while that decides too little."""

_NO_WHITENING = (
    "the selection compares with the Euclidean norm of what the SAE reads, which for whitened activations is a Mahalanobis norm "
    "of the raw ones that no SAE weight can reproduce"
)


@torch.no_grad()
def afa_prefix(
    coefficients: torch.Tensor,
    target: torch.Tensor,
    match: Literal["nearest", "first_exceed"] = "nearest",
    k_min: int = 1,
    k_max: int | None = None,
    whole: Whole = HERE,
) -> torch.Tensor:
    """The features that the top-AFA activation keeps: a token's largest, up to a norm.

    With C_j the norm of a token's j largest coefficients, k is the j whose C_j is nearest to the target, the smaller of two
    equally near; with "first_exceed" the first j with C_j >= target. Among equal coefficients the lowest index counts as the
    largest. A token whose whole norm is within the target keeps every positive feature.

    The released code is "nearest". It sets C_F to 10^4, so that k = F for targets near 10^4 alone; here C_F is infinite,
    which is `k_max = F - 1` and does not depend on the activations' scale.

    Args:
        coefficients: `[..., F]`, not negative, float32 or wider: what the features add along unit decoder directions.
        target: `[...]`, norms.
        match: which prefix matches.
        k_min: least k; a token with fewer positive coefficients keeps those.
        k_max: greatest k; None is F - 1.
        whole: the dictionary that these F features are a part of.

    Returns:
        `[..., F]` booleans, False where a coefficient is 0.
    """
    d_sae = whole.size(coefficients.shape[-1])
    most = max(1, d_sae - 1) if k_max is None else min(k_max, d_sae)
    rows, goals = coefficients.reshape(target.numel(), coefficients.shape[-1]), target.reshape(-1)
    positive = rows > 0
    keep = positive.clone()
    open_rows = ((whole.norm(rows) > goals) | (whole.sum(positive.sum(dim=-1)) > most)).nonzero().squeeze(-1)
    width = min(max(FIRST_WIDTH, k_min), most)
    # C_j does not decrease. So if C_width >= goal, the first C_j >= goal is among those sorted, every later one is at least as
    # far from the goal as that one, and every one before C_(j-1) at least as far as C_(j-1): the match is j or j - 1, whatever
    # the rest of the row holds. At width = most the rest cannot be kept anyway.
    while len(open_rows) > 0:
        row, goal = rows[open_rows], goals[open_rows].unsqueeze(-1)
        largest = whole.largest_each(row, width)
        norms = largest.square().cumsum(dim=-1).sqrt()
        k = _matching(norms, goal, match).clamp(k_min, most)
        done = (norms[:, -1:] >= goal).squeeze(-1) | (width == most)
        cut, quota = largest[done].gather(-1, k[done] - 1), k[done].squeeze(-1)
        keep[open_rows[done]] = keep_best(row[done], cut, quota, True, whole)
        open_rows = open_rows[~done]
        width = min(4 * width, most)
    return (keep & positive).view(coefficients.shape)


def _matching(norms: torch.Tensor, goal: torch.Tensor, match: str) -> torch.Tensor:
    """k `[n, 1]` from cumulative norms `[n, width]` and goals `[n, 1]`; width + 1 where no norm reaches the goal."""
    n_below = (norms < goal).sum(dim=-1, keepdim=True)
    if match == "first_exceed":
        return n_below + 1
    below = torch.where(n_below == 0, 0, norms.gather(-1, (n_below - 1).clamp_min(0)))
    reached = norms.gather(-1, n_below.clamp_max(norms.shape[-1] - 1))
    return torch.where(goal - below <= reached - goal, n_below, n_below + 1)


@dataclass
class TopAFASAEConfig(SAEConfig):
    """
    Configuration of a saved top-AFA SAE.

    Args:
        match (Literal["nearest", "first_exceed"]): Which number of features matches a token's norm: the one that comes nearest, as in the paper's code, or the first that reaches it.
        k_min (int): Fewest features of a token, as far as that many are positive.
        k_max (int | None): Most features of a token. None is d_sae - 1, as in the paper's code; a small k_max turns the rule into TopK.
    """

    match: Literal["nearest", "first_exceed"] = "nearest"
    k_min: int = 1
    k_max: int | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "top_afa"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if self.normalize_activations == "covariance_whitening":
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} does not go with architecture="
                f"{self.architecture()!r}: {_NO_WHITENING}. Use 'none', 'expected_average_only_in' or 'layer_norm'."
            )
        most = self.d_sae if self.k_max is None else self.k_max
        if not 1 <= self.k_min <= most <= self.d_sae:
            raise ValueError(
                f"k_min={self.k_min}, k_max={self.k_max}, d_sae={self.d_sae}: 1 <= k_min <= k_max <= d_sae is needed."
            )


@dataclass(kw_only=True)
class TopAFATrainingSAEConfig(RecipeConfig, TopAFASAEConfig, TrainingSAEConfig):
    """
    Configuration for training a top-AFA SAE; saved as `top_afa`. There is no k: each token's norm decides, and training how much of it a feature makes up.

    Args:
        afa_coefficient (float): Weight of the squared difference between the norm of a token's features and its own, in the paper's units, where the reconstruction error is averaged over dimensions (SAELens sums it, so d_in times this is what the loss has). The paper sweeps 1/128 to 1/16, on activations with normalize_activations="layer_norm", where L0 rises with it; without normalisation it may fall.
        afa_warm_up_steps (int): Training steps over which the coefficient rises from 0.
        afa_loss_target (Literal["input", "centered"]): The norm that the loss aims at: of the input, as in the paper, or of the input minus b_dec, which is the one that features are selected by.
        use_encoder_bias (bool): Whether b_enc is trained. False keeps it at 0, as in the paper.
        unit_decoder (bool): Keep decoder rows at norm 1, as in the paper; needs rescale_acts_by_decoder_norm=False. By default norms are free and coefficients on unit directions count.
        rescale_acts_by_decoder_norm (bool): Whether codes are coefficients on unit directions. These decide the selection and the AFA loss in either case, so this changes the codes' units alone; a saved SAE has the same codes and, if True, unit rows.
        b_dec_init (Literal["geometric_median", "mean", "zeros"]): Start of the decoder bias. Zeros, as in the paper, where the selection and afa_loss_target="input" mean the same norm.
        normalize_aux_loss (bool): Divide the auxiliary loss by the residual's variance. The paper does not.
        kernels (Literal["auto", "reference", "fast"]): The reference path is the only one: how many codes a token has is not known before all its scores are.
    """

    keeps = frozenset(
        {"unit_decoder", "rescale_acts_by_decoder_norm", "b_dec_init", "normalize_aux_loss", "aux_loss_coefficient"}
    )

    afa_coefficient: float = 1 / 16
    afa_warm_up_steps: int = 0
    afa_loss_target: Literal["input", "centered"] = "input"
    use_encoder_bias: bool = True
    unit_decoder: bool = False
    rescale_acts_by_decoder_norm: bool = True
    b_dec_init: Literal["geometric_median", "mean", "zeros"] = "zeros"
    normalize_aux_loss: bool = False
    kernels: Literal["auto", "reference", "fast"] = "reference"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.metadata.requires = PLUGIN_NOTE
        if self.afa_coefficient < 0 or self.afa_warm_up_steps < 0:
            raise ValueError(
                f"afa_coefficient={self.afa_coefficient} and afa_warm_up_steps={self.afa_warm_up_steps} must not be negative."
            )


class AFASelection(InnerProductScore):
    """The standard score, rectified, and then only the features that match the centred input's norm."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    @override
    def finish(self, codes: torch.Tensor, x_centered: torch.Tensor) -> torch.Tensor:
        """Rectified scores `[..., d_sae]` with those of the features that are not kept set to 0.

        The choice passes no gradient: kept features have the gradients of a ReLU, the others none.
        """
        with torch.no_grad(), torch.autocast(codes.device.type, enabled=False):
            if not self.cfg.apply_b_dec_to_input:
                x_centered = x_centered - self.b_dec
            coefficients, target = self.unit_coefficients(codes), x_centered.norm(dim=-1)
            keep = afa_prefix(coefficients, target, self.cfg.match, self.cfg.k_min, self.cfg.k_max, self.whole)
        return codes * keep

    def unit_coefficients(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `[..., d_sae]` times decoder norms, what each adds along a unit direction."""
        if rescales_by_decoder_norm(self.cfg):
            return codes  # they are already
        # a folded decoder has unit rows; one that was saved without folding must not change the selection
        return codes * torch.linalg.vector_norm(self.W_dec, dim=-1, dtype=wide(codes.dtype))

    @override
    def fold_activation_whitening(
        self, mean: torch.Tensor, whitening_matrix: torch.Tensor, unwhitening_matrix: torch.Tensor
    ) -> None:
        raise NotImplementedError(f"A whitening cannot be folded into {self.cfg.architecture()!r}: {_NO_WHITENING}.")


class TopAFASAE(AFASelection):
    """A top-AFA SAE, inference form: SAELens' four tensors, no threshold and no statistic of the training data."""


class TopAFATrainingSAE(AFASelection, RecipeTrainingSAE):
    """A top-AFA SAE in training: the same selection, and a loss that pulls the norm of the codes to the input's."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc.requires_grad_(self.cfg.use_encoder_bias)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"afa": TrainCoefficientConfig(self.cfg.afa_coefficient, self.cfg.afa_warm_up_steps)}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step. With a per-token normalisation all of it, losses included, is in units of the normalised activations.

        That is where the paper has its losses, and the only space that the codes, the residual and the decoder share.
        """
        mode = self.cfg.normalize_activations
        if mode in ("layer_norm", "constant_norm_rescale"):
            normalised = self.run_time_activation_norm_fn_in(step_input.sae_in.to(self.dtype))
            self._normalise_by("none")
            try:
                return self.training_forward_pass(replace(step_input, sae_in=normalised))
            finally:
                self._normalise_by(mode)
        output = super().training_forward_pass(step_input)
        if step_input.is_logging_step:
            output.metrics.update(self.selection_metrics(output))
        return output

    def _normalise_by(self, mode: Any) -> None:
        self.cfg.normalize_activations = mode
        self._setup_activation_normalization()

    @override
    def sparsity_losses(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """`afa_loss`: d_in * coefficient * mean (||f|| - ||x||)^2, with f the `unit_coefficients`."""
        gap = self._norm_gap(feature_acts, step_input.sae_in, self.cfg.afa_loss_target == "centered")
        return {"afa_loss": self.cfg.d_in * step_input.coefficients["afa"] * gap.square().mean()}

    def _norm_gap(self, codes: torch.Tensor, x: torch.Tensor, centered: bool) -> torch.Tensor:
        """`[tokens]`: norm of the coefficients less that of the input, which is data and takes no gradient."""
        x = x.to(wide(x.dtype))
        target = (x - self.b_dec.detach() if centered else x).norm(dim=-1)
        return self.whole.norm(self.unit_coefficients(codes.to(x.dtype))) - target

    @torch.no_grad()
    def selection_metrics(self, output: TrainStepOutput) -> dict[str, torch.Tensor]:
        """How a batch was selected from, `training_metrics` of one step.

        `saturated_share` is of tokens that kept every positive feature, as a ReLU SAE does: their whole norm is below the
        target. `afa_relative_norm_gap` is the mean of (||f|| - ||x - b_dec||) / ||x - b_dec||, and `afa_squared_gap` is the
        AFA loss before its coefficient.
        """
        l0 = self.whole.sum((output.feature_acts != 0).sum(dim=-1))
        target = (output.sae_in - self.b_dec).norm(dim=-1).clamp_min(1e-8)
        gap = self._norm_gap(output.feature_acts, output.sae_in, centered=True)
        loss_gap = self._norm_gap(output.feature_acts, output.sae_in, self.cfg.afa_loss_target == "centered")
        return {
            "l0_mean": l0.float().mean(),
            "l0_min": l0.min(),
            "l0_max": l0.max(),
            "saturated_share": (l0 == self.whole.sum((output.hidden_pre > 0).sum(dim=-1))).float().mean(),
            "afa_relative_norm_gap": (gap / target).mean(),
            "afa_squared_gap": loss_gap.square().mean(),
        }

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        if self.cfg.rescale_acts_by_decoder_norm:
            # codes in units of the decoder norm: with the norm in the encoder they are a plain SAE's with unit rows
            norms = self.get_W_dec_norm()
            state_dict["W_enc"] = state_dict["W_enc"] * norms
            state_dict["b_enc"] = state_dict["b_enc"] * norms
            state_dict["W_dec"] = state_dict["W_dec"] / norms.unsqueeze(-1)
        super().process_state_dict_for_saving_inference(state_dict)


register_inference(TopAFASAE, TopAFASAEConfig)
register_training(TopAFATrainingSAE, TopAFATrainingSAEConfig)
