"""Dead features: counted in tokens, and revived by the paper's auxiliary loss or by SAELens'."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import act_times_W_dec
from typing_extensions import override

from saelens_cosine.kernels.codes import EntryCodes, ScoresOnDemand
from saelens_cosine.saes.recipe.lagged_count import LaggedCount
from saelens_cosine.saes.scored_encoder import rescales_by_decoder_norm
from saelens_cosine.saes.scored_sae import ScoredTrainingSAE


class DeadFeatures(NamedTuple):
    """
    The dead features, and maybe some more.

    Args:
        features (torch.Tensor): `[n]` int64, all dead features and then living ones, of those that are held here.
        certain (torch.Tensor): `[n]` booleans, which are the dead ones.
    """

    features: torch.Tensor
    certain: torch.Tensor


class DeadFeatureRevival(ScoredTrainingSAE):
    """Counts the tokens since each feature fired, and lets the features that are dead predict what the others leave over."""

    signed_codes: ClassVar[bool] = False
    """Whether a code may be negative."""

    tokens_since_fired: torch.Tensor

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._at_risk = LaggedCount()
        self._at_risk_tokens = 0
        self.register_buffer("tokens_since_fired", torch.zeros(cfg.d_sae, dtype=torch.int64, device=self.W_dec.device))

    @property
    def dead_features(self) -> torch.Tensor:
        """`[d_sae]` booleans: not fired in the last `cfg.dead_feature_window_tokens` training tokens."""
        return self.tokens_since_fired >= self.cfg.dead_feature_window_tokens

    @override
    def training_metrics(self) -> dict[str, torch.Tensor]:
        return {
            **super().training_metrics(),
            "dead_features_in_token_window": self.whole.sum(self.dead_features.sum()),
            "dead_feature_window_tokens": torch.tensor(self.cfg.dead_feature_window_tokens),
        }

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """SAELens' method; the metadata say how many features were dead, and over how many tokens."""
        self.cfg.metadata.dead_features_in_token_window = int(self.dead_features.sum())
        self.cfg.metadata.dead_feature_window_tokens = self.cfg.dead_feature_window_tokens
        return super().save_inference_model(path)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The selector's losses, then the auxiliary loss over the features that are dead after this step's firings.

        The paper's order: a feature that fires in this batch is alive in this batch's loss. Called once per step.
        """
        losses = self.sparsity_losses(step_input, feature_acts, hidden_pre, sae_out)
        dead = self._count_firings(feature_acts)
        if dead is None or self.cfg.aux_loss_coefficient == 0:
            loss = sae_out.new_zeros(())
        else:
            loss = self.cfg.aux_loss_coefficient * self.aux_loss(step_input, feature_acts, hidden_pre, sae_out, dead)
        return {**losses, "auxiliary_reconstruction_loss": loss}

    def sparsity_losses(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """What a selector adds to the loss: nothing where it fixes the number of active features."""
        return {}

    def aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
        dead: DeadFeatures,
    ) -> torch.Tensor:
        """The auxiliary loss, before its coefficient."""
        return self.revival_loss((step_input.sae_in - sae_out).detach(), hidden_pre, dead)

    def revival_loss(
        self,
        residual: torch.Tensor,
        hidden_pre: torch.Tensor,
        dead: DeadFeatures,
        gain: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Error of predicting the residual `e [tokens, d_in]` from the top `d_in // 2` dead features of each token.

        The paper's is `mean ||e - e_hat||^2 / mean ||e - mean(e)||^2` from rectified scores. With `normalize_aux_loss=False`
        it is SAELens', `mean ||e - e_hat||^2` from scores of either sign, scaled down while fewer than `d_in // 2` are dead.

        Args:
            residual: `e`.
            hidden_pre: `[tokens, d_sae]`.
            dead: which features are.
            gain: `[tokens, 1]`, from scores to codes, for a selector that has one.
        """
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                f"The auxiliary loss does not go with normalize_activations={self.cfg.normalize_activations!r}: the residual "
                "is in the units of the activations, the decoder in those of the normalised ones. Use 'none' or "
                "'expected_average_only_in', or aux_loss_coefficient=0."
            )
        most = self.cfg.d_in // 2
        codes, W_dec = self._codes_of_dead(hidden_pre, dead, most)
        if gain is not None:
            codes = codes * gain
        prediction = self.whole.total(act_times_W_dec(codes.to(self.dtype), W_dec, rescales_by_decoder_norm(self.cfg)))
        error = (residual - prediction).pow(2).sum(dim=-1).mean()
        n_dead = self.whole.sum(dead.certain.sum())
        if not self.cfg.normalize_aux_loss:
            return (n_dead.to(error.dtype) / most).clamp_max(1) * error
        variance = (residual - residual.mean(dim=0)).pow(2).sum(dim=-1).mean()
        return (error / variance.clamp_min(1e-8)).nan_to_num(0.0) * (n_dead > 0)

    def _codes_of_dead(
        self, hidden_pre: torch.Tensor, dead: DeadFeatures, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of each token's best dead features, `[tokens, n]`, and decoder rows `[n, d_in]`: of the dead, or of all where few have codes."""
        lazy = isinstance(hidden_pre, ScoresOnDemand)
        if lazy and self.cfg.normalize_aux_loss:
            few = hidden_pre.few_positive(dead.features, dead.certain, most)
            if few is not None:
                return few, self.W_dec
        scores = hidden_pre.columns(dead.features) if lazy else hidden_pre[:, dead.features]
        if self.cfg.normalize_aux_loss:
            scores = scores.relu()
        rank = scores.abs() if self.signed_codes else scores
        top = self.whole.best_each(torch.where(dead.certain, rank.detach(), -torch.inf), most)
        values = torch.where(top.values == -torch.inf, 0, scores.gather(-1, top.indices))
        return torch.zeros_like(scores).scatter(-1, top.indices, values), self.W_dec[dead.features]

    @torch.no_grad()
    def _count_firings(self, feature_acts: torch.Tensor) -> DeadFeatures | None:
        """Count this batch's tokens for every feature that did not fire in it; the features that are dead now.

        How many could be dead was counted a step ago, so that a device that runs ahead is not waited for.
        """
        n_tokens = feature_acts.shape[0]
        known = self._at_risk.get(self.tokens_since_fired) if n_tokens <= self._at_risk_tokens else None
        if known is None:  # what the step before would have counted, so that a resumed run sums in the same order
            known = self._count_at_risk(n_tokens).tolist()
        here, anywhere = known
        if isinstance(feature_acts, EntryCodes):
            fired = feature_acts.fired()
        else:
            codes = feature_acts.to_dense() if feature_acts.is_sparse else feature_acts
            fired = (codes != 0).any(dim=0)
        self.tokens_since_fired = torch.where(fired, 0, self.tokens_since_fired + n_tokens)
        self._at_risk.put(self._count_at_risk(n_tokens), self.tokens_since_fired)
        self._at_risk_tokens = n_tokens
        dead = self.dead_features
        if anywhere == 0:
            return None
        dead_first = dead.to(torch.int8).sort(descending=True, stable=True)
        return DeadFeatures(dead_first.indices[:here], dead_first.values[:here].bool())

    def _count_at_risk(self, n_tokens: int) -> torch.Tensor:
        """`[2]`: features that are dead after so many more tokens without firing, here and in the whole dictionary."""
        here = (self.tokens_since_fired + n_tokens >= self.cfg.dead_feature_window_tokens).sum()
        return torch.stack([here, self.whole.sum(here)])
