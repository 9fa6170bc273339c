"""How well reconstructions match activations, each measure by a name of its own, from one pass over the tokens.

Fraction of variance explained, for errors e = x - x_hat over the tokens that are measured:

- `fve`: `1 - Var(e) / Var(x)`, variances summed over dimensions, about the means of all these tokens, as in the authors' results
  by norm (arXiv 2606.15054, released code). A constant error is free in it.
- `fve_in_batches`: the same with variances about the mean of each batch, as in their logs and headline numbers. What differs
  between batches is left out, which on text in its order, with few documents in a batch, costs a percent or two.
- `fve_squared_error`: their article's, `1 - mean ||e||^2 / mean ||x - mean x||^2`. It charges for a constant error, and is what
  SAEBench means by explained variance where it is right.
- `explained_variance`: SAELens', by its own formula on the same sums. In SAELens 6.54 that is the one above, but for tokens that
  do not vary, so the two differ only if SAELens changes its mind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sae_lens.evals import ExplainedVarianceCalculator

from saelens_cosine.kernels.codes import EntryCodes
from saelens_cosine.metrics.not_finite import finite_rows
from saelens_cosine.metrics.reconstruction.dead import never_fired, rarely_fired

FVE_DEFINITION = "1 - Var(x - x_hat) / Var(x), each summed over dimensions, over all evaluated tokens"

ROUNDING = 1e-12
"""A variance below this share of the mean square is rounding: the tokens are the same."""


@dataclass(frozen=True)
class Fit:
    """
    An SAE's reconstructions of some tokens.

    Args:
        tokens (int): How many tokens.
        not_finite (int): Tokens whose reconstruction, codes or activation are NaN or infinite. With any, what is measured on them is NaN, or infinite, too.
        fve (float): `1 - Var(x - x_hat) / Var(x)` over these tokens, the authors' by norm; 0 where tokens do not vary.
        fve_in_batches (float): `1 - sum of Var(x - x_hat) / sum of Var(x)`, each within a batch and by its share of the tokens; the authors' headline, in batches of 2,048. 0 where tokens do not vary.
        fve_squared_error (float): `1 - mean ||x - x_hat||^2 / Var(x)`, the authors' in their article; 0 where tokens do not vary.
        explained_variance (float): SAELens' own.
        cosine (float): Mean cosine of x and x_hat, not centred; a token counts 0 if either is 0.
        norm_ratio (float): Mean of `||x_hat|| / ||x||` over tokens that are not 0; NaN if all are.
        ratio_of_mean_norms (float): `mean ||x_hat|| / mean ||x||`, the authors' norm ratio (experiments 44, 55c), which the longest tokens decide; NaN if all are 0.
        l0 (float): Active features per token.
        never_fired (float): Share of the features that fire on none of these tokens.
        rarely_fired (float): Share of the features that fire on at most 0.1 % of them.
    """

    tokens: int
    not_finite: int
    fve: float
    fve_in_batches: float
    fve_squared_error: float
    explained_variance: float
    cosine: float
    norm_ratio: float
    ratio_of_mean_norms: float
    l0: float
    never_fired: float
    rarely_fired: float


class FitSums:
    """Running sums of tokens in groups, of which some unions will be measured. In float64 on the CPU (MPS has none).

    Args:
        unions: groups `0 ... groups - 1` of each union.
        groups: how many.
        d_in: size of a token.
        d_sae: features.
    """

    def __init__(self, unions: Sequence[Sequence[int]], groups: int, d_in: int, d_sae: int):
        self._vectors = torch.zeros(groups, 2 * d_in, dtype=torch.float64)
        self._scalars = torch.zeros(groups, 10, dtype=torch.float64)
        self._fired = torch.zeros(groups, d_sae, dtype=torch.int64)
        self._batch_vectors, self._batch_scalars = self._vectors.clone(), self._scalars.clone()
        self._within = {tuple(union): (0.0, 0.0) for union in unions}

    def add(self, x: torch.Tensor, x_hat: torch.Tensor, codes: EntryCodes, group: torch.Tensor) -> None:
        """Take in tokens.

        Args:
            x: `[tokens, d_in]`.
            x_hat: the same.
            codes: `[tokens, d_sae]`, those that are not 0, on any device.
            group: `[tokens]` int64.
        """
        x, x_hat = x.cpu().double(), x_hat.cpu().double()
        error = x - x_hat
        norm, norm_hat, dot = x.norm(dim=-1), x_hat.norm(dim=-1), (x * x_hat).sum(dim=-1)
        # what is NaN is not 0, and stays NaN
        there, product = norm != 0, norm * norm_hat
        token, feature = codes.entries.tokens, codes.entries.features
        defined = torch.ones(len(x), dtype=torch.bool)
        defined[token[~codes.values.isfinite()].cpu()] = False
        scalars = [
            torch.ones_like(norm),
            norm.square(),
            error.square().sum(dim=-1),
            torch.where(product == 0, 0, dot / product),
            torch.where(there, norm_hat / norm, 0),
            there.double(),
            norm,
            norm_hat,
            (~(finite_rows(x, x_hat) & defined)).double(),
            (~defined).double(),
        ]
        self._batch_scalars.index_add_(0, group, torch.stack(scalars, dim=-1))
        self._batch_vectors.index_add_(0, group, torch.cat([x, error], dim=-1))
        groups, d_sae = self._fired.shape
        place = group.to(feature.device)[token] * d_sae + feature
        self._fired += torch.bincount(place, minlength=groups * d_sae).view(groups, d_sae).cpu()

    def end_batch(self) -> None:
        """Close the batch that the tokens since the last call make up."""
        for union, (within, within_error) in self._within.items():
            tokens, squares, squared_error = self._batch_scalars[list(union), :3].sum(dim=0).tolist()
            sum_x, sum_error = self._batch_vectors[list(union)].sum(dim=0).chunk(2)
            if tokens:
                self._within[union] = (
                    within + tokens * _variance(tokens, squares, sum_x),
                    within_error + tokens * _variance(tokens, squared_error, sum_error),
                )
        for total, batch in ((self._vectors, self._batch_vectors), (self._scalars, self._batch_scalars)):
            total += batch
            batch.zero_()

    def fit(self, groups: Sequence[int]) -> Fit:
        """Measure the tokens of a union, of which there must be one at least, after the last batch has ended."""
        sums = self._scalars[groups].sum(dim=0).tolist()
        tokens, squares, squared_error, cosine, ratio, there, norm, norm_hat, not_finite, undefined = sums
        sum_x, sum_error = self._vectors[groups].sum(dim=0).chunk(2)
        fired = self._fired[groups].sum(dim=0)
        variance = _variance(tokens, squares, sum_x)
        within, within_error = self._within[tuple(groups)]
        saelens = ExplainedVarianceCalculator()
        saelens.sum_x, saelens.sum_squared_norm = sum_x, squares
        saelens.sum_squared_residual, saelens.num_samples = squared_error, int(tokens)
        return Fit(
            tokens=int(tokens),
            not_finite=int(not_finite),
            fve=_explained(_variance(tokens, squared_error, sum_error), variance),
            fve_in_batches=_explained(within_error, within),
            fve_squared_error=_explained(squared_error / tokens, variance),
            explained_variance=saelens.compute(),
            cosine=cosine / tokens,
            norm_ratio=ratio / there if there else float("nan"),
            ratio_of_mean_norms=norm_hat / norm if there else float("nan"),
            l0=math.nan if undefined else fired.sum().item() / tokens,
            never_fired=math.nan if undefined else never_fired(fired),
            rarely_fired=math.nan if undefined else rarely_fired(fired, int(tokens)),
        )


def _explained(error: float, variance: float) -> float:
    """`1 - error / variance`, and 0 where tokens do not vary; NaN or -inf where the error is not finite."""
    if variance == 0:
        return 0.0 if math.isfinite(error) else math.nan
    return 1 - error / variance


def _variance(tokens: float, squares: float, total: torch.Tensor) -> float:
    """Summed over dimensions, from the sum of squared norms and the sum of vectors."""
    variance = squares / tokens - (total / tokens).square().sum().item()
    return 0.0 if variance <= ROUNDING * squares / tokens else variance  # NaN is neither


def explained_variance(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """`fve` of one batch `[tokens, d_in]`; 0 when all tokens are the same."""
    x, x_hat = x.cpu().double(), x_hat.cpu().double()
    variance = x.var(dim=0, correction=0).sum()
    residual = (x - x_hat).var(dim=0, correction=0).sum()
    return _explained(residual.item(), variance.item())
