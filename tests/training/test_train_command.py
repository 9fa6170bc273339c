import json
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features
from sae_lens import SAE, LanguageModelSAETrainingRunner

from saelens_cosine.cli import main

FLAGS = [
    *("--architecture", "cosine_batchtopk", "--model_name", "bundled", "--dataset_path", "bundled"),
    *("--hook_name", "blocks.3.hook_resid_post", "--d_in", "192", "--d_sae", "64", "--k", "8"),
    *("--training_tokens", "8192", "--train_batch_size_tokens", "1024", "--context_size", "128"),
    *("--log_to_wandb", "false"),
]


def test_saelens_flags_and_ours_train_an_sae_that_saelens_loads(tmp_path, capsys):
    status = main(
        ["train", *FLAGS, "--norm_exponent_init", "0.25", "--output_path", str(tmp_path / "sae"), "--seed", "3"]
    )
    assert status == 0
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.architecture() == "cosine_jumprelu"
    assert sae.norm_exponent.item() == pytest.approx(0.25, abs=0.02)  # 8 steps of 3e-4 from where it started
    assert sae.norm_exponent.item() != 0.25
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert metadata["max_norm_multiple"] == 10.0
    assert metadata["training_architecture"] == "cosine_batchtopk"
    assert (metadata["training_tokens"], metadata["train_batch_size_tokens"]) == (8192, 1024)
    assert metadata["lr"] == 3e-4  # SAELens' default
    assert "recipe" not in metadata
    told = capsys.readouterr().err
    assert "High-norm tokens dropped" in told
    assert f'Written: SAE.load_from_disk("{tmp_path / "sae"}")' in told
    again = ["train", *FLAGS, "--norm_exponent_init", "0.25", "--output_path", str(tmp_path / "sae"), "--seed", "3"]
    assert main([*again, "--resume"]) == 0
    assert "8192 is the end of the run: nothing was left to train." in capsys.readouterr().err


def test_help_is_saelens_own_with_our_architectures(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--architecture", "per_feature_cosine_topk", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--max-norm-multiple" in text
    assert "--lr_warm_up_steps" in text
    assert "--norm_exponent_init" in text
    assert "inner_product_batchtopk" in text


def test_help_tells_the_default_of_n_checkpoints_once_and_right(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    before, *about = re.split(r"^  --n_checkpoints int\s", capsys.readouterr().out, flags=re.MULTILINE)
    (about,) = about
    assert "--n_checkpoints is" not in before
    assert " ".join(about.partition("\n  --")[0].split()) == (
        "Checkpoints in the course of a run, beside the one at its end. (default: 10)"
    )


def test_the_module_of_the_commands_runs_them():
    command = [sys.executable, "-m", "saelens_cosine.cli", "compare", "--d-sae", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid int value: 'x'" in done.stderr


def test_an_unknown_architecture_is_answered_with_the_list(capsys):
    assert main(["train", "--architecture", "cosine_magic"]) == 2
    message = capsys.readouterr().err
    assert "'cosine_batchtopk'" in message
    assert message.count("\n") == 1


def test_a_wrong_d_in_names_both_sizes(capsys):
    flags = [flag if flag != "192" else "512" for flag in FLAGS]
    assert main(["train", *flags]) == 2
    message = capsys.readouterr().err
    assert "d_in=512" in message
    assert "192" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--d_in": "192", "--hook_head_index": "1"}, ("d_in=192", "head 1", "--d_in 48")),
        ({"--d_in": "48", "--hook_head_index": "4"}, ("hook_head_index=4", "4 heads, numbered from 0")),
        ({"--hook_name": "blocks.3.hook_resid_post", "--hook_head_index": "1"}, ("hook_head_index=1", "split by head")),
        ({"--hook_name": "blocks.9.attn.hook_z"}, ("no hook point 'blocks.9.attn.hook_z'",)),
        ({"--context_size": "512"}, ("context_size=512", "--context_size 256 or less")),
        ({"--model_from_pretrained_kwargs": '{"fold_ln": true}'}, ("fold_ln", "bundled")),
    ],
)
def test_what_does_not_fit_the_model_is_one_line_with_the_way_out(changes, said, capsys):
    assert main(["train", *with_flags({"--hook_name": "blocks.1.attn.hook_z", **changes})]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in said), message


def with_flags(changes):
    flags = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True)) | changes
    return [part for item in flags.items() for part in item]


def test_an_empty_dataset_is_named(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("")
    flags = [flag if flag != "bundled" or i < 4 else str(tmp_path / "data") for i, flag in enumerate(FLAGS)]
    assert main(["train", *flags]) == 2
    assert str(tmp_path / "data") in capsys.readouterr().err


def test_max_norm_multiple_takes_none(tmp_path):
    assert main(["train", *FLAGS, "--max-norm-multiple", "none", "--output_path", str(tmp_path / "sae")]) == 0
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert metadata["max_norm_multiple"] is None
    assert metadata["high_norm_share_dropped"] == 0


def test_cached_activations_of_the_bundled_corpus_train_an_sae_that_claims_no_held_out_text(tmp_path, monkeypatch):
    hook, shape = "blocks.3.hook_resid_post", (128, 192)
    features = Features({hook: Array2D(shape, "float32")})
    Dataset.from_dict({hook: [np.ones(shape, np.float32)] * 2}, features=features).save_to_disk(tmp_path / "cache")
    rules = []
    monkeypatch.setattr(
        LanguageModelSAETrainingRunner, "run", lambda runner: rules.append(runner.sae.cfg.metadata.heldout_rule)
    )
    cached = {"--use_cached_activations": "true", "--cached_activations_path": str(tmp_path / "cache")}
    assert main(["train", *with_flags(cached)]) == 0
    assert main(["train", *FLAGS]) == 0
    assert rules[0] is None
    assert "hash of the file's path" in rules[1]
