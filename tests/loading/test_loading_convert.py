"""`saelens-cosine convert`, and that its verification can fail."""

import json
import shutil

import numpy as np
import pytest
import torch
from foreign import D_IN, D_SAE, SOURCES, formula, write
from helpers import make_activations, make_sae
from sae_lens import SAE
from safetensors.torch import save_file

from saelens_cosine.cli import main
from saelens_cosine.files.manifest import MANIFEST
from saelens_cosine.loading import CheckpointError, from_pretrained
from saelens_cosine.loading import command as command_module
from saelens_cosine.loading.command import convert
from saelens_cosine.loading.pretrained import locate
from saelens_cosine.loading.verify import verify


@pytest.mark.parametrize("source", SOURCES)
def test_converts_and_verifies(source, tmp_path):
    folder = write(source, tmp_path / "foreign")
    result = convert(folder, tmp_path / "out" / "sae", check=True)
    assert result.written
    assert result.architecture == SOURCES[source].architecture
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sae"]
    assert {path.name for path in (tmp_path / "out" / "sae").iterdir()} == {*command_module.FILES, MANIFEST}
    # the report against numbers worked out here, on activations of our own
    x = make_activations(200, D_IN, seed=3) * 3
    sae = SAE.load_from_disk(tmp_path / "out" / "sae")
    report = verify(locate(folder), sae, x)
    codes, output = formula(source, folder, x)
    with torch.no_grad():
        ours = sae.encode(x)
        off = ((ours - codes).abs().max() / codes.abs().max()).item()
        output_off = ((sae.decode(ours) - output).abs().max() / output.abs().max()).item()
    assert report.tokens == 200
    assert report.active == pytest.approx((codes != 0).sum().item() / 200)
    assert report.flips == 0
    assert report.codes_error == pytest.approx(off, abs=1e-12)
    assert report.output_error == pytest.approx(output_off, abs=1e-12)
    assert report.agrees
    assert 0 < report.codes_error < 1e-6


@pytest.mark.parametrize("source", SOURCES)
def test_random_activations_make_features_fire(source, tmp_path):
    folder = write(source, tmp_path)
    report = verify(locate(folder), from_pretrained(folder), tokens=64)
    assert report.tokens == 64
    assert 0.5 < report.active < D_SAE


@pytest.mark.parametrize("source", ["standard", "perfeature", "bypass", "BatchTopKSAE", "GatedAutoEncoder", "sparsify"])
@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "b_dec"])
def test_verification_notices_changed_weights(source, tensor, tmp_path):
    folder = write(source, tmp_path)
    sae = from_pretrained(folder)
    getattr(sae, tensor).data[..., 3] += 0.01
    assert not verify(locate(folder), sae).agrees


def test_verification_notices_a_threshold_and_no_activity(tmp_path):
    folder = write("perfeature", tmp_path)
    sae = from_pretrained(folder)
    sae.threshold.data.mul_(1.02)
    report = verify(locate(folder), sae, tokens=2000)
    assert report.flips > 0
    assert 1e-5 < report.flip_margin < 0.02
    assert not report.agrees
    silent = verify(locate(folder), from_pretrained(folder), torch.zeros(3, D_IN) + from_pretrained(folder).b_dec.data)
    assert silent.active == 0
    assert not silent.agrees


def test_verification_of_a_narrow_dtype(tmp_path):
    folder = write("perfeature", tmp_path)
    report = verify(locate(folder), from_pretrained(folder, dtype="bfloat16"))
    assert report.agrees
    assert 1e-4 < report.codes_error < report.tolerance == 8 * 2**-7


def test_nothing_is_written_when_they_differ(tmp_path, monkeypatch, capsys):
    folder = write("perfeature", tmp_path / "foreign")
    real = command_module.load

    def wrong(*arguments, **options):
        sae = real(*arguments, **options)
        sae.norm_exponent.data.add_(0.01)
        return sae

    monkeypatch.setattr(command_module, "load", wrong)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    assert main(["convert", str(folder), str(tmp_path / "out"), "--verify", "--overwrite"]) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "out"]
    assert "do not agree" in capsys.readouterr().out


def test_an_existing_destination(tmp_path, capsys):
    folder, out = write("standard", tmp_path / "foreign"), tmp_path / "out"
    out.mkdir()
    (out / ".saelens-cosine.lock").touch()  # of a run that was killed
    (out / ".unfinished-0123456789abcdef-work").mkdir()
    assert main(["convert", str(folder), str(out)]) == 0
    shutil.rmtree(out)
    out.mkdir()
    (out / "kept").touch()
    assert main(["convert", str(folder), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["kept"]
    assert main(["convert", str(folder), str(out), "--overwrite"]) == 0
    assert SAE.load_from_disk(out).cfg.architecture() == "jumprelu"
    assert (out / "kept").exists()  # nobody said that it is an SAE
    first = (out / "sae_weights.safetensors").read_bytes()
    other = write("global-a", tmp_path / "other")
    assert main(["convert", str(other), str(out), "--overwrite"]) == 0
    assert (out / "sae_weights.safetensors").read_bytes() != first
    assert {path.name for path in out.iterdir()} == {*command_module.FILES, MANIFEST, "kept"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "other", "out"]


@pytest.mark.parametrize("name", command_module.FILES)
def test_an_sae_that_somebody_has_changed_is_never_replaced(name, tmp_path, capsys):
    folder, out = write("standard", tmp_path / "foreign"), tmp_path / "out"
    convert(folder, out)
    (out / name).write_bytes((out / name).read_bytes() + b" ")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main(["convert", str(folder), str(out), "--overwrite"]) == 2
    assert f"{out / name} is not as this package wrote it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_an_sae_of_an_earlier_version_is_replaced_and_half_of_one_is_not(tmp_path, capsys):
    folder, out = write("standard", tmp_path / "foreign"), tmp_path / "out"
    convert(folder, out)
    (out / MANIFEST).unlink()
    assert main(["convert", str(folder), str(out), "--overwrite"]) == 0
    (out / MANIFEST).unlink()
    (out / "sae_weights.safetensors").unlink()
    assert main(["convert", str(folder), str(out), "--overwrite"]) == 2
    assert "cfg.json" in capsys.readouterr().err


def test_the_source_is_never_replaced(tmp_path):
    folder = write("standard", tmp_path / "foreign")
    for destination in (folder, tmp_path):
        with pytest.raises(ValueError, match="would be lost"):
            convert(folder, destination, overwrite=True)
    assert (folder / "sae_final.pt").is_file()


def test_a_damaged_source_leaves_nothing(tmp_path, capsys):
    folder = write("standard", tmp_path / "foreign")
    path = folder / "sae_final.pt"
    path.write_bytes(path.read_bytes()[:-200])
    assert main(["convert", str(folder), str(tmp_path / "deep" / "out")]) == 2
    assert str(path) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]


def test_command_line(tmp_path, capsys):
    write("standard", tmp_path / "foreign" / "standard")
    write("perfeature", tmp_path / "foreign" / "perfeature")
    out = tmp_path / "out"
    options = ["--sae-id", "perfeature", "--model-name", "gpt2", "--hook-name", "blocks.6.hook_resid_post"]
    assert main(["convert", str(tmp_path / "foreign"), str(out), *options, "--dtype", "float64", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "256 tokens" in printed
    assert f'per_feature_cosine_jumprelu written: SAE.load_from_disk("{out}")' in printed
    config = json.loads((out / "cfg.json").read_text())
    assert config["dtype"] == "float64"
    assert config["metadata"]["model_name"] == "gpt2"
    assert config["metadata"]["hook_name"] == "blocks.6.hook_resid_post"
    assert main(["convert", str(tmp_path / "foreign")]) == 2
    assert "destination" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npy"])
def test_given_activations(suffix, tmp_path, capsys):
    folder = write("perfeature", tmp_path / "foreign")
    x = make_activations(2, 5, D_IN) * 3
    path = tmp_path / f"x{suffix}"
    {
        ".pt": lambda: torch.save(x, path),
        ".safetensors": lambda: save_file({"x": x}, path),
        ".npy": lambda: np.save(path, x.numpy()),
    }[suffix]()
    assert main(["convert", str(folder), str(tmp_path / "out"), "--activations", str(path)]) == 0
    assert "10 tokens" in capsys.readouterr().out


def test_activations_that_do_not_fit(tmp_path, capsys):
    folder = write("perfeature", tmp_path / "foreign")
    for content, message in (
        (torch.zeros(3, 8), "size 8.*d_in=7"),
        ({"a": 1}, "one tensor"),
        (torch.zeros(3).int(), "float"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            convert(
                folder, tmp_path / "out", check=True, activations=command_module._read_activations(tmp_path / "x.pt")
            )
    assert not (tmp_path / "out").exists()


def test_saelens_format_is_written_and_cannot_be_verified(tmp_path):
    make_sae("cosine_batchtopk").save_inference_model(tmp_path / "sae")
    assert convert(tmp_path / "sae", tmp_path / "out").architecture == "cosine_jumprelu"
    with pytest.raises(CheckpointError, match="no other formula"):
        convert(tmp_path / "sae", tmp_path / "again", check=True)
    assert not (tmp_path / "again").exists()


def test_list(capsys):
    assert main(["convert", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "Silen/cosine-scored-saes-qwen3-8b" in printed
    for sae_id in ("global-a", "perfeature", "resid_post_layer_27/trainer_3"):
        assert sae_id in printed
    assert "not seen" in printed
