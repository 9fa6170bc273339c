"""Options that cannot be run are one line with the way out, before anything is loaded for long or written."""

import pytest

from saelens_cosine.cli import main

TRAIN = {
    "architecture": "cosine_batchtopk",
    "model_name": "bundled",
    "dataset_path": "bundled",
    "hook_name": "blocks.3.hook_resid_post",
    "d_in": "192",
    "d_sae": "64",
    "k": "8",
    "training_tokens": "4096",
    "train_batch_size_tokens": "1024",
    "context_size": "128",
    "log_to_wandb": "false",
}
COMMANDS = {
    "compare": ["--tokens", "20k", "--d-sae", "64", "--k", "4", "--quiet"],
    "ground-truth": ["--samples", "2k", "--seeds", "1", "--quiet"],
    "evaluate": ["no-such-folder", "--quiet"],
    "benchmark": ["--quiet"],
    "share": ["no-such-folder", "--neuronpedia", "model/set", "--dry-run", "--quiet"],
}


def answer(command, arguments, capsys):
    """The one line on stderr, with exit status 2; what libraries say while they load the bundled model aside."""
    if command == "train":
        arguments = [*arguments, "--quiet"]
    try:
        status = main([command, *arguments])
    except SystemExit as stop:  # argparse's way
        status = stop.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line and not line.startswith(("Loading weights", "DeprecationWarning"))]
    assert line.startswith(f"saelens-cosine {command}: ")
    return line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training_tokens": "0"}, "training_tokens=0 must be positive; pass --training_tokens 1 or more"),
        ({"training_tokens": "-5"}, "training_tokens=-5"),
        ({"training_tokens": "nan"}, "--training_tokens: invalid int value: 'nan'"),
        ({"train_batch_size_tokens": "0"}, "--train_batch_size_tokens"),
        ({"train_batch_size_tokens": "-1"}, "train_batch_size_tokens=-1"),
        ({"n_batches_in_buffer": "0"}, "n_batches_in_buffer=0"),
        (
            {"n_batches_in_buffer": "4"},
            "pass --n_batches_in_buffer 8 or more, or --train_batch_size_tokens 512 or less",
        ),
        ({"store_batch_size_prompts": "0"}, "store_batch_size_prompts=0"),
        ({"n_checkpoints": "-1"}, "n_checkpoints=-1"),
        ({"context_size": "1"}, "context_size=1 must be 2 or more"),
        ({"context_size": "9999"}, "pass --context_size 256 or less"),
        ({"hook_name": "blocks.3.nope"}, "no hook point 'blocks.3.nope'"),
        ({"hook_name": "blocks.77.hook_resid_post"}, "6 blocks, numbered from 0"),
        ({"k": "0"}, "k=0"),
        ({"lr": "nan"}, "lr=nan"),
        ({"lr": "-1"}, "lr=-1"),
        ({"seed": "-1"}, "seed=-1"),
        ({"seed": "99999999999999999999"}, "seed=99999999999999999999"),
        ({"dtype": "float99"}, "float99"),
        ({"device": "cuda:977"}, "device='cuda:977' cannot be used"),
        ({"llm_device": "cuda:977"}, "llm_device='cuda:977' cannot be used"),
        ({"act_store_device": "banana"}, "act_store_device='banana' cannot be used"),
        ({"model_name": "gpt2-smal"}, "no model 'gpt2-smal'. Is 'gpt2-small' meant?"),
        ({"dataset_path": "no-such-file.jsonl"}, "no-such-file.jsonl"),
        ({"trainng_tokens": "5"}, "Is --training_tokens meant?"),
        ({"max-nrm-multiple": "5"}, "Is --max-norm-multiple meant?"),
        ({"max-norm-multiple": "inf"}, "max_norm_multiple=inf"),
    ],
)
def test_train(changes, said, tmp_path, capsys):
    chosen = {**TRAIN, "output_path": str(tmp_path / "runs" / "sae"), **changes}
    flags = [part for name, value in chosen.items() for part in (f"--{name}", value)]
    assert said in answer("train", flags, capsys)
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_trained_does_not_cost_the_checkpoints_that_it_would_overwrite(tmp_path, capsys):
    kept = tmp_path / "sae-checkpoints" / "1024" / "saelens_cosine"
    kept.mkdir(parents=True)
    chosen = {**TRAIN, "output_path": str(tmp_path / "sae"), "hook_name": "blocks.3.nope"}
    flags = [part for name, value in chosen.items() for part in (f"--{name}", value)]
    assert "no hook point" in answer("train", [*flags, "--overwrite"], capsys)
    assert kept.exists()


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        *((command, ["--device", "banana"], "device='banana' cannot be used") for command in COMMANDS),
        *((command, ["--device", "cuda:977"], "device='cuda:977' cannot be used") for command in COMMANDS),
        *(("compare", ["--tokens", value], value) for value in ("0", "-5", "nan", "1e400", "x")),
        *(("evaluate", ["--tokens", value], value) for value in ("0", "-5", "nan", "1e400")),
        *(("share", ["--tokens", value], value) for value in ("0", "-5", "nan", "1e400")),
        *(("share", ["--contexts", value], value) for value in ("0", "-5")),
        ("share", [], "no-such-folder"),
        ("evaluate", ["--hook", "nope"], "no-such-folder"),
        *(("ground-truth", ["--samples", value], value) for value in ("0", "nan", "1e400")),
        *(("compare", [f"--{name}", "0"], "0") for name in ("k", "d-sae", "seeds", "eval-tokens")),
        *(("compare", [f"--{name}", "-3"], "-3") for name in ("k", "d-sae", "seeds", "eval-tokens")),
        ("compare", ["--context-size", "1"], "context_size=1"),
        ("compare", ["--max-norm-multiple", "inf"], "max_norm_multiple=inf"),
        ("evaluate", ["--context-size", "1"], "context_size=1"),
        ("evaluate", ["--max-norm-multiple", "inf"], "max_norm_multiple=inf"),
        *(("ground-truth", ["--k", value], f"k={value}") for value in ("0", "-1", "nan")),
        *(("ground-truth", ["--d-sae", value], f"d_sae={value}") for value in ("0", "-4")),
        *(("ground-truth", ["--norm-spreads", value], value) for value in ("nan", "inf", "-1")),
        *(("ground-truth", [f"--{name}", "-1"], "-1") for name in ("seeds", "eval-samples")),
        *(("benchmark", [f"--{name}", "0"], "=0") for name in ("k", "d-in", "d-sae", "batch", "repeats")),
        ("benchmark", ["--k", "99999"], "k=99999"),
        *((command, ["--tokns", "5"], "--tokns") for command in COMMANDS),
    ],
)
def test_other_commands(command, options, said, tmp_path, capsys):
    place = ["--json", str(tmp_path / "out")] if command == "benchmark" else ["--output", str(tmp_path / "out")]
    assert said in answer(command, [*COMMANDS[command], *options, *place], capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hook", "blocks.3.nope"], "no hook point 'blocks.3.nope'"),
        (["--layer", "77"], "it has 6, numbered from 0"),
        (["--model", "no-such/model"], "Cannot load model 'no-such/model'"),
        (["--dataset", "no-such/data"], "Cannot load dataset 'no-such/data'"),
    ],
)
def test_what_only_the_model_and_the_text_can_tell(options, said, tmp_path, capsys, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Cannot reach the Hub.\nSee its documentation.")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("saelens_cosine.activations.models.load_model", unreachable)
    options = [*COMMANDS["compare"], *options, "--output", str(tmp_path / "out")]
    assert said in answer("compare", options, capsys)
