"""Hooked models whose next-token distribution is a formula, and the formula in float64."""

from __future__ import annotations

import numpy as np
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelens_cosine.bundled import model_folder


class FormulaModel(HookedRootModule):
    """Logits are a linear function of `read_out` of the activation at `hook`: itself, its direction, its norm, or the sum so far.

    Token i embeds as row i of `table`, so a test sets activations by choosing tokens.
    """

    def __init__(self, table, W_U, read_out="itself"):
        super().__init__()
        self.embed = torch.nn.Embedding.from_pretrained(table)
        self.hook = HookPoint()
        self.unembed = torch.nn.Linear(*W_U.shape, bias=False)
        self.unembed.weight.data = W_U.T.contiguous()
        self.read_out = read_out
        self.setup()

    def forward(self, tokens, prepend_bos=False):
        h = self.hook(self.embed(tokens))
        if self.read_out == "direction":
            h = torch.nn.functional.normalize(h, dim=-1)
        elif self.read_out == "norm":
            h = h.norm(dim=-1, keepdim=True).expand_as(h)
        elif self.read_out == "sum":
            h = h.cumsum(dim=1)
        return self.unembed(h)


def bundled_of_hugging_face():
    """The bundled model in SAELens' wrapper."""
    return HookedProxyLM(
        AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32),
        AutoTokenizer.from_pretrained(model_folder()),
    )


def log_p(h, W_U):
    """Log-probabilities of read-out `h`, float64."""
    logits = np.asarray(h, dtype=np.float64) @ np.asarray(W_U, dtype=np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def kl(h, changed, W_U):
    """KL(clean || changed) of two read-outs, the textbook sum in float64."""
    p, q = log_p(h, W_U), log_p(changed, W_U)
    return (np.exp(p) * (p - q)).sum(-1)


def relu_sae(W_enc, W_dec=None, b_enc=None):
    """A StandardSAE with the given weights, decoder the encoder's transpose unless given, no decoder bias."""
    sae = StandardSAE(StandardSAEConfig(*W_enc.shape))
    sae.W_enc.data, sae.W_dec.data = W_enc.clone(), (W_enc.T if W_dec is None else W_dec).contiguous().clone()
    if b_enc is not None:
        sae.b_enc.data = b_enc.clone()
    return sae


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
