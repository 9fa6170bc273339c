"""What the README says is what happens."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import saelens_cosine
from saelens_cosine.cli import main
from saelens_cosine.experiments.compare.run import compare
from saelens_cosine.experiments.compare.settings import ComparisonSettings
from saelens_cosine.experiments.evaluate.evals import EVALS
from saelens_cosine.loading import RELEASES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def block(language: str, containing: str) -> str:
    (found,) = [text for text in blocks(language) if containing in text]
    return found


def test_ci_runs_the_readmes_test_command():
    commands = block("bash", "pytest").strip().splitlines()
    assert commands[1:] == [
        'pip install ".[test]" torch==2.13.0',
        "pip install --no-deps sae-bench==0.6.0 sae-probes==0.4.2",
        "OMP_NUM_THREADS=1 python -m pytest",
    ]
    script = (ROOT / ".ci" / "run").read_text()
    for command in commands[1:]:
        assert command in script.replace("pip install --quiet", "pip install")


def test_the_first_command_is_the_default_comparison():
    assert block("bash", "saelens-cosine compare").strip().splitlines()[-1] == "saelens-cosine compare"


def test_the_table_of_evals_is_complete():
    section = README.split("## Evaluate")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[a-z_` ]+`) \|", section, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(EVALS)


def test_the_tables_of_architectures_are_complete_and_right():
    section = README.split("## Architectures")[1].split("\n## ")[0]
    scores = re.findall(r"`(\w+)_<selector>`", section)
    suffixes: dict[str, str] = {}
    for first, last in re.findall(r"^\| (`[a-z_`, ]+) \| [^|]* \| (`\.\.\._[^|]*) \|$", section, re.M):
        selectors, saved = re.findall(r"`(\w+)`", first), re.findall(r"`\.\.\._(\w+)`", last)
        suffixes |= dict(zip(selectors, saved * (len(selectors) // len(saved)), strict=True))
    others = set(re.findall(r"`(magnitude_bypass_\w+|top_afa)`", section))
    named = {f"{score}_{selector}" for score in scores for selector in suffixes} | others
    assert named == set(saelens_cosine.TRAINING_ARCHITECTURES)
    for score in scores:
        for selector, suffix in suffixes.items():
            settings = {"matryoshka_widths": [8, 128]} if "matryoshka" in selector else {}
            config = SAE_TRAINING_CLASS_REGISTRY[f"{score}_{selector}"][1](d_in=4, d_sae=128, **settings)
            saved_as = suffix if score == "inner_product" else f"{score}_{suffix}"
            assert config.get_inference_config_class().architecture() == saved_as


def test_options_in_the_readme_are_fields():
    section = README.split("Options of every arm")[1].split("\n\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("|")]
    known = {field.name for field in fields(saelens_cosine.PerFeatureCosineBatchTopKTrainingSAEConfig)}
    named = {name for row in rows for name in re.findall(r"`(\w+)(?:=[^`]*)?`", row.split("|")[2])}
    assert len(named) > 12
    assert named <= known


def test_the_train_command_parses_in_saelens():
    words = shlex.split(block("bash", "saelens-cosine train").replace("\\\n", " "))
    assert words[:2] == ["saelens-cosine", "train"]
    config = _parse_cfg_args([word.replace("_000", "000") for word in words[2:]])
    assert config.sae.architecture() == "cosine_batchtopk"
    assert config.n_batches_in_buffer * config.context_size >= config.train_batch_size_tokens


def test_flags_of_compare_in_the_readme_exist(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    reading = README.split("## Compare on your machine")[1].split("## Run the tests")[0]
    flags = set(re.findall(r"--[a-z-]+", reading)) - {"--help"}
    assert {"--arms", "--seeds", "--max-norm-multiple", "--model"} <= flags
    assert [flag for flag in flags if flag not in text] == []


@pytest.mark.parametrize("command", ["convert", "share", "evaluate"])
def test_flags_of_other_commands_in_the_readme_exist(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    lines = [line.split("#")[0] for text in blocks("bash") for line in text.splitlines() if f"cosine {command}" in line]
    flags = {flag for line in lines for flag in re.findall(r"--[a-z-]+", line)}
    assert len(flags) >= 2
    assert [flag for flag in flags if flag not in text] == []


def test_short_names_in_the_readme_exist():
    named = re.findall(
        r'from_pretrained\([^"]*"([\w./-]+)",\s*"([\w./-]+)"', block("python", "cosine-scored-saes-qwen3-8b")
    )
    assert len(named) == 2
    by_repository = {release.repo_id: release for release in RELEASES.values()}
    for source, sae_id in named:
        release = RELEASES.get(source) or by_repository[source]
        assert sae_id in release.saes or sae_id in {sae.folder for sae in release.saes.values()}


def test_an_sae_is_read_by_cosine_as_the_readme_shows():
    from helpers import make_activations, make_sae

    names = {
        "saelens_cosine": saelens_cosine,
        "sae": make_sae("inner_product_topk"),
        "activations": make_activations(64, 7),
    }
    exec(block("python", "rescore("), names)
    assert names["read_by_cosine"].cfg.architecture() == "cosine_topk"


def test_snippets_load_hook_and_configure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ComparisonSettings(
        arms=("per_feature_cosine_batchtopk",), tokens=12_000, d_sae=64, k=4, eval_tokens=3000, eval_prompts=16
    )
    compare(settings, "runs/compare")
    names = {"activations": torch.randn(5, 192)}
    exec(block("python", "SAE.load_from_disk"), names)
    assert names["codes"].shape == (5, 64)
    assert names["reconstruction"].shape == (5, 192)
    exec(block("python", "load_bundled_model"), names)
    assert names["codes"].shape[0] == 1
    assert names["codes"].shape[2] == 64
    configuration = block("python", "runner_config(").split("runner = ")[0]
    exec(configuration, names)
    assert names["config"].sae.architecture() == "per_feature_cosine_batchtopk"


def test_a_third_partys_score_trains_as_the_readme_shows():
    from sae_lens.saes.sae import TrainStepInput

    names: dict = {}
    try:
        exec(block("python", "register_training("), names)
        sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY["l1_topk"]
        sae = sae_class(config_class(d_in=6, d_sae=12, k=3))
        x = torch.randn(8, 6)
        output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
        output.loss.backward()
        # b_dec and b_enc are 0 at the start
        nearer = x.abs().sum(dim=1, keepdim=True) - (x[:, :, None] - sae.W_enc[None]).abs().sum(dim=1)
        torch.testing.assert_close(sae.score(x), nearer)
        assert sae.W_enc.grad.abs().sum() > 0
    finally:
        SAE_TRAINING_CLASS_REGISTRY.pop("l1_topk", None)
        if "l1_topk" in saelens_cosine.TRAINING_ARCHITECTURES:
            saelens_cosine.TRAINING_ARCHITECTURES.remove("l1_topk")
