"""Decoder geometry: how close each row's nearest neighbour is, how many dimensions the rows span, how encoder and decoder agree.

Source: experiment 60 of the released code of arXiv 2606.15054. There the effective dimension comes from 512 singular values
of a randomised decomposition, which caps it at 512, and the mean pairwise cosine from 3,000 sampled rows; here both are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from saelens_cosine.metrics.not_finite import NotFiniteError
from saelens_cosine.score import wide

BLOCK_ROWS = 1024
"""Decoder rows that are compared with the rest at a time: 256 MiB of cosines for 65,536 features."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Neighbours:
    """
    Pairs of decoder rows above one cosine.

    Args:
        cosine (float): The bound.
        pairs (int): Unordered pairs above it.
        features (int): Features with at least one such neighbour.
        per_feature (float): Mean number of neighbours of a feature.
    """

    cosine: float
    pairs: int
    features: int
    per_feature: float


@dataclass(frozen=True)
class DecoderGeometry:
    """
    Unit decoder rows `d_i` of the features asked for. Cosines are signed. NaN where fewer than two rows leave nothing to compare.

    Args:
        features (int): Rows measured.
        zero_rows (int): Rows left out because they have no direction.
        mean_max_cosine (float): MMC, the mean over features of the largest cosine with another row.
        std_max_cosine (float): Standard deviation of that (population).
        max_cosine_percentiles (tuple[float, ...]): 5th, 25th, 50th, 75th, 95th and 99th percentile of it.
        max_cosine_histogram (tuple[int, ...]): Features by largest cosine, in 20 bins of 0.1 from -1 to 1.
        neighbours (tuple[Neighbours, ...]): Pairs above each of the cosines asked for.
        mean_pairwise_cosine (float): Over all pairs of different rows.
        effective_dimension (float): (sum s^2)^2 / sum s^4 with s the singular values of the un-centred rows: participation ratio, at most d_in.
        entropy_dimension (float): exp of the entropy of s^2 / sum s^2: another count of dimensions, never below the first.
        encoder_decoder_cosine (float | None): Mean over features of cos(w_i, d_i), w_i the column of W_enc; None where input and output differ in size.
        encoder_decoder_percentiles (tuple[float, ...] | None): Its percentiles as above.
    """

    features: int
    zero_rows: int
    mean_max_cosine: float
    std_max_cosine: float
    max_cosine_percentiles: tuple[float, ...]
    max_cosine_histogram: tuple[int, ...]
    neighbours: tuple[Neighbours, ...]
    mean_pairwise_cosine: float
    effective_dimension: float
    entropy_dimension: float
    encoder_decoder_cosine: float | None
    encoder_decoder_percentiles: tuple[float, ...] | None


@torch.no_grad()
def decoder_geometry(
    sae: SAE[Any],
    features: Sequence[int] | None = None,
    neighbour_cosines: Sequence[float] = (0.3, 0.5, 0.7),
) -> DecoderGeometry:
    """Measure an SAE's decoder on its own device. `F x F` cosines are computed in blocks and not kept.

    Args:
        sae: any SAELens SAE, in any form.
        features: indices, such as the alive ones (the paper measures those); all if None.
        neighbour_cosines: bounds for `Neighbours`.

    Raises:
        NotFiniteError: a decoder row or encoder column is NaN or infinite.
    """
    chosen = torch.arange(sae.cfg.d_sae) if features is None else torch.as_tensor(features, dtype=torch.int64)
    NotFiniteError.check("Decoder rows", sae.W_dec[chosen.to(sae.W_dec.device)], "rows")
    rows = _unit(sae.W_dec[chosen.to(sae.W_dec.device)])
    directed = rows.any(dim=-1)
    zero_rows, rows = len(rows) - int(directed.sum()), rows[directed]
    n = len(rows)
    nearest, counts = _neighbours(rows, neighbour_cosines)
    eigenvalues, total = _spectrum(rows)
    p = eigenvalues / eigenvalues.sum()
    alignment = None
    if sae.W_enc.shape[0] == rows.shape[1]:
        columns = sae.W_enc.T[chosen.to(sae.W_enc.device)][directed.to(sae.W_enc.device)]
        NotFiniteError.check("Encoder columns", columns, "columns")
        alignment = (_unit(columns).to(rows) * rows).sum(dim=-1).double()
    return DecoderGeometry(
        features=n,
        zero_rows=zero_rows,
        mean_max_cosine=nearest.mean().item(),
        std_max_cosine=nearest.std(correction=0).item(),
        max_cosine_percentiles=_percentiles(nearest),
        max_cosine_histogram=tuple(torch.histc(nearest, 20, -1, 1).long().tolist()) if n > 1 else (0,) * 20,
        neighbours=tuple(
            Neighbours(cosine, int(count.sum()) // 2, int((count > 0).sum()), count.double().mean().item())
            for cosine, count in zip(neighbour_cosines, counts, strict=True)
        ),
        mean_pairwise_cosine=(total.square().sum().item() - n) / (n * (n - 1)) if n > 1 else float("nan"),
        effective_dimension=(1 / p.square().sum()).item(),
        entropy_dimension=torch.special.entr(p).sum().exp().item(),
        encoder_decoder_cosine=None if alignment is None else alignment.mean().item(),
        encoder_decoder_percentiles=None if alignment is None else _percentiles(alignment),
    )


def _unit(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.detach().to(wide(rows.dtype))
    return torch.nn.functional.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny)


def _neighbours(rows: torch.Tensor, cosines: Sequence[float]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Largest cosine of each row with another, `[n]` float64, and for each bound how many are above it, `[n]`."""
    n = len(rows)
    nearest = rows.new_full((n,), -torch.inf)
    counts = [torch.zeros(n, dtype=torch.int64, device=rows.device) for _ in cosines]
    for start in range(0, n, BLOCK_ROWS):
        stop = min(n, start + BLOCK_ROWS)
        block = rows[start:stop] @ rows[start:].T  # every pair once, apart from those inside the block
        block.fill_diagonal_(-torch.inf)
        nearest[start:stop] = torch.maximum(nearest[start:stop], block.amax(dim=1))
        nearest[start:] = torch.maximum(nearest[start:], block.amax(dim=0))
        for cosine, count in zip(cosines, counts, strict=True):
            above = block > cosine
            count[start:stop] += above.sum(dim=1)
            count[stop:] += above[:, stop - start :].sum(dim=0)
    nearest = nearest.cpu().double().clamp(-1, 1) if n > 1 else torch.full((n,), torch.nan, dtype=torch.float64)
    return nearest, [count.cpu() for count in counts]


def _spectrum(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values of the rows, and their sum vector `[d]`, both float64 on the CPU."""
    where = "cpu" if rows.device.type == "mps" else rows.device  # MPS has no float64
    gram = torch.zeros((rows.shape[1],) * 2, dtype=torch.float64, device=where)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=where)
    for part in rows.split(BLOCK_ROWS):
        part = part.to(where).double()
        gram.addmm_(part.T, part)
        total += part.sum(dim=0)
    return torch.linalg.eigvalsh(gram).clamp_min(0).cpu(), total.cpu()


def _percentiles(values: torch.Tensor) -> tuple[float, ...]:
    if len(values) == 0:
        return (float("nan"),) * len(QUANTILES)
    return tuple(torch.quantile(values.cpu(), torch.tensor(QUANTILES, dtype=values.dtype)).tolist())
