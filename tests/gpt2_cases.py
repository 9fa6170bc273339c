"""A GPT-2 of three random blocks in the working directory (the fixture `in_the_place`), and SAEs of it."""

import torch
from helpers import make_sae

from saelens_cosine.experiments.evaluate.loader import Loader
from saelens_cosine.experiments.evaluate.settings import EvaluationSettings
from saelens_cosine.experiments.evaluate.sources import parse_sources

D, HEADS, CONTEXT = 16, 2, 16
TOKENS = torch.tensor([[0, 3, 4, 5, 6, 2], [0, 9, 9, 1, 30, 7]])
HF, LENS = "AutoModelForCausalLM", "HookedTransformer"


def save(folder, d_in=D, seed=1, **metadata):
    """An SAE whose metadata are complete but for what is given: None takes an entry out."""
    sae = make_sae("cosine_topk", seed=seed, d_in=d_in, d_sae=24)
    known = {"model_name": "gpt2", "model_class_name": LENS, "hook_name": "blocks.1.hook_resid_post"}
    known |= {"dataset_path": "text.jsonl", "context_size": CONTEXT, "prepend_bos": True}
    for key, value in {**known, **metadata}.items():
        sae.cfg.metadata[key] = value
    sae.save_inference_model(folder)
    return str(folder)


def subjects(folder, *sources, **settings):
    loader = Loader(EvaluationSettings(tokens=500, **settings), folder)
    return [loader.subject(source) for source in parse_sources(sources)]


def fve(sae, x):
    """1 - Var(x - x_hat) / Var(x), each about its own mean and summed over dimensions, in float64."""
    with torch.no_grad():
        error = (x - sae.decode(sae.encode(x))).double()
    total, left = ((y - y.mean(dim=0)).square().sum().item() for y in (x.double(), error))
    return 1 - left / total


def cross_entropy(logits, tokens):
    logits = logits[:, :-1].double().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()
