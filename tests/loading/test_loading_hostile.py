"""Foreign files are data: whatever is in them, loading succeeds with what the file says or raises `CheckpointError`."""

import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
from foreign import D_IN, D_SAE, SOURCES, write

from saelens_cosine.loading import CheckpointError, from_pretrained, reading
from saelens_cosine.loading.reading import open_pt, open_safetensors
from saelens_cosine.loading.tensor_file import read_config


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        from_pretrained(folder)
    assert str(folder) in str(caught.value) or folder.name in str(caught.value)


def change(folder, source, **changes):
    """Rewrite the weights with some tensors replaced; None removes one."""
    path = folder / SOURCES[source].weights
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file, save_file

        state = load_file(path)
    else:
        content = torch.load(path, weights_only=True)
        state = content.get("state_dict", content)
    for name, value in changes.items():
        state.pop(name) if value is None else state.__setitem__(name, value)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(content, path)


# --- what is wrong is said ---

ONE_OF_EACH = ["perfeature", "bypass", "BatchTopKSAE", "AutoEncoderTopK", "sparsify"]


@pytest.mark.parametrize("source", ONE_OF_EACH)
def test_missing_and_unknown_tensors(source, tmp_path):
    write(source, tmp_path)
    change(tmp_path, source, b_dec=None)
    refused(tmp_path, r"missing \['(state_dict/)?b_dec'\]")
    write(source, tmp_path)
    change(tmp_path, source, surplus=torch.zeros(3))
    refused(tmp_path, r"not known \['(state_dict/)?surplus'\]")


@pytest.mark.parametrize("source", ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(D_IN + 1,), (D_IN, 1), (), (0,)])
def test_wrong_shapes(source, shape, tmp_path):
    write(source, tmp_path)
    change(tmp_path, source, b_dec=torch.zeros(shape))
    refused(tmp_path, "b_dec")


@pytest.mark.parametrize("source", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_wrong_dtypes(source, dtype, tmp_path):
    write(source, tmp_path)
    change(tmp_path, source, b_dec=torch.zeros(D_IN).to(dtype))
    refused(tmp_path, "b_dec|ComplexFloat|C64")


@pytest.mark.parametrize("source", ONE_OF_EACH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["b_dec", "encoder"])
def test_values_that_are_not_finite(source, bad, name, tmp_path):
    write(source, tmp_path)
    name = {"b_dec": "b_dec", "encoder": "W_enc" if SOURCES[source].format == "authors" else "encoder.weight"}[name]
    value = torch.ones(D_IN) if name == "b_dec" else torch.ones(D_SAE, D_IN)
    value.view(-1)[-1] = bad
    change(tmp_path, source, **{name: value})
    refused(tmp_path, rf"{name}.* not finite")


def test_a_scale_beyond_float32(tmp_path):
    write("perfeature", tmp_path)
    change(tmp_path, "perfeature", scale_b=torch.full((D_SAE,), 100.0))  # e^100 = 2.7e43
    refused(tmp_path, "scale_b in .* goes up to 100")


@pytest.mark.parametrize(
    ("source", "name", "value"),
    [
        ("perfeature", "b_enc", 3),
        ("perfeature", "scale_b", torch.zeros(())),
        ("perfeature", "scale_b", None),
        ("global-a", "scale_a", torch.zeros(1, 1)),
        ("global-a", "scale_a", torch.zeros(D_SAE + 1)),
        ("base-delta", "scale_b", torch.zeros(())),
        ("standard", "threshold", torch.zeros(D_SAE)),
        ("standard", "threshold", None),
    ],
)
def test_score_tensors_that_belong_to_no_variant(source, name, value, tmp_path):
    write(source, tmp_path)
    change(tmp_path, source, **{name: value})
    refused(tmp_path, "scale_|threshold|b_enc")


@pytest.mark.parametrize(
    ("source", "field", "value", "match"),
    [
        ("BatchTopKSAE", "dict_size", D_SAE + 1, "encoder.weight.*expected"),
        ("BatchTopKSAE", "dict_size", 10**15, "encoder.weight.*expected"),
        ("BatchTopKSAE", "activation_dim", -7, "'activation_dim'.*-7.*positive integer"),
        ("BatchTopKSAE", "activation_dim", True, "positive integer"),
        ("BatchTopKSAE", "dict_class", "os.system", "dict_class='os.system'.*known are"),
        ("BatchTopKSAE", "dict_class", "GatedAutoEncoder", "missing.*'r_mag'"),
        ("AutoEncoderTopK", "k", D_SAE + 1, "k=3.*k=14"),
        ("AutoEncoderTopK", "k", 4, "k=3.*config k=4"),
        ("sparsify", "num_latents", 10**15, r"shape \[13, 7\]; expected \[10{15}, 7\]"),
        ("sparsify", "num_latents", 0, r"shape \[13, 7\]; expected \[224, 7\]"),  # 32 * 7
        ("sparsify", "k", 0, "'k'.* positive integer"),
        ("sparsify", "k", D_SAE + 1, "k=14 for 13 features"),
        ("sparsify", "d_in", None, "positive integer"),
        ("sparsify", "activation", "groupmax", "groupmax"),
        ("sparsify", "transcode", True, "transcoder"),
        ("sparsify", "skip_connection", True, "skip"),
    ],
)
def test_configs_that_disagree_with_the_weights(source, field, value, match, tmp_path):
    write(source, tmp_path)
    path = tmp_path / ("cfg.json" if source == "sparsify" else "config.json")
    config = json.loads(path.read_text())
    config.get("trainer", config)[field] = value
    path.write_text(json.dumps(config))
    refused(tmp_path, match)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '"x"', "[" * 100_000, '{"a": ' * 2000, "1" * 5000, "\x00", '{"trainer": 3}']
)
@pytest.mark.parametrize("source", ["BatchTopKSAE", "sparsify"])
def test_configs_that_are_none(source, text, tmp_path):
    write(source, tmp_path)
    path = tmp_path / ("cfg.json" if source == "sparsify" else "config.json")
    path.write_text(text)
    refused(tmp_path, path.name)


def test_a_config_of_a_gigabyte_is_not_read(tmp_path):
    write("sparsify", tmp_path)
    with (tmp_path / "cfg.json").open("wb") as file:
        file.truncate(2**30)  # sparse
    refused(tmp_path, "1,073,741,824 bytes")


def test_a_backup_of_training_is_refused(tmp_path):
    write("BatchTopKSAE", tmp_path)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save({"step": 3, "ae": state, "optimizer": {"state": {0: {}}}, "norm_factor": 2.0}, tmp_path / "ae.pt")
    refused(tmp_path, "made during training")


def test_a_view_of_a_larger_tensor_is_refused(tmp_path):
    write("standard", tmp_path)
    change(tmp_path, "standard", b_dec=torch.zeros(100)[:D_IN])
    refused(tmp_path, "clone")


def test_a_tensor_that_reads_its_storage_twice_is_refused(tmp_path):
    # as many elements as its storage, but [[0, 1], [1, 2]] of them
    write("standard", tmp_path)
    state = {"W_enc": torch.arange(4.0).as_strided((2, 2), (1, 1)), "W_dec": torch.zeros(2, 2)}
    change(tmp_path, "standard", **state)
    refused(tmp_path, "W_enc.*does not fill its storage")


@pytest.mark.parametrize("source", ["standard", "sparsify"])
def test_a_file_that_shrinks_while_it_is_read(source, tmp_path):
    path = write(source, tmp_path, d_in=256, d_sae=1024) / SOURCES[source].weights  # more than a file object buffers
    with (open_pt if path.suffix == ".pt" else open_safetensors)(path) as file:
        os.truncate(path, 2**20 + 2**18)
        last = max(file.records, key=lambda name: (file.records[name].nbytes, file.records[name].start))
        with pytest.raises(CheckpointError, match="cut off"):
            file.read(last)


# --- nothing is executed, nothing is allocated on the file's word ---


class Payload:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("place", ["value", "tensor", "whole"])
def test_code_in_a_pickle_is_not_run(place, tmp_path):
    write("perfeature", tmp_path)
    marker = tmp_path / "ran"
    payload = Payload(os.system, f"touch {marker}")
    content = torch.load(tmp_path / "sae_final.pt", weights_only=True)
    if place == "value":
        content["step"] = payload
    elif place == "tensor":
        content["state_dict"]["W_enc"] = payload
    else:
        content = payload
    torch.save(content, tmp_path / "sae_final.pt")
    refused(tmp_path, r"asks for '(posix|nt)\.system'")
    assert not marker.exists()


def test_code_is_not_run_by_torch_either(tmp_path, monkeypatch):
    # the second lock, with the first one open
    write("perfeature", tmp_path)
    marker = tmp_path / "ran"
    content = torch.load(tmp_path / "sae_final.pt", weights_only=True)
    torch.save({**content, "step": Payload(os.system, f"touch {marker}")}, tmp_path / "sae_final.pt")
    monkeypatch.setattr(reading, "_GLOBALS", {*reading._GLOBALS, "posix system", "nt system"})
    refused(tmp_path, "UnpicklingError")
    assert not marker.exists()


def test_a_plain_pickle_is_not_run(tmp_path):
    write("perfeature", tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "sae_final.pt").write_bytes(pickle.dumps(Payload(os.system, f"touch {marker}")))
    refused(tmp_path, "zip")
    assert not marker.exists()


def test_a_pickle_that_allocates_is_not_run(tmp_path):
    # torch's weights_only permits bytearray, which takes a size
    write("perfeature", tmp_path)
    content = torch.load(tmp_path / "sae_final.pt", weights_only=True)
    torch.save({**content, "x": Payload(bytearray, 2**40)}, tmp_path / "sae_final.pt")
    refused(tmp_path, r"asks for 'builtins\.bytearray'|asks for '__builtin__\.bytearray'")


def test_an_expanded_tensor_is_not_filled(tmp_path):
    # [2^20, 2^20] from one stored number: 4 TB when made contiguous
    write("standard", tmp_path)
    change(tmp_path, "standard", W_enc=torch.zeros(1).expand(2**20, 2**20), W_dec=torch.zeros(1).expand(2**20, 2**20))
    refused(tmp_path, "does not fill its storage")


def repack(path, **options):
    """Write the entries of a zip again, with other compression or other contents."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in entries:
            archive.writestr(name, options.get(name.partition("/")[2], data))


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    write("standard", tmp_path)
    path = tmp_path / "sae_final.pt"
    repack(path, compression=zipfile.ZIP_DEFLATED, **{"data/0": bytes(2**28)})
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    refused(tmp_path, "compressed")
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("entry", "data", "match"),
    [
        ("data.pkl", b"", "damaged"),
        ("data.pkl", b"\x80\x02}q\x00.", "no tensor"),  # an empty dictionary
        ("data.pkl", b"\x80\x02]q\x00.", "holds a list"),
        ("data.pkl", bytes(2**20 + 1), "1,048,577 bytes"),
        ("byteorder", b"big", "byte order"),
        ("data/0", b"1234", "damaged|does not fill"),
    ],
)
def test_entries_that_are_not_what_torch_writes(entry, data, match, tmp_path):
    write("standard", tmp_path)
    repack(tmp_path / "sae_final.pt", **{entry: data})
    refused(tmp_path, match)


def test_entries_that_overlap(tmp_path):
    # all headers in the directory point to the first entry: the classical overlapping bomb
    write("standard", tmp_path)
    path = tmp_path / "sae_final.pt"
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    while (at := data.find(b"PK\x01\x02", at + 1)) > 0:
        struct.pack_into("<I", data, at + 42, 0)
    path.write_bytes(data)
    refused(tmp_path, "overlaps")


def test_an_entry_that_claims_more_than_the_file_has(tmp_path):
    # 2 GB in the directory of a file of 2 kB
    write("standard", tmp_path)
    path = tmp_path / "sae_final.pt"
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, data.rindex(b"PK\x01\x02") + 20, 2**31, 2**31)
    path.write_bytes(data)
    refused(tmp_path, "ends behind the file")


def test_a_changed_letter_in_the_pickle(tmp_path):
    write("standard", tmp_path)
    path = tmp_path / "sae_final.pt"
    path.write_bytes(path.read_bytes().replace(b"num_tokens_since_fired", b"num_tokens_since_fixed"))
    refused(tmp_path, "data.pkl' does not match its checksum")


def test_a_flipped_bit_in_the_data_of_a_pt_file(tmp_path):
    write("standard", tmp_path)
    path = tmp_path / "sae_final.pt"
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        weights = archive.read(info)
    data = bytearray(path.read_bytes())
    data[data.index(weights) + 5] ^= 1
    path.write_bytes(data)
    refused(tmp_path, r"'state_dict/W_enc'.*checksum")


def header(shape, offsets, dtype="F32"):
    text = json.dumps({"encoder.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        header([2**40, 2**20], [0, 2**62]),
        header([2**20], [0, 4]) + bytes(4),
        header([2**63, 4], [0, 0]),
        header([1], [0, 4]),
        header([-1], [0, 4]) + bytes(4),
        header([1], [0, 4], "C64") + bytes(4),
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10) + b"{}",
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2) + b"{}",
    ],
)
def test_safetensors_that_lie(data, tmp_path):
    write("sparsify", tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(data)
    tracemalloc.start()
    refused(tmp_path, "sae.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


@pytest.mark.parametrize("source", ["perfeature", "BatchTopKSAE", "sparsify"])
def test_truncated_anywhere(source, tmp_path):
    write(source, tmp_path)
    path = tmp_path / SOURCES[source].weights
    data = path.read_bytes()
    for length in range(0, len(data) - 1, len(data) // 60):
        path.write_bytes(data[:length])
        refused(tmp_path, path.name)


def test_readers_take_only_what_they_read(tmp_path):
    write("sparsify", tmp_path)
    for reader, name in (
        (open_pt, "sae.safetensors"),
        (open_safetensors, "cfg.json"),
        (read_config, "sae.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=name):
            reader(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"missing\.json"):
        read_config(tmp_path / "missing.json")
