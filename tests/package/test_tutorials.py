import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from helpers import CONTEXT, HOOK, tiny_dataset
from nbclient import NotebookClient
from sae_lens import StandardSAE, StandardSAEConfig

from saelens_cosine.bundled import load_bundled_model

TUTORIALS = Path(__file__).parents[2] / "tutorials"
TRAIN, STEER, WIN = "01_train_a_cosine_sae.ipynb", "02_load_and_steer.ipynb", "03_does_cosine_win.ipynb"
REAL = "04_a_real_model.ipynb"
SHRINK = {
    TRAIN: {
        "TRAINING_TOKENS = 800_000": "TRAINING_TOKENS = 40_960",
        "d_sae=1024": "d_sae=128",
        "n_batches_in_buffer=512": "n_batches_in_buffer=64",
    },
    STEER: {
        "TRAINING_TOKENS = 500_000": "TRAINING_TOKENS = 40_960",
        "d_sae=1024": "d_sae=256",
        "n_batches_in_buffer=512": "n_batches_in_buffer=64",
        "files=80": "files=30",
        "per_file=8": "per_file=2",
    },
    WIN: {
        '    "per_feature_cosine_batchtopk",\n    "magnitude_bypass_batchtopk",\n)': ")",
        "SEEDS = 3": "SEEDS = 1",
        "TRAINING_TOKENS = 300_000": "TRAINING_TOKENS = 8_192",
        "D_SAE, K = 1024, 16": "D_SAE, K = 64, 4",
        "EVAL_TOKENS, LOSS_TOKENS, TASK_TEXTS = 30_000, 8_000, 240": "EVAL_TOKENS, LOSS_TOKENS, TASK_TEXTS = 2_048, 256, 20",
        "CAUSAL_CONTEXTS, CAUSAL_FEATURES, CONCEPT_TEXTS = 100, 40, 40": "CAUSAL_CONTEXTS, CAUSAL_FEATURES, CONCEPT_TEXTS = 12, 2, 4",
        'TASKS = ("bundled",)': 'TASKS = ("bundled:loop",)',
        '    "sae_probes:21_headline_istrump",\n': "",
        '    "sae_probes:158_code_C",\n    "sae_probes:57_wikidatais_alive",\n': "",
        '    "sae_probes:96_spam_is",\n    "sae_probes:105_click_bait",\n': "",
        "REAL[:3]": "REAL[:1]",
        'saes("removed", seeds=1), settings, OUT / "evaluation" / "saebench"': 'saes("removed", seeds=1)[:1], settings, OUT / "evaluation" / "saebench"',
        '"n_eval_reconstruction_batches": 8, "n_eval_sparsity_variance_batches": 32': '"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1',
        "samples=60_000": "samples=2_048",
    },
    REAL: {
        'MODEL, TEXT = "smollm2", "sae-probes"': 'MODEL, TEXT = "bundled", "bundled"',
        "TOKENS = {15: 2_000_000}": "TOKENS = {3: 4_096}",
        "MIDDLE = 15": "MIDDLE = 3",
        "\nRATES = (1e-3, 3e-3, 9e-3)": "\nRATES = (1e-3, 3e-3)",
        "FINER_RATES = (1e-3, 3e-3, 4.5e-3, 9e-3)": "FINER_RATES = (1e-3, 2e-3)",
        "LOSS_PROMPTS = {15: 128}": "LOSS_PROMPTS = {3: 2}",
        "D_SAE, SEEDS, KS, K = 8192, 3, (16, 32, 64), 32": "D_SAE, SEEDS, KS, K = 64, 2, (2, 4, 8), 4",
        "EVAL_TOKENS, LOSS_TOKENS, TASK_TEXTS = 32_000, 2_048, 200": "EVAL_TOKENS, LOSS_TOKENS, TASK_TEXTS = 2_048, 128, 20",
        "ARMS = tuple(LABELS)[:4]": "ARMS = tuple(LABELS)[:2]",
        "WITH_SINKS_TOKENS = 1_000_000": "WITH_SINKS_TOKENS = 4_096",
        '*("--tasks", *TASKS, "--task-texts", TASK_TEXTS),\n    )\n\n\nevaluated': '*("--tasks", *TASKS[:1], "--task-texts", TASK_TEXTS),\n    )\n\n\nevaluated',
        '[*arms, *read_by_cosine(MIDDLE, f"layer{MIDDLE}", [f"k{K}/seed0"])],': "arms[:1],",
        "list(BENCH_TASKS)": "list(BENCH_TASKS[9:10])",
        '"core", "sparse_probing_sae_probes", "--saebench-settings"': '"sparse_probing_sae_probes", "--saebench-settings"',  # core runs in WIN
        'STARTS = ("geometric_median", "mean", "zeros")': 'STARTS = ("mean",)',
    },
}

BEFORE = f"""
import functools, sys
sys.path.append({str(Path(__file__).parents[1])!r})
import short_corpus, variation
from saelens_cosine.experiments.evaluate.evals.of_sae import probing
from saelens_cosine.experiments.evaluate.evals.of_text import patching, probing_baseline
from saelens_cosine.experiments.evaluate.evals.of_pair import decomposition
variation.apply()
short_corpus.apply(corpus=short_corpus.few_documents)
patching.direction_norm_patching = functools.partial(patching.direction_norm_patching, pairs=20, control_pairs=10, rescaled_tokens=10)
probing.SPLITS = probing_baseline.SPLITS = decomposition.SPLITS = 2
"""
"""Run first in a notebook's process: seeds and threads as in this one, few documents, patches and probes."""


def run_shrunk(name, folder):
    """What the notebook prints with fewer tokens and features."""
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEFORE))
    sources = "\n".join(cell.source for cell in notebook.cells)
    for old, new in SHRINK[name].items():
        assert sources.count(old) == 1, f"{old!r} stands {sources.count(old)} times in {name}"
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def number(printed, after):
    """The number that first follows a text."""
    return float(printed.split(after)[1].split()[0].strip(",;:"))


def test_training_tutorial_runs_shrunk(tmp_path):
    printed = run_shrunk(TRAIN, tmp_path)
    assert "PerFeatureCosineJumpReLUSAE" in printed
    assert 0.1 < number(printed, "FVE ") < 1
    losses = [float(word.strip(";")) for word in printed.split("loss ")[1].split() if word[0].isdigit()][:3]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)  # with the error term the model is its own
    assert losses[2] > losses[0]


def test_steering_tutorial_runs_shrunk(tmp_path):
    printed = run_shrunk(STEER, tmp_path)
    assert "PerFeatureCosineJumpReLUSAE" in printed
    assert number(printed, "with the error term: ") < 1e-3

    # active features switched off one at a time, the one that matters most first
    without = re.findall(r"^ +\d+: ([01]\.\d+)$", printed.split("P(' None') is ")[1].split("\nfeature ")[0], re.M)
    assert without
    assert without == sorted(without)
    for batch in ("any text", "best contexts"):
        rows = re.findall(r"(\S+) at +(\d+) tokens, +(\S+)%", printed.split(f"{batch}: KL ")[1])[:3]
        kl, tokens, shares = ([float(value) for value in column] for column in zip(*rows, strict=True))
        assert sum(tokens) % 128 == 0
        assert not kl[2] > 0  # nothing changes before it is active; nan where it is active from the first token on
        if tokens[0]:
            assert kl[0] >= 0
            assert sum(shares) == pytest.approx(100, abs=1.5)

    rows = {name: printed.split(f"\n{name} ")[1].split("\n")[0].split() for name in ("inner product", "cosine")}
    assert [row[0] for row in rows.values()] == ["jumprelu", "cosine_jumprelu"]
    for row in rows.values():  # the threshold was fitted on other text
        assert float(row[2]) == pytest.approx(number(printed.split("as trained  ")[1], " L0 "), rel=0.3)


def test_comparison_tutorial_runs_shrunk(tmp_path):
    pytest.importorskip("sae_bench")
    printed = run_shrunk(WIN, tmp_path)
    # one token of a context of 128 is a sink in every world
    dropped = dict(re.findall(r"(\w+): ([\d.]+)% of the training tokens dropped", printed))
    assert float(dropped["natural"]) == float(dropped["planted"]) == 0
    assert float(dropped["removed"]) == pytest.approx(100 / 128, abs=0.1)
    found = re.findall(r"^([a-z, ]+): ([\d.]+)% of the tokens are sinks, ([\d.]+) times", printed, re.M)
    assert [name for name, *_ in found] == ["natural", "removed", "removed, then planted", "planted"]
    assert all(float(share) == pytest.approx(100 / 128, abs=0.1) for _, share, _ in found)
    assert [float(multiple) > 30 for *_, multiple in found] == [False, False, True, True]
    assert "probing k=all, scale-free" in printed
    assert "Recovery of known features" in printed
    assert (tmp_path / "output/does_cosine_win/report.html").stat().st_size > 100_000


def test_real_model_tutorial_runs_shrunk_and_keeps_its_figures(tmp_path):
    pytest.importorskip("sae_bench")
    printed = run_shrunk(REAL, tmp_path)
    assert "layer 3: blocks.3.hook_resid_post, d_in 192" in printed
    assert printed.count("minus the inner product's at its FVE") == 6  # best 1, best 5 and all; with sinks and without
    row = printed.split("--- layer 3\nL0 ")[1].split("  inner product ")[1].split("\n")[0]
    assert [float(l0) for l0 in row.split()] == pytest.approx([2, 4, 8, 2, 4, 8], rel=0.6)
    made = {path.name.replace("layer3", "layer15") for path in (tmp_path / "a_real_model").iterdir()}
    kept = {path.name for path in (TUTORIALS / "a_real_model").iterdir()}
    kept = {name for name in kept if not name.startswith(("layer5", "layer25"))}  # one layer stands for all
    assert made == kept - {"b_dec_geometric_median.json.gz", "b_dec_zeros.json.gz"}


def source(name, containing):
    """The one code cell that holds a text."""
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    (found,) = [cell.source for cell in notebook.cells if cell.cell_type == "code" and containing in cell.source]
    return found


TOKENS = torch.tensor([row["tokens"] for row in tiny_dataset(400)])
"""`[400, 8]` with the word <s> at position 0."""


@pytest.mark.parametrize(
    ("places", "shown"),
    [
        ([], []),
        ([(2, 0)], []),  # the sink alone: nothing is before it
        ([(2, 0), (2, 1)], [(2, 1)]),
        ([(3, CONTEXT - 1), (5, 0), (0, 4)], [(0, 4), (3, CONTEXT - 1)]),
        ([(row, 1) for row in range(12)], [(row, 1) for row in reversed(range(4, 12))]),
    ],
    ids=["never", "at the sink", "after the sink", "at the end", "often"],
)
def test_training_tutorial_shows_a_feature_wherever_it_is_active(places, shown, model, capsys):
    # one feature with codes 1, 2, 3, ... at the places, and one that is active everywhere
    codes = torch.zeros(400, CONTEXT, 2)
    codes[:, :, 1] = 100
    for code, place in enumerate(places, 1):
        codes[(*place, 0)] = code
    names = {
        "torch": torch,
        "model": model,
        "tokens": TOKENS,
        "activations": None,
        "loaded": SimpleNamespace(encode=lambda activations: codes),
        "exponents": torch.zeros(2),
    }
    exec(source(TRAIN, "selective = "), names)
    title, *lines = capsys.readouterr().out.splitlines()
    active = codes[:, 1:, 0].count_nonzero().item()
    assert title.startswith(f"feature 0: active on {active / (400 * (CONTEXT - 1)):.2%} of the tokens")
    assert len(lines) == len(shown)
    for line, (row, position) in zip(lines, shown, strict=True):
        *before, token = model.to_str_tokens(TOKENS[row, 1 : position + 1])
        assert line == f"{codes[row, position, 0]:6.2f}  {''.join(before)!r} -> {token!r}"


@pytest.mark.parametrize("bias", [-1e6, 0.0, 1e6], ids=["never", "at the sink", "everywhere"])
def test_training_tutorial_switches_off_a_feature_wherever_it_is_active(bias, model, capsys):
    _, cache = model.run_with_cache(TOKENS, names_filter=[HOOK])
    sink = cache[HOOK][0, 0]
    sae = StandardSAE(StandardSAEConfig(d_in=len(sink), d_sae=1))
    sae.cfg.metadata.hook_name = HOOK
    with torch.no_grad():
        sae.W_enc.copy_(sink[:, None])
        sae.b_enc.fill_(bias - ((cache[HOOK][:, 1:] @ sink).max() + sink @ sink) / 2)
        codes = sae.encode(cache[HOOK])
    assert (codes[:, :, 0] > 0).sum().item() == {-1e6: 0, 0.0: 400, 1e6: 400 * CONTEXT}[bias]
    names = {"torch": torch, "model": model, "loaded": sae, "tokens": TOKENS, "HOOK": HOOK, "feature": 0}
    exec(source(TRAIN, "def switch_off"), names | {"codes": codes[:, 1:]})
    printed = capsys.readouterr().out
    seen = 16 * (CONTEXT - 2) * (bias > 0)  # in 16 contexts; the first token is left out, the last predicts nothing
    assert f"on the {seen} tokens where it is active" in printed
    if bias <= 0:
        assert "costs 0.0000 nats" in printed


@pytest.mark.parametrize("bias", [-1e6, 1e6], ids=["none", "all"])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_steering_tutorial_switches_off_as_many_features_as_are_active(bias, density, capsys):
    model = load_bundled_model()
    hook = "blocks.3.hook_resid_post"
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=7))
    sae.cfg.metadata.hook_name = hook
    sae.b_enc.data.fill_(bias)
    prompt = model.to_tokens("    if host is")
    _, cache = model.run_with_cache(prompt, names_filter=[hook])
    names = {"model": model, "sae": sae, "HOOK": hook, "prompt": prompt, "cache": cache, "show": lambda *_, **__: None}
    with torch.no_grad():
        exec(source(STEER, "def switch_off_one_each"), names | {"density": torch.full((7,), density)})
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (5 if bias > 0 and density > 0 else 1)  # the five that matter most, of seven


@pytest.mark.parametrize(("name", "pictures"), [(TRAIN, 3), (STEER, 4), (WIN, 3), (REAL, 2)])
def test_tutorial_is_committed_with_its_outputs(name, pictures):
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= pictures
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
