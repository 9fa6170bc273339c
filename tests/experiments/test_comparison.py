import contextlib
import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from short_corpus import short_corpus
from torch.nn.modules import module

from saelens_cosine.activations.text import load_text
from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.run import compare
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.compare.tables import SCHEMA
from saelens_cosine.files.manifest import MANIFEST
from saelens_cosine.loading import from_pretrained
from saelens_cosine.plain import weights_sha256

pytestmark = pytest.mark.usefixtures("short_text")

TINY = ["--tokens", "24k", "--d-sae", "128", "--k", "8", "--quiet"]
ARMS = ["inner_product_batchtopk", "cosine_batchtopk", "per_feature_cosine_batchtopk"]


@pytest.fixture(scope="module", autouse=True)
def few_evaluation_tokens():
    before = ComparisonSettings.eval_tokens, ComparisonSettings.eval_prompts
    defaults = ComparisonSettings.__init__.__defaults__
    assert defaults[-2:] == before
    ComparisonSettings.__init__.__defaults__ = (*defaults[:-2], 8000, 4)  # 63 contexts of 128, and four of them
    yield
    ComparisonSettings.__init__.__defaults__ = defaults


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two seeds of the default arms by the command, with its standard output."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["compare", *TINY, "--seeds", "2", "--output", str(folder)]) == 0
    return folder, json.loads((folder / "comparison.json").read_text()), printed.getvalue()


def test_one_entry_per_arm_and_seed_with_every_field(run):
    folder, result, _ = run
    assert result["schema"] == SCHEMA
    assert [(arm["architecture"], arm["seed"]) for arm in result["arms"]] == [(a, s) for s in (0, 1) for a in ARMS]
    for arm in result["arms"]:
        assert (arm["k"], arm["d_sae"], arm["tokens"]) == (8, 128, 24_000)
        assert arm["dead_window_tokens"] == 63 * 128
        assert 0.1 < arm["fve"] < 1
        assert 0 <= arm["dead_fraction"] < 1
        assert 0.2 < arm["ce_loss_recovered"] < 1  # 0.29 to 0.4 by Python's version, whose library is the text
        assert arm["seconds"] > 0
        assert sum(quartile["tokens"] for quartile in arm["fve_by_norm_quartile"]) == 63 * 128
        edges = [(quartile["low"], quartile["high"]) for quartile in arm["fve_by_norm_quartile"]]
        assert edges == sorted(edges)
        assert len(edges) == 4
        exponent = arm["norm_exponent"]
        if arm["architecture"].startswith("inner"):
            assert exponent == {"mean": None, "min": None, "max": None}
        else:
            assert exponent["min"] <= exponent["mean"] <= exponent["max"]
            assert exponent["mean"] != 0
    assert [hook["hook_name"] for hook in result["hooks"]] == ["blocks.3.hook_resid_post"]
    assert result["high_norm_tokens"]["in_evaluation"] is False
    assert set(result["versions"]) >= {"python", "sae-lens", "torch", "saelens-cosine"}


def test_the_training_log_shows_exponents_scale_threshold_and_dead_features(run):
    _, result, _ = run
    entry = result["arms"][2]["training_log"][-1]["metrics"]
    assert set(entry) == {
        "norm_exponent_mean",
        "norm_exponent_min",
        "norm_exponent_max",
        "norm_exponent_share_above_0.5",
        "log_scale_mean",
        "topk_threshold",
        "dead_features_in_token_window",
        "dead_feature_window_tokens",
    }
    tokens = [entry["training_tokens"] for entry in result["arms"][0]["training_log"]]
    assert tokens == sorted(tokens)
    assert tokens[0] == 0
    assert tokens[-1] >= 24_000  # the last entry is of the end
    assert result["arms"][0]["training_log"][-1]["fve"] > result["arms"][0]["training_log"][0]["fve"]


def test_the_saved_saes_load_in_saelens_and_are_what_was_measured(run):
    folder, result, _ = run
    for arm in result["arms"]:
        sae = SAE.load_from_disk(folder / arm["path"])
        assert sae.cfg.metadata.training_architecture == arm["architecture"]
        assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
        assert sae.cfg.metadata.max_norm_multiple == 10.0
        assert sae.cfg.metadata.heldout_rule == load_text("bundled").rule
        assert (sae.cfg.metadata.training_tokens, sae.cfg.metadata.recipe) == (24_000, "paper")
        assert sae.cfg.metadata.lr == 5e-3  # the recipe's largest
        assert arm["weights_sha256"] == weights_sha256(from_pretrained(folder / arm["path"]))  # as `evaluate` loads it
        last = arm["training_log"][-1]["metrics"]
        for name in ("dead_features_in_token_window", "dead_feature_window_tokens"):
            assert sae.cfg.metadata[name] == last[name]
        exponent = getattr(sae, "norm_exponent", None)
        if exponent is not None:
            assert exponent.mean().item() == pytest.approx(arm["norm_exponent"]["mean"], rel=1e-6)


def test_the_measured_fve_is_that_of_an_independent_forward_pass(run):
    # heldout activations by transformers, codes and reconstruction by hand in float64
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saelens_cosine.bundled import model_folder

    folder, result, _ = run
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    stream = [0]
    for text in short_corpus("heldout").shuffle(seed=0)["text"]:
        stream += [*tokenizer(text)["input_ids"], 0]
    # separators between documents, the beginning-of-sequence token before each context, unless a separator is there
    every, place = [], 1
    while place + 128 < len(stream):
        taken = 128 if stream[place] == 0 else 127
        every.append([0] * (128 - taken) + stream[place : place + taken])
        place += taken
    rows = [every[int((i + 0.5) * len(every) / 63)] for i in range(63)]
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor(rows), output_hidden_states=True).hidden_states[4]
    x = states.flatten(0, 1).double()
    arm = result["arms"][1]
    w = {name: value.double() for name, value in SAE.load_from_disk(folder / arm["path"]).state_dict().items()}
    centred = x - w["b_dec"]
    norm = centred.norm(dim=-1, keepdim=True)
    pre = norm ** (w["norm_exponent"] - 1) * (centred @ w["W_enc"]) + w["b_enc"]
    codes = pre * (pre > w["threshold"])
    error = x - codes @ w["W_dec"] - w["b_dec"]
    fve = 1 - error.var(0, correction=0).sum() / x.var(0, correction=0).sum()
    assert arm["fve"] == pytest.approx(fve.item(), abs=1e-4)


def test_arms_of_one_seed_share_their_start_and_seeds_differ(run):
    _, result, _ = run
    first = {(arm["architecture"], arm["seed"]): arm["training_log"][0]["fve"] for arm in result["arms"]}
    assert first[(ARMS[1], 0)] == pytest.approx(first[(ARMS[2], 0)], rel=1e-5)
    assert first[(ARMS[1], 0)] != first[(ARMS[1], 1)]


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    _, result, _ = run
    again = compare(ComparisonSettings(tokens=24_000, d_sae=128, k=8), tmp_path / "again")
    for arm, before in zip(again.arms, result["arms"], strict=False):
        assert (arm.reconstruction.fve, arm.reconstruction.l0) == (before["fve"], before["l0"])
        assert arm.ce_loss_recovered == before["ce_loss_recovered"]


def test_tables_and_picture(run):
    folder, result, printed = run
    for arm in ARMS:
        assert arm in printed
    assert "Difference to inner_product_batchtopk, paired by seed, 2 seeds" in printed
    assert "of 6 intervals leave out zero; without any true difference, about 0.3 would" in " ".join(printed.split())
    assert "10 times the" in printed
    mean = sum(arm["fve"] for arm in result["arms"] if arm["architecture"] == ARMS[1]) / 2
    assert f"{mean:.4f}±" in printed
    from PIL import Image

    with Image.open(folder / "comparison.png") as picture:
        assert picture.width > 1000
    page = (folder / "comparison.html").read_text()
    assert all(f'id="section-{part}"' in page for part in ("results", "differences", "training", "norms"))
    assert [path.name for path in sorted(folder.iterdir()) if path.name.startswith(".")] == [
        ".comparison-run",
        MANIFEST,
    ]


def test_it_refuses_to_overwrite_unless_told(run, capsys):
    folder, result, _ = run
    assert main(["compare", *TINY, "--output", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert json.loads((folder / "comparison.json").read_text()) == result


def test_overwrite_replaces_the_comparison_and_nothing_else_and_not_before_the_model_has_loaded(tmp_path, capsys):
    earlier, foreign = tmp_path / "cosine_batchtopk" / "seed7", tmp_path / "my_experiment" / "seed0"
    for folder in (earlier, foreign):
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text("{}")
    (tmp_path / "comparison.json").write_text("{}")
    outside, linked = tmp_path / "elsewhere", tmp_path / "cosine_standard"
    (outside / "seed0").mkdir(parents=True)
    linked.symlink_to(outside)
    mine = [earlier.with_name("seeds_of_mine") / "cfg.json", outside / "seed0" / "cfg.json"]
    mine += [tmp_path / "cosine_jumprelu" / "seed0" / name for name in ("notes.md", "cfg.json")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "thesis.txt").write_text("three years of work")
    command = ["compare", *TINY, "--arms", "cosine_topk", "--tokens", "12k", "--output", str(tmp_path), "--overwrite"]
    assert main([*command, "--layer", "17"]) == 2  # a typo costs nothing
    assert earlier.exists()
    assert main(command) == 0
    assert not earlier.exists()
    assert foreign.exists()
    assert [path.exists() for path in mine] == [True, True, True, False]
    assert linked.is_symlink()
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"
    assert json.loads((tmp_path / "comparison.json").read_text())["schema"] == SCHEMA


def test_an_output_that_cannot_be_written_is_named_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["compare", "--output", str(tmp_path / "file" / "below")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert main(["compare", "--output", str(tmp_path / "file")]) == 2
    assert "it is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "cosine_magic"], "Unknown architecture 'cosine_magic'"),
        (["--k", "200", "--d-sae", "100"], "k=200"),
        (["--tokens", "10"], "tokens=10"),
        (["--layer", "17"], "layer=17"),
        (["--hook", "blocks.0.hook_nowhere"], "hook_nowhere"),
        (["--max-norm-multiple", "0.5"], "max_norm_multiple=0.5"),
        (["--seeds", "0"], "seeds=0"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, capsys):
    assert main(["compare", *TINY, "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_dataset_is_named(tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("")
    options = ["--dataset", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["compare", *TINY, *options]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_interrupted_it_keeps_finished_seeds_and_leaves_nothing_half_written(tmp_path):
    folder = tmp_path / "out"
    seen = []

    def interrupt_in_the_second_seed(what, done, total):
        seen.append(what)
        if what.startswith("Training, seed 2") and done > total / 2:
            raise KeyboardInterrupt

    settings = ComparisonSettings(arms=("cosine_topk",), tokens=24_000, d_sae=128, k=8, seeds=2)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, folder, on_progress=interrupt_in_the_second_seed)
    assert sorted(path.name for path in folder.iterdir()) == [".comparison-run", MANIFEST, "cosine_topk"]
    assert [path.name for path in (folder / "cosine_topk").iterdir()] == ["seed0"]
    assert SAE.load_from_disk(folder / "cosine_topk" / "seed0").cfg.d_sae == 128


def test_ctrl_c_ends_the_command_with_a_checkpoint(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "saelens_cosine", "compare", "--tokens", "2M", "--d-sae", "128", "--k", "8"]
    hook = "blocks.0.mlp.hook_post"  # cheap, and so wide that few tokens fill the buffer
    command += ["--hook", hook, "--eval-tokens", "4k", "--output", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(folder.glob(".unfinished-*")) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(4)  # into the training, most likely
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert str(folder) in message
    assert "--resume" in message or "Interrupted" in message
    assert not list(folder.glob(".unfinished-*"))


def test_other_hooks_and_local_models_and_data(tmp_path):
    from saelens_cosine.bundled import model_folder

    texts = ["\n".join(f"def function_{i}(x): return x + {row}" for i in range(60)) for row in range(400)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    heads = compare(
        ComparisonSettings(arms=("cosine_batchtopk",), hook="blocks.1.attn.hook_z", tokens=10_000, d_sae=64, k=8),
        tmp_path / "heads",
    )
    assert heads.hooks[0].d_in == 192
    assert SAE.load_from_disk(tmp_path / "heads" / heads.arms[0].path).cfg.reshape_activations == "hook_z"
    settings = ComparisonSettings(
        arms=("batchtopk", "cosine_topk"),  # SAELens' own arm beside ours
        model=str(model_folder()),
        dataset=str(tmp_path / "code.jsonl"),
        recipe="saelens",
        max_norm_multiple=None,
        tokens=10_000,
        d_sae=64,
        k=8,
    )
    local = compare(settings, tmp_path / "local")
    assert local.hooks[0].hook_name == "model.layers.3"
    assert [arm.norm_exponent is None for arm in local.arms] == [True, False]
    assert all(math.isfinite(arm.reconstruction.fve) for arm in local.arms)


def test_planted_sinks_are_dropped_by_default_and_trained_on_if_asked(run, tmp_path):
    arguments = [*TINY, "--arms", "cosine_topk", "--tokens", "12k", "--plant-sinks", "--seeds", "1"]
    results = {}
    for multiple in ("10", "none"):
        folder = tmp_path / multiple
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(["compare", *arguments, "--max-norm-multiple", multiple, "--output", str(folder)]) == 0
        assert "a sink planted at the start of each context" in " ".join(printed.getvalue().split())
        results[multiple] = json.loads((folder / "comparison.json").read_text())
        assert results[multiple]["high_norm_tokens"]["planted"] is True
        sae = SAE.load_from_disk(folder / results[multiple]["arms"][0]["path"])
        assert sae.cfg.metadata.planted_sinks is True
    dropped = results["10"]["hooks"][0]
    # one token of each context of 128, and nothing else: no token of this model is 10 times as long as the median
    assert dropped["high_norm_share_dropped"] == pytest.approx(1 / 128, rel=1e-6)
    assert dropped["high_norm_share_dropped_heldout"] == pytest.approx(1 / 128, rel=0.05)
    assert results["none"]["hooks"][0]["high_norm_share_dropped"] == 0
    longest = {multiple: result["arms"][0]["fve_by_norm_quartile"][-1]["high"] for multiple, result in results.items()}
    assert longest["none"] > 5 * longest["10"]  # 300 times the median, at most 10 times
    assert not module._global_module_registration_hooks
    folder, plain, printed = run
    assert plain["high_norm_tokens"]["planted"] is False
    assert "planted" not in printed
    assert SAE.load_from_disk(folder / plain["arms"][0]["path"]).cfg.metadata.planted_sinks is None


def test_help_names_every_option_that_the_settings_have(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    options = "arms layer hook model dataset tokens k d-sae seeds recipe max-norm-multiple plant-sinks device output quiet overwrite"
    for option in options.split(" "):
        assert f"--{option}" in text
    assert Path("runs/compare").as_posix() in text
