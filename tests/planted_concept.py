"""Samples, SAEs and a concept for probes, small or planted so that the result is known."""

import numpy as np
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from scipy.stats import norm

from saelens_cosine.activations.sample import TokenSample

STRENGTH, OFFSET, SPREAD, REST = 2.0, 3.0, 1.5, 30.0


def sample_of(activations, contexts, ordinary=None):
    n = len(activations)
    return TokenSample(
        activations,
        torch.zeros(n, dtype=torch.int64),
        torch.as_tensor(contexts),
        torch.as_tensor(contexts),
        torch.zeros(n, dtype=torch.int64),
        torch.ones(n, dtype=torch.bool) if ordinary is None else ordinary,
        10.0,
    )


def identity_sae(d, decoder_norms=None, **config):
    """A ReLU SAE whose feature i is dimension i."""
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=d, **config))
    sae.load_state_dict(
        {"W_enc": torch.eye(d), "b_enc": torch.zeros(d), "W_dec": torch.eye(d), "b_dec": torch.zeros(d)}
    )
    if decoder_norms is not None:
        sae.W_dec.data *= torch.tensor(decoder_norms).unsqueeze(-1)
    return sae.eval()


def concept(n=3000, seed=0):
    """`x = g (c e_0 + 30 e_1)`: `c` is normal about 3 + 1 or 3 - 1 by class, g log-normal with spread 1.5."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2 == 0
    c = OFFSET + STRENGTH * (truth - 0.5) + rng.normal(size=n)
    g = np.exp(SPREAD * rng.normal(size=n))
    x = np.zeros((n, 3))
    x[:, 0], x[:, 1] = g * c, g * REST
    return torch.tensor(x, dtype=torch.float32), truth


def best_by_inner_product():
    """The highest accuracy that a threshold on g c can have, by quadrature over g."""
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    g, weight = np.exp(SPREAD * z), weight / weight.sum()
    thresholds = np.geomspace(0.01, 100, 400)[:, None] / g
    high, low = (norm.cdf(thresholds, OFFSET + s * STRENGTH / 2) @ weight for s in (1, -1))
    return (0.5 + 0.5 * (low - high)).max()
