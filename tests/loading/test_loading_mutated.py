"""Mutated files load as what they say, or are refused."""

import json
import random
import struct
import zlib

import pytest
import torch
from foreign import D_IN, SOURCES, formula, write
from helpers import make_activations

from saelens_cosine.loading import CheckpointError, from_pretrained

FUZZED = ["standard", "perfeature", "bypass", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "AutoEncoderTopK", "sparsify"]
ODD_VALUES = [None, -1, 0, 1, 2, 1e300, "x", "", [], {}, True, 2**70, [1], {"a": 1}, float("nan")]


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, n = rng.randrange(len(data)), rng.choice([1, 2, 4, 64])
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + n] = rng.randbytes(len(data[at : at + n]))
        elif kind == 2:
            del data[at : at + n]
        elif kind == 3:
            data[at:at] = rng.randbytes(n)
        else:
            data[at : at + n] = rng.choice([b"\x00", b"\xff"]) * len(data[at : at + n])
        if not data:
            break
    return bytes(data)


def fix_checksums(data):
    """Make a zip's checksums right for its mutated contents, so that mutations reach what is behind them."""
    data, at = bytearray(data), data.find(b"PK\x01\x02")
    while at >= 0 and at + 46 <= len(data):
        size, offset = struct.unpack_from("<I", data, at + 20)[0], struct.unpack_from("<I", data, at + 42)[0]
        if offset + 30 <= len(data):
            start = offset + 30 + sum(struct.unpack_from("<HH", data, offset + 26))
            struct.pack_into("<I", data, at + 16, zlib.crc32(data[start : start + size]))
        at = data.find(b"PK\x01\x02", at + 1)
    return bytes(data)


def mutate_tensors(path, rng):
    """Change one entry of a saved dictionary to something else of torch's, or drop or add one."""
    content = torch.load(path, weights_only=True)
    state = content.get("state_dict", content)
    name = rng.choice(list(state))
    tensor = state[name]
    changes = [
        lambda: tensor.to(rng.choice([torch.float16, torch.float64, torch.int32, torch.bool])),
        lambda: tensor.T if tensor.ndim == 2 else tensor[None],
        lambda: tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)],
        lambda: tensor.expand(2, *tensor.shape),
        lambda: torch.full_like(tensor, rng.choice([0, 1, 3])),
        lambda: tensor.to_sparse() if tensor.ndim else tensor,
        lambda: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor,
        lambda: {"inner": tensor},
        lambda: rng.choice(ODD_VALUES),
    ]
    kind = rng.randrange(len(changes) + 2)
    if kind < len(changes):
        state[name] = changes[kind]()
    elif kind == len(changes):
        del state[name]
    else:
        state[rng.choice(["x", "encoder.bias", "threshold", 3])] = tensor
    torch.save(content, path)


def mutate_json(path, rng):
    config = json.loads(path.read_text())
    inner = rng.choice([config, config.get("trainer", config)])
    inner[rng.choice(list(inner))] = rng.choice(ODD_VALUES)
    path.write_text(json.dumps(config))


def mutate(folder, source, rng):
    weights = folder / SOURCES[source].weights
    configs = [path for path in sorted(folder.iterdir()) if path.suffix == ".json"]
    kind = rng.randrange(10)
    if kind < 3 and configs:
        config = rng.choice(configs)
        config.write_bytes(mutate_bytes(config.read_bytes(), rng)) if kind == 0 else mutate_json(config, rng)
    elif kind < 6 and weights.suffix == ".pt":
        mutate_tensors(weights, rng)
    elif kind < 8 and weights.suffix == ".pt":
        weights.write_bytes(fix_checksums(mutate_bytes(weights.read_bytes(), rng)))
    else:
        weights.write_bytes(mutate_bytes(weights.read_bytes(), rng))


@pytest.mark.parametrize("source", FUZZED)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_load_as_what_they_say_or_are_refused(source, tmp_path):
    x = make_activations(20, D_IN, seed=5) * 3
    loaded = 0
    for seed in range(150):
        rng = random.Random(f"{source} {seed}")
        folder = write(source, tmp_path / str(seed))
        mutate(folder, source, rng)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        try:
            sae = from_pretrained(folder)
        except CheckpointError:
            continue
        finally:
            assert {path: path.read_bytes() for path in folder.iterdir()} == before
        loaded += 1
        sae = sae.to(torch.float32)
        try:
            codes, expected = sae.encode(x), formula(source, folder, x)[0]
        except RuntimeError:  # torch looks an entry up by a name that was mutated; we take the offset that it computes
            expected = formula(source, write(source, folder), x)[0]
        if expected.abs().max() < 1e30:  # a mutated exponent of a weight can leave float32's range
            scale = expected.abs().max().clamp_min(1e-6)
            assert (codes - expected).abs().max() <= 1e-4 * scale, seed
    assert 5 < loaded < 100  # mutations reach what matters, and not all of them break the file
