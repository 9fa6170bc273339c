"""What tests of SAEBench share: SAEs of the bundled model, and small settings of its evals."""

import json
import random
from pathlib import Path

import torch
from helpers import make_sae
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

HOOK, D_IN = "blocks.2.hook_resid_post", 192
CLASSES = ["0", "1", "2", "6", "9"]
BIOS = "LabHC/bias_in_bios_class_set1"
PROBING = {
    "dataset_names": [BIOS],
    "probe_train_set_size": 80,
    "probe_test_set_size": 40,
    "context_length": 24,
    "k_values": [1],
}
ABLATION = {
    "dataset_names": [BIOS],
    "train_set_size": 80,
    "test_set_size": 40,
    "context_length": 24,
    "n_values": [2],
    "probe_epochs": 10,
    "column1_vals_lookup": {BIOS: [("professor", "nurse")]},
}
CORE = {
    "dataset": "bundled",
    "context_size": 64,
    "n_eval_reconstruction_batches": 1,
    "n_eval_sparsity_variance_batches": 2,
    "eval_batch_size_prompts": 4,
}


def linear_sae(W_enc: torch.Tensor, W_dec: torch.Tensor) -> StandardSAE:
    metadata = SAEMetadata(model_name="bundled", hook_name=HOOK)
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=len(W_dec), metadata=metadata))
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
    return sae


def mirror(scale: float = 1.0) -> StandardSAE:
    """Reconstructs exactly: latents are the coordinates, and their negatives, times `scale`."""
    both = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    return linear_sae(both.T * scale, both / scale)


def cosine_sae():
    sae = make_sae("per_feature_cosine_batchtopk", d_in=D_IN, d_sae=128, k=16)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bundled", HOOK
    return sae


def planted(sinks: float | None):
    """In place of the language model's activations: class i has 1 at coordinate i of every token, and noise of 0.01.

    24 tokens a text, the first zeroed as special. With sinks, the second is at `sinks` times a random class's coordinate.
    """

    def activations(*args, **kwargs):
        rng = torch.Generator().manual_seed(0)

        def split(n: int) -> dict[str, torch.Tensor]:
            made = {}
            for i, name in enumerate(CLASSES):
                acts = 0.01 * torch.randn(n, 24, D_IN, generator=rng)
                acts[..., i] += 1
                if sinks is not None:
                    acts[:, 1] = 0
                    acts[torch.arange(n), 1, torch.randint(len(CLASSES), (n,), generator=rng)] = sinks
                acts[:, 0] = 0
                made[name] = acts
            return made

        return split(40), split(20)

    return activations


def write_bios(folder: Path) -> None:
    """Code of seven topics in two styles where SAEBench looks for LabHC/bias_in_bios."""
    rng, names = random.Random(0), ["value", "name", "index", "data", "self"]
    folder = folder / "LabHC" / "bias_in_bios"
    folder.mkdir(parents=True)
    topics = {0: "socket", 1: "matrix", 2: "parser", 6: "thread", 9: "string", 13: "queue", 21: "path"}
    for split in ("train", "test"):
        rows = []
        for profession, topic in topics.items():
            for gender in (0, 1):
                for _ in range(60):
                    a, b = rng.sample(names, 2)
                    text = (
                        f"def {topic}_{a}({b}):\n    return {topic}.{b}({a})"
                        if gender
                        else f"class {topic.title()}:\n    {a} = {topic}.{b}"
                    )
                    rows.append(json.dumps({"hard_text": text, "profession": profession, "gender": gender}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
