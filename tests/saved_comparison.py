"""Folders like those of `saelens-cosine compare`, with small SAEs that nobody trained."""

import json
from itertools import product

from sae_lens import SAE
from saved_evaluations import HOOK, saved_sae

from saelens_cosine.plain import weights_sha256

ARMS = ("inner_product_topk", "cosine_topk")
HOOKS = {f"layer{i}": f"blocks.{i}.hook_resid_post" for i in (1, 3)}


def saved_comparison(folder, *, arms=ARMS, hooks=None, ks=(4,), seeds=2, schema=2, k_of=None, k_steps=()):
    """A comparison in its order: hook by hook, k by k, seed by seed, the control first. Returns the paths of its SAEs."""
    hooks = hooks or {"layer3": HOOK}
    entries = []
    for (part, hook), k, seed, arm in product(hooks.items(), ks, range(seeds), arms):
        parts = [arm, *[part] * (len(hooks) > 1), *[f"k{k}"] * (len(ks) > 1), f"seed{seed}"]
        path = "/".join(parts)
        saved_sae(folder / path, seed=1 + len(entries), name=arm)
        sae = SAE.load_from_disk(folder / path)
        sae.cfg.k = k
        sae.cfg.metadata.hook_name = hook
        sae.save_model(folder / path)
        log = [{"training_tokens": n, "fve": 0.5, "l0": float(k), "metrics": {}} for n in (100, 200)]
        entry = {"architecture": arm, "seed": seed, "path": path, "k": k, "training_log": log}
        entry["weights_sha256"] = weights_sha256(sae)
        entries.append(entry | ({"hook_name": hook} if schema == 2 else {}))
    settings = {"hook_name": HOOK} if schema == 1 else {}
    content = {"schema": f"saelens-cosine/comparison/{schema}", "settings": settings, "arms": entries}
    (folder / "comparison.json").write_text(json.dumps(content))
    return [entry["path"] for entry in entries]
