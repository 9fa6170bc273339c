"""What the package measures of the bundled model, and TransformerLens as from version 4 on.

`python without_hooked_transformer.py folder` measures in a process of its own where the names are hidden from the import system.
"""

import json
import random
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import variation
from helpers import make_sae
from sae_lens import SAE
from small_runs import small_batches

HOOK = "blocks.3.hook_resid_post"

GONE = (
    *("HookedTransformer", "HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder", "BertNextSentencePrediction"),
    *("HookedTransformerConfig", "config.hooked_transformer_config", "loading_from_pretrained", "loading"),
    *("components", "pretrained", "train", "utils"),
)
"""Of `transformer_lens` 3.9, what 4.3 has not."""

LINES = """
def read(self, path, mode="r"):
    if not self.closed:
        return None
    for name in sorted(names):
        with open(path) as file:
        self._cache[name] = value
    raise ValueError("no such file: %r" % name)
import os, sys, re
class Reader(io.BufferedReader):
    \"\"\"Return the number of bytes read, or None.\"\"\"
    try:
    except KeyError as error:
        result.append((start, end))
    assert isinstance(value, int), value
    while i < len(line) and line[i] in " \\t":
    return x + y * 2 - 1
# This is needed for old versions of the protocol.
    @property
""".strip("\n").splitlines()
"""Of code, which the bundled model predicts well: of nonsense, what an SAE loses would be a small part of a large number."""


def write_code(path: Path) -> Path:
    """120 documents of some lines each."""
    rng = random.Random(0)
    rows = [{"text": "\n".join(rng.choices(LINES, k=rng.randint(5, 60)))} for _ in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hide() -> None:
    """Importing one of them raises ImportError from now on.

    sae_lens 6.54 imports `HookedTransformer` and `HookedRootModule` from `transformer_lens.HookedTransformer`, and
    `transformer_lens.utils` and `components`, when it is imported itself; so it is imported before, with its bridge and what TransformerLens'
    bridge takes from these modules. Then its own two classes made of them go too.
    """
    import sae_lens
    import transformer_lens
    from sae_lens import evals, load_model
    from sae_lens.analysis import hooked_sae_transformer, sae_transformer_bridge  # noqa: F401

    def missing(name):
        raise ImportError(name) if name in GONE else AttributeError(name)

    transformer_lens.__getattr__ = missing
    for name in GONE:
        module = f"transformer_lens.{name}"
        vars(transformer_lens).pop(name, None)
        for loaded in [module, *(key for key in sys.modules if key.startswith(f"{module}."))]:
            sys.modules[loaded] = None
    vars(transformer_lens.config).pop("HookedTransformerConfig")
    for module in (sae_lens, evals, load_model, hooked_sae_transformer):
        for name in ("HookedTransformer", "HookedSAETransformer"):
            vars(module).pop(name, None)


def lost(model, tokens, sae, hook: str, head: int | None) -> list[float]:
    """KL divergence with an SAE's reconstructions and with zeros, at a hook as HookedTransformers call it."""
    from saelens_cosine.metrics.reconstruction.clean_losses import clean_losses
    from saelens_cosine.metrics.reconstruction.loss_recovered import loss_recovered

    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index = hook, head
    found = loss_recovered(sae, clean_losses(model, hook, [tokens], head), None).by_norm.all_norms.overall
    return [found.kl_div_with_sae, found.kl_div_with_ablation]


def measure(folder: Path, output: Path) -> dict:
    """The commands' JSON, and what hooks and edits give, for the SAE and the text in a folder."""
    from saelens_cosine import saebench
    from saelens_cosine.activations.bridges import name_in_bridge
    from saelens_cosine.bundled import load_bundled_model
    from saelens_cosine.cli import main
    from saelens_cosine.metrics.causal.code_edits import reconstruct
    from saelens_cosine.metrics.causal.forward import clean_run
    from saelens_cosine.training.next_norm import next_norm
    from saelens_cosine.training.recipe import RECIPES

    text = str(folder / "text.jsonl")
    trained = [
        "--tokens",
        "1024",
        "--d-sae",
        "24",
        "--k",
        "4",
        "--context-size",
        "32",
        "--eval-tokens",
        "320",
        "--quiet",
    ]
    arms = ["--arms", "cosine_batchtopk", "inner_product_topk"]
    with patch.dict(RECIPES, paper=small_batches):
        assert main(["compare", "--dataset", text, *arms, *trained, "--output", str(output / "compared")]) == 0
    evals = ["tokens", "reconstruction", "loss", "norm_response", "dictionary", "gradients", "afa", "causal"]
    few = ["--tokens", "640", "--causal-contexts", "8", "--causal-features", "4", "--sinks", "keep", "--quiet"]
    place = str(output / "evaluated")
    assert main(["evaluate", str(folder / "sae"), "--evals", *evals, *few, "--output", place]) == 0

    sae, model = SAE.load_from_disk(folder / "sae"), load_bundled_model()
    tokens = torch.randint(0, 400, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae], prepend_bos=False)
        with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True, prepend_bos=False)
    (codes,) = [cache[name] for name in cache.keys() if name.endswith("hook_sae_acts_post")]  # noqa: SIM118
    hook = name_in_bridge(HOOK, model) or HOOK
    run = clean_run(model, hook, tokens)  # the SAE has been there, and is not now
    gain = next_norm(model, hook).gain
    recovered = [lost(model, tokens, sae, HOOK, None)]
    recovered += [lost(model, tokens, sae, "blocks.3.attn.hook_z", None)]
    recovered += [lost(model, tokens, make_sae("cosine_topk", d_in=48, d_sae=24, k=4), "blocks.3.attn.hook_z", 1)]
    replaced = run.kl(torch.arange(4), lambda hidden, _: reconstruct(sae)(hidden.flatten(0, 1)).view_as(hidden))
    problems = saebench.check_environment(["core"], "bundled")
    return {
        "model": type(model).__name__,
        "saebench": [f"{problem.reason} {problem.remedy}" for problem in problems],
        "trained": json.loads((output / "compared/cosine_batchtopk/seed0/cfg.json").read_text())["metadata"],
        "compare": json.loads((output / "compared/comparison.json").read_text()),
        "evaluate": json.loads((output / "evaluated/evaluation.json").read_text()),
        "logits": logits[:, -1].tolist(),
        "codes": codes.tolist(),
        "with error": with_error[:, -1].tolist(),
        "predictions": run.log_probs.tolist(),
        "replaced": replaced.tolist(),
        "gain": gain.tolist(),
        "recovered": recovered,
    }


if __name__ == "__main__":
    variation.apply()
    hide()
    folder = Path(sys.argv[1])
    (folder / "hidden.json").write_text(json.dumps(measure(folder, folder / "hidden")))
