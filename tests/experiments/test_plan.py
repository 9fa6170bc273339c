"""`saelens-cosine plan`: every part by hand on a device of round numbers."""

import json
from dataclasses import replace

import pytest

from saelens_cosine.cli import main
from saelens_cosine.experiments.plan.arithmetic import best, fewest_gpus, plan, plans
from saelens_cosine.experiments.plan.model import model_size
from saelens_cosine.experiments.plan.settings import DEVICES, Cluster, Device, Training

GPU = Device(memory=1, bandwidth=1, flops=1, low_flops=4, link=2, node_link=0.5, latency=10, launches=3)
"""1 GB, 1 GB/s, 1 TFLOP/s, links of 2 and 0.5 GB/s, 10 microseconds, 3 ms of launches."""

SMALL = Training(
    d_in=100, d_sae=1000, k=10, tokens=5000, batch=50, buffer=10_000, model_parameters=1e6, model_dtype="float32"
)
"""100 steps of 50 tokens; two matrices of 100,000 weights, 800 kB together."""


def test_one_device_by_hand():
    found = plan(SMALL, Cluster(1, 8, GPU), "features")
    assert found.memory.parameters == found.memory.gradients == 800_000
    assert found.memory.moments == 1_600_000
    assert found.memory.scores == 50 * 1000 * 4
    assert found.memory.activations == 4 * 50 * 100 * 4
    assert found.memory.buffer == 10_000 * 100 * 4
    assert found.memory.language_model == 4e6
    times = found.times
    assert times.language_model == pytest.approx(2 * 1e6 * 50 / 0.5e12)
    assert times.product == pytest.approx(2 * 50 * 100 * 1000 / 1e12)
    assert times.selection == pytest.approx(6 * 50 * 1000 * 4 / 1e9)
    assert times.rows == pytest.approx(4 * (50 * 10) * 100 * 4 / 0.5e9)
    assert times.optimizer == pytest.approx(28 * 200_000 / 1e9)
    assert times.communication == 0
    assert times.launches == 3e-3
    assert found.hours == pytest.approx(100 * times.total / 3600)
    assert found.fits
    assert not plan(SMALL, Cluster(1, 8, replace(GPU, memory=0.005)), "features").fits


def test_low_precision_and_the_dense_formula_by_hand():
    low = plan(replace(SMALL, dtype="bfloat16", model_dtype="bfloat16"), Cluster(1, 8, GPU), "features")
    assert low.times.product == pytest.approx(2 * 50 * 100 * 1000 / 4e12)
    assert low.times.selection == pytest.approx(6 * 50 * 1000 * 2 / 1e9)
    assert low.memory.language_model == 2e6
    dense = plan(replace(SMALL, step="dense"), Cluster(1, 8, GPU), "features")
    assert dense.times.product == pytest.approx(6 * 2 * 50 * 100 * 1000 / 1e12)
    assert dense.times.selection == pytest.approx(20 * 50 * 1000 * 4 / 1e9)
    assert dense.times.rows == 0


def test_splits_over_a_node_by_hand():
    four = Cluster(4, 8, GPU)
    assert [one.split for one in plans(SMALL, four)] == ["features", "parameters", "replicas"]
    features, parameters, replicas = plans(SMALL, four)
    # features: a quarter of each matrix, all tokens; 20 kB of activations gathered, then summed
    assert features.memory.parameters == 200_000
    assert features.memory.checkpoint == 800_000  # one matrix, gathered and put together
    assert replicas.memory.checkpoint == parameters.memory.checkpoint == 0
    assert features.times.product == pytest.approx(2 * 50 * 100 * 250 / 1e12)
    assert features.times.gather == pytest.approx(0.75 * 20_000 / 2e9 + 1e-5)
    assert features.times.reduce == pytest.approx(1.5 * 20_000 / 2e9 + 1e-5)
    assert features.times.small == pytest.approx(14e-5)
    # parameters: gathered forward and backward, gradients scattered
    assert parameters.memory.moments == 400_000
    assert parameters.memory.parameters == 200_000 + 800_000
    assert parameters.times.gather == pytest.approx(0.75 * 2 * 800_000 / 2e9 + 2e-5)
    assert parameters.times.reduce == pytest.approx(0.75 * 800_000 / 2e9 + 1e-5)
    assert parameters.times.product == pytest.approx(2 * 12.5 * 100 * 1000 / 1e12)
    # replicas: everything everywhere, gradients averaged
    assert replicas.memory.moments == 1_600_000
    assert replicas.times.reduce == pytest.approx(1.5 * 800_000 / 2e9 + 1e-5)
    assert replicas.times.optimizer == pytest.approx(28 * 200_000 / 1e9)


def test_nodes_by_hand():
    found = {one.split: one for one in plans(SMALL, Cluster(8, 4, GPU))}
    nodes = found["nodes"]  # two nodes: a quarter of the features, half of the tokens
    assert nodes.memory.parameters == 200_000
    assert nodes.times.product == pytest.approx(2 * 25 * 100 * 250 / 1e12)
    assert nodes.times.gather == pytest.approx(0.75 * 10_000 / 2e9 + 1e-5)
    assert nodes.times.reduce == pytest.approx(1.5 * 10_000 / 2e9 + 1e-5 + 200_000 / 0.5e9 + 1e-5)
    features = found["features"]  # over both nodes, by the slower link
    assert features.memory.parameters == 100_000
    assert features.times.gather == pytest.approx(0.875 * 20_000 / 0.5e9 + 1e-5)


def test_the_fewest_and_the_best():
    # 800 MB of weights, four times that with gradients and moments; a checkpoint takes 800 MB for a moment
    training, cluster = replace(SMALL, d_sae=1_000_000, k=10), Cluster(1, 8, replace(GPU, memory=2))
    assert best(plans(training, cluster)) is None
    assert fewest_gpus(training, cluster) == 3
    assert best(plans(training, cluster.of(4))).split == "features"
    assert fewest_gpus(replace(training, model_parameters=1e9), cluster, most=16) is None  # 4 GB on each


@pytest.mark.parametrize(
    ("name", "d_model", "layers", "per_layer"),
    [
        ("bundled", 192, 6, None),
        ("llama", 64, 3, 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 160),  # four heads of 16, two of them keyed; gated
        ("gpt2", 48, 2, 4 * 48 * 48 + 2 * 48 * 192),
    ],
)
def test_sizes_of_language_models(name, d_model, layers, per_layer, tmp_path):
    from transformers import GPT2Config, LlamaConfig

    if name == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        LlamaConfig(hidden_size=64, num_hidden_layers=3, intermediate_size=160, **heads).save_pretrained(tmp_path)
    elif name == "gpt2":
        GPT2Config(n_embd=48, n_layer=2, n_head=4).save_pretrained(tmp_path)
    found = model_size("bundled" if name == "bundled" else str(tmp_path))
    assert (found.d_model, found.layers) == (d_model, layers)
    assert per_layer is None or found.per_layer == per_layer


def test_command(tmp_path, capsys):
    file = tmp_path / "plan.json"
    options = [
        "--d-in",
        "4096",
        "--d-sae",
        "65536",
        "--model-parameters",
        "3.5B",
        "--gpus",
        "1",
        "8",
        "16",
        "--json",
        str(file),
    ]
    assert main(["plan", *options]) == 0
    printed = capsys.readouterr().out
    assert "Assumed:" in printed
    content = json.loads(file.read_text())
    assert content["schema"] == "saelens-cosine/plan/1"
    assert [(one["gpus"], one["split"]) for one in content["plans"] if one["best"]] == [
        (1, "features"),
        (8, "features"),
        (16, "features"),
    ]
    assert content["plans"][0]["memory"]["parameters"] == 2 * 4096 * 65536 * 4
    assert "8 GPUs: split 'features', " in printed
    # 32 GB of weights, four times that with gradients and moments, and again for a checkpoint: four GPUs of 80 GB hold it
    assert main(["plan", "--d-in", "1000", "--d-sae", "4M", "--buffer", "1M", "--gpus", "1"]) == 0
    assert "1 GPUs: does not fit; 4 are the fewest" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Give --model"),
        (["--model", "bundled", "--layer", "6"], "layers 0 to 5"),
        (["--d-in", "64", "--k", "2000"], "k=2000"),
        (["--d-in", "64", "--gpus", "12"], "gpus=12 are no whole nodes of 8"),
        (["--d-in", "64", "--gpus", "0"], "gpus=0"),
        (["--d-in", "64", "--link", "0"], "link=0.0 must be positive"),
        (["--d-in", "64", "--tokens", "100"], "tokens=100"),
        (["--d-in", "0"], "d_in=0"),
    ],
)
def test_impossible_plans_are_refused(options, said, capsys):
    assert main(["plan", "--d-sae", "1000", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("d_in", "d_sae", "batch", "k", "measured"), [(2304, 65536, 4096, 64, 14.0), (768, 16384, 2048, 32, 6.2)]
)
def test_steps_that_were_measured_on_an_h200(d_in, d_sae, batch, k, measured):
    """docs/speed.md: milliseconds in bfloat16; a plan is to be within 30 %."""
    training = Training(d_in, d_sae, k, 10**9, batch, 10**6, 0, dtype="bfloat16")
    step = 1e3 * plan(training, Cluster(1, 8, DEVICES["h200"]), "features").times.total
    assert step == pytest.approx(measured, rel=0.3)
