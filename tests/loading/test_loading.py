"""Foreign SAEs compute what their publishers' formulas compute, however they are loaded."""

import zipfile

import pytest
import torch
from foreign import D_IN, D_SAE, SOURCES, authors_file, write
from foreign_cases import activations, assert_computes
from helpers import codes_and_output
from sae_lens import SAE

from saelens_cosine.loading import (
    FORMATS,
    CheckpointError,
    authors_disk_loader,
    from_pretrained,
    sparsify_disk_loader,
    tensor_file,
)
from saelens_cosine.loading.formats import authors

# --- the same function, whichever way ---


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", [0, 1])
def test_computes_the_publishers_formula(source, seed, tmp_path):
    write(source, tmp_path, seed)
    sae = from_pretrained(tmp_path)
    assert isinstance(sae, SAE)
    assert sae.cfg.architecture() == SOURCES[source].architecture
    assert_computes(sae, source, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_through_saelens_own_loaders(source, hub):
    folder = write(source, hub / "owner" / "repo" / "some" / "layers.3")
    layout = FORMATS[SOURCES[source].format]
    for sae in (
        SAE.load_from_disk(folder, converter=layout.disk_loader),
        SAE.from_pretrained("owner/repo", "some/layers.3", converter=layout.huggingface_loader),
    ):
        assert_computes(sae, source, folder)


def test_overrides_of_saelens_win(tmp_path):
    write("standard", tmp_path)
    config, tensors = authors_disk_loader(tmp_path, cfg_overrides={"dtype": "float16", "apply_b_dec_to_input": False})
    assert config["dtype"] == "float16"
    assert config["apply_b_dec_to_input"] is False
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize("source", SOURCES)
def test_saved_and_loaded_again_by_saelens(source, tmp_path):
    write(source, tmp_path / "foreign")
    sae = from_pretrained(tmp_path / "foreign")
    sae.save_model(tmp_path / "saved")
    assert_computes(SAE.load_from_disk(tmp_path / "saved"), source, tmp_path / "foreign")
    assert from_pretrained(tmp_path / "saved").cfg.to_dict() == sae.cfg.to_dict()


@pytest.mark.parametrize("source", ["standard", "perfeature", "bypass", "BatchTopKSAE", "sparsify"])
def test_float64(source, tmp_path):
    sae = from_pretrained(write(source, tmp_path), dtype=torch.float64)
    assert sae.dtype == sae.W_enc.dtype == torch.float64
    assert_computes(sae, source, tmp_path, tolerance=1e-12)


@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_rounds_weights_but_no_exponents_or_thresholds_of_ours(source, tmp_path):
    exact = from_pretrained(write(source, tmp_path))
    sae = from_pretrained(tmp_path, dtype="bfloat16")
    assert torch.equal(sae.W_enc, exact.W_enc.to(torch.bfloat16))
    assert sae.cfg.dtype == "bfloat16"
    if "norm_exponent" in exact.state_dict():
        for name in ("norm_exponent", "threshold"):
            assert torch.equal(getattr(sae, name), getattr(exact, name))
            assert getattr(sae, name).dtype == torch.float32


FOLDED = tuple(
    name for name, source in SOURCES.items() if source.format == "authors" and source.architecture != "jumprelu"
)


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_in_bfloat16_stays_in_bfloat16_unless_weights_are_folded(source, tmp_path):
    write(source, tmp_path)
    narrow(tmp_path, SOURCES[source])
    sae = from_pretrained(tmp_path)
    assert sae.W_dec.dtype == (torch.float32 if source in FOLDED else torch.bfloat16)
    assert_computes(from_pretrained(tmp_path, dtype="float32"), source, tmp_path)


def narrow(folder, source):
    from safetensors.torch import load_file, save_file

    path = folder / source.weights
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        state = content.get("state_dict", content)
        state |= {key: value.bfloat16() for key, value in state.items() if value.is_floating_point()}
        torch.save(content, path)
    else:
        save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)


@pytest.mark.parametrize("source", ["global-a", "perfeature", "bypass"])
def test_encoder_is_the_file_s_rows_and_no_copy_is_made(source, tmp_path):
    sae = from_pretrained(write(source, tmp_path))
    assert sae.W_enc.shape == (D_IN, D_SAE)
    assert sae.W_enc.T.is_contiguous()


@pytest.mark.parametrize("source", SOURCES)
def test_files_larger_than_a_block(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)  # two of the 13 rows of 7 float32 at a time
    monkeypatch.setattr(authors, "FOLD_BLOCK", 3 * D_IN)
    sae = from_pretrained(write(source, tmp_path))
    assert_computes(sae, source, tmp_path)


# --- what the files mean, by hand ---


def hand_made(tmp_path, source, **tensors):
    content = authors_file(source, torch.Generator().manual_seed(0), d_in=2, d_sae=2)
    content["state_dict"] |= {key: torch.tensor(value) for key, value in tensors.items()}
    torch.save(content, tmp_path / "sae_final.pt")
    return from_pretrained(tmp_path)


def test_threshold_is_strict(tmp_path):
    identity, zeros = [[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]
    sae = hand_made(tmp_path, "standard", W_enc=identity, b_enc=zeros, b_dec=zeros, threshold=2.0)
    # a score of exactly 2 is not above 2
    assert sae.encode(torch.tensor([[2.0, 2.5]])).tolist() == [[0.0, 2.5]]


def test_score_of_a_per_feature_checkpoint_by_hand(tmp_path):
    # rows of lengths 5 and 2 count by direction: cosines of (8, 6) with (0.6, 0.8) and (1, 0) are 0.96 and 0.8
    # norm 10: 10^1 * e^0 * 0.96 + 1 = 10.6 and 10^0 * e^1 * 0.8 - 1 = 1.1746
    sae = hand_made(
        tmp_path,
        "perfeature",
        W_enc=[[3.0, 4.0], [2.0, 0.0]],
        b_enc=[1.0, -1.0],
        b_dec=[1.0, 1.0],
        scale_a=[1.0, 0.0],
        scale_b=[0.0, 1.0],
        threshold=0.5,
    )
    torch.testing.assert_close(sae.encode(torch.tensor([[9.0, 7.0]])), torch.tensor([[10.6, 1.1746255]]))


def test_groups_are_blocks_and_the_last_takes_the_rest(tmp_path):
    write("groups", tmp_path)
    state = torch.load(tmp_path / "sae_final.pt", weights_only=True)["state_dict"]
    a = state["scale_a"].tolist()
    exponent = from_pretrained(tmp_path).norm_exponent.tolist()
    assert exponent == [a[0]] * 4 + [a[1]] * 4 + [a[2]] * 5


def test_magnitude_bypass_restores_the_norm(tmp_path):
    sae = from_pretrained(write("bypass", tmp_path))
    x = activations(50)
    codes, output = codes_and_output(sae, x)
    fires = (codes != 0).any(-1)
    torch.testing.assert_close((output - sae.b_dec).norm(dim=-1)[fires], (x - sae.b_dec).norm(dim=-1)[fires])
    assert torch.equal(output[~fires], sae.b_dec.detach().expand(int((~fires).sum()), -1))


@pytest.mark.parametrize("source", ["standard", "perfeature", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_is_refused(source, tmp_path):
    write(source, tmp_path)
    path = tmp_path / SOURCES[source].weights
    content = torch.load(path, weights_only=True)
    content.get("state_dict", content)["threshold"] = torch.tensor(-1.0)
    torch.save(content, path)
    # what their code does with it: the authors' takes k of each evaluation batch, dictionary_learning's, whose scores are
    # rectified before they are compared with -1, all that are positive
    then = (
        "selects across the evaluation batch" if SOURCES[source].format == "authors" else "keeps every positive score"
    )
    with pytest.raises(CheckpointError, match=rf"threshold -1.* never set.* {then}.* [Ss]et"):
        from_pretrained(tmp_path)


def test_old_files_without_counter_or_k(tmp_path):
    write("perfeature", tmp_path / "authors")
    content = torch.load(tmp_path / "authors" / "sae_final.pt", weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "authors" / "sae_final.pt")
    assert_computes(from_pretrained(tmp_path / "authors"), "perfeature", tmp_path / "authors")

    write("AutoEncoderTopK", tmp_path / "topk")
    state = torch.load(tmp_path / "topk" / "ae.pt", weights_only=True)
    torch.save(
        {key: value for key, value in state.items() if key not in ("k", "threshold")}, tmp_path / "topk" / "ae.pt"
    )
    assert from_pretrained(tmp_path / "topk").cfg.k == 3


@pytest.mark.parametrize("source", ["perfeature", "MatryoshkaBatchTopKSAE"])
def test_a_file_saved_from_a_gpu_by_an_older_torch(source, tmp_path):
    # as the published ones may be: tensors are marked with their device, and the archive has no format version
    path = write(source, tmp_path) / SOURCES[source].weights
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            if not name.endswith((".format_version", ".storage_alignment")):
                archive.writestr(name, data)
    sae = from_pretrained(tmp_path)
    write(source, tmp_path)
    assert_computes(sae, source, tmp_path)


def test_saelens_own_converter_of_sparsify_files_fails(tmp_path):
    # the reason that this package has its own; when it passes, ours can go
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader as theirs

    folder = write("sparsify", tmp_path / "layers.3")
    with pytest.raises(RuntimeError, match="size mismatch for W_dec"):
        SAE.load_from_disk(folder, converter=theirs, dtype="float32")
    assert_computes(SAE.load_from_disk(folder, converter=sparsify_disk_loader), "sparsify", folder)


def test_converters_by_name_are_the_formats():
    assert authors_disk_loader == FORMATS["authors"].disk_loader
