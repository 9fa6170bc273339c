import json

import pytest
from sae_lens.synthetic import ConstantFiringProbabilityConfig, SyntheticModel, SyntheticModelConfig

from saelens_cosine.cli import main
from saelens_cosine.experiments.ground_truth import command as ground_truth_command
from saelens_cosine.experiments.ground_truth.planted import small_model
from saelens_cosine.experiments.ground_truth.run import ground_truth
from saelens_cosine.experiments.ground_truth.settings import SYNTH_SAE_BENCH_16K, GroundTruthSettings

COMMAND = [
    "ground-truth",
    "--arms",
    "inner_product_batchtopk",
    "cosine_topk",
    "--samples",
    "2k",
    "--norm-spreads",
    "0.5",
]
COMMAND += ["--seeds", "2", "--eval-samples", "500", "--sink-share", "0.05", "--d-sae", "20", "--k", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A synthetic model of 12 features in 12 dimensions."""
    path = tmp_path_factory.mktemp("model")
    firing = ConstantFiringProbabilityConfig(probability=1 / 6)
    SyntheticModel(SyntheticModelConfig(num_features=12, hidden_dim=12, firing_probability=firing, seed=3)).save(path)
    return str(path)


def test_it_runs_prints_and_writes_what_was_asked_for(folder, tmp_path, capfd):
    assert main([*COMMAND, "--model", folder, "--output", str(tmp_path / "a" / "b"), "--quiet"]) == 0
    printed, errors = capfd.readouterr()
    assert errors == ""  # neither our progress bars nor SAELens'
    assert printed.count("Recovery of known features, mean ± sd over 2 seeds") == 2
    assert printed.count("500 samples without sinks") == printed.count("500 samples with sinks") == 1
    assert [path.name for path in (tmp_path / "a" / "b").glob("[!.]*")] == ["ground_truth.json"]
    result = json.loads((tmp_path / "a" / "b" / "ground_truth.json").read_text())
    asked = {"samples": 2000, "norm_spreads": [0.5], "seeds": 2, "eval_samples": 500, "sink_share": 0.05, "d_sae": 20}
    asked |= {"k": 3.0, "train_on_sinks": False, "recipe": "paper", "device": "cpu", "model": folder}
    assert result["settings"] == {**asked, "arms": COMMAND[2:4], "batch": 512}
    assert [(run["architecture"], run["seed"]) for run in result["runs"]] == [
        (a, s) for s in (0, 1) for a in COMMAND[2:4]
    ]
    mcc = sum(run["without_sinks"]["mcc"] for run in result["runs"][1::2]) / 2
    assert f"{mcc:.3f}±" in printed


def test_without_sinks_there_is_no_table_of_them_and_the_rest_of_the_options_arrive(
    folder, tmp_path, capsys, monkeypatch
):
    asked = []

    def once(settings, progress):
        asked.append(settings)
        return ground_truth(settings, progress)

    monkeypatch.setattr(ground_truth_command, "ground_truth", once)
    command = [
        "ground-truth",
        "--arms",
        "cosine_topk",
        "--model",
        folder,
        "--samples",
        "1024",
        "--norm-spreads",
        "0",
        "1",
    ]
    command += ["--seeds", "1", "--eval-samples", "100", "--recipe", "saelens", "--train-on-sinks"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    printed, errors = capsys.readouterr()
    assert "with sinks" not in printed
    assert f"Written to {tmp_path}: ground_truth.json" in printed
    assert "Training cosine_topk, seed 0" in errors
    (settings,) = asked
    assert (settings.recipe, settings.train_on_sinks, settings.norm_spreads) == ("saelens", True, (0.0, 1.0))
    assert (settings.d_sae, settings.k, settings.device) == (None, None, "cpu")


def test_defaults_are_those_of_the_settings_with_the_small_model(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def stop(settings, progress):
        raise Asked(settings)

    monkeypatch.setattr(ground_truth_command, "ground_truth", stop)
    with pytest.raises(Asked) as asked:
        main(["ground-truth", "--output", str(tmp_path)])
    assert asked.value.args == (GroundTruthSettings(model=small_model()),)


def test_it_refuses_to_overwrite_unless_told(folder, tmp_path, capsys):
    (tmp_path / "ground_truth.json").write_text("{}")
    command = ["ground-truth", "--arms", "cosine_topk", "--model", folder, "--samples", "1024", "--norm-spreads", "0"]
    command += ["--seeds", "1", "--eval-samples", "100", "--output", str(tmp_path), "--quiet"]
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "ground_truth.json").read_text() == "{}"
    assert main([*command, "--overwrite"]) == 0
    assert len(json.loads((tmp_path / "ground_truth.json").read_text())["runs"]) == 1


def test_interrupted_it_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    def interrupt(settings, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(ground_truth_command, "ground_truth", interrupt)
    assert main([*COMMAND, "--model", folder, "--output", str(tmp_path), "--quiet"]) == 130
    assert "Nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--arms", "cosine_magic"], "Unknown architecture 'cosine_magic'"),
        (["--norm-spreads", "-1"], "none below 0"),
        (["--sink-share", "0.7"], "sink_share=0.7"),
        (["--samples", "100"], "samples=100"),
    ],
)
def test_bad_input_is_named(options, message, tmp_path, capsys):
    assert main(["ground-truth", "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["ground-truth", "--output", str(tmp_path / "file")]) == 2
    assert f"Cannot write to {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_clear_line(tmp_path, capfd):
    assert main(["ground-truth", "--model", SYNTH_SAE_BENCH_16K, "--quiet", "--output", str(tmp_path)]) == 2
    printed, errors = capfd.readouterr()
    assert printed == ""
    (line,) = errors.splitlines()
    assert f"saelens-cosine ground-truth: Cannot load the synthetic model '{SYNTH_SAE_BENCH_16K}'" in line
    assert "as a folder or as a name on the Hub" in line
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["ground-truth", "--help"])
    text = capsys.readouterr().out
    options = (
        "arms model norm-spreads seeds samples d-sae k sink-share train-on-sinks eval-samples recipe device output"
    )
    for option in (*options.split(" "), "overwrite", "quiet"):
        assert f"--{option}" in text
    assert SYNTH_SAE_BENCH_16K in text.replace("\n", "").replace(" ", "")
