"""Values and gradients of active entries, and codes that become dense for whoever asks."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import make_activations, make_sae, train_step
from kernel_cases import F32, F64, SIZES, assert_no_worse, dtype, make_entries, t, watch  # noqa: F401

from saelens_cosine.kernels import operations
from saelens_cosine.kernels.autograd import EntryDecode, EntryScores, ScoredBatch
from saelens_cosine.kernels.codes import EntryCodes, ScoresOnDemand
from saelens_cosine.kernels.entries import Entries
from saelens_cosine.kernels.terms import ScoreTerms
from saelens_cosine.saes.encoding import encode_sparse
from saelens_cosine.saes.recipe.lagged_count import LaggedCount
from saelens_cosine.score import NORM_FLOOR


def entry_values(x, b_dec, W_enc, b_enc, a, c, entries, unit_columns, signed):
    """`EntryScores` of a batch prepared as `encode` prepares it."""
    with torch.no_grad():
        x_c = x if b_dec is None else x - b_dec
        norm = x_c.norm(dim=-1).clamp_min(NORM_FLOOR)
        unit, log_norm = x_c / norm.unsqueeze(-1), norm.log()
        gain = W_enc.norm(dim=0).reciprocal() if unit_columns else torch.ones_like(b_enc)
        product = operations.sampled_product(entries, unit, W_enc.T.contiguous())
        factor = ScoreTerms(a, c, gain, b_enc).factor(log_norm[entries.tokens], entries.features)
        batch = ScoredBatch(entries, product, factor, unit, log_norm, gain.square() if unit_columns else None, signed)
    return EntryScores.apply(x, b_dec, W_enc, b_enc, a, c, batch)


def formula_values(x, b_dec, W_enc, b_enc, a, c, entries, unit_columns, signed):
    """The same from the dense definition."""
    x_c = x if b_dec is None else x - b_dec
    norm = x_c.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    cosine = (x_c / norm) @ (W_enc / W_enc.norm(dim=0) if unit_columns else W_enc)
    scores = (a * norm.log() + c).exp() * cosine + b_enc
    return (scores if signed else scores.relu())[entries.tokens, entries.features]


PARAMETERS = ["scalar", "by feature", "inner product", "signed"]


def make_leaves(n_tokens, d_sae, width, parameters):
    """x, b_dec, W_enc, b_enc, norm_exponent, log_scale, W_dec in float64; whether columns count by direction, and codes have signs."""
    a, c = torch.linspace(-0.5, 1.5, d_sae), 0.3 * torch.randn(d_sae)
    if parameters in ("scalar", "inner product"):
        a, c = (torch.tensor(v) for v in ((0.7, -0.4) if parameters == "scalar" else (1.0, 0.0)))
    shapes = [(n_tokens, width), (width,), (width, d_sae), (d_sae,), (d_sae, width)]
    x, b_dec, W_enc, b_enc, W_dec = (torch.randn(shape) for shape in shapes)
    return [leaf.double() for leaf in (x, b_dec, W_enc, b_enc, a, c, W_dec)], (
        parameters != "inner product",
        parameters == "signed",
    )


def decoded(values_of, leaves, wanted, entries, kind, weight, dtype):
    """A decoded batch, and the gradients of the wanted leaves."""
    leaves = [None if leaf is None else leaf.detach().to(dtype, copy=True) for leaf in leaves]
    inputs = [leaf.requires_grad_() for leaf, w in zip(leaves, wanted, strict=True) if leaf is not None and w]
    values, W_dec = values_of(*leaves[:6], entries, *kind), leaves[6]
    fast = values_of is entry_values
    out = EntryDecode.apply(values, W_dec, entries) if fast else entries.to_dense(values) @ W_dec
    return out, *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)


WANTED = {"all": [1] * 7, "all but x": [0] + [1] * 6, "x": [1] + [0] * 6, "b_enc": [0, 0, 0, 1, 0, 0, 0]}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("wanted", [*WANTED, "no b_dec"])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize(("n_tokens", "d_sae", "width", "n"), SIZES[1:])
def test_all_gradients(n_tokens, d_sae, width, n, parameters, wanted, dtype):
    leaves, kind = make_leaves(n_tokens, d_sae, width, parameters)
    if wanted == "no b_dec":
        leaves[1] = None
    weight = torch.randn(n_tokens, width, dtype=F64)
    case = (leaves, WANTED.get(wanted, [1] * 7), make_entries(n_tokens, d_sae, n), kind, weight)
    exact, plain = decoded(formula_values, *case, F64), decoded(formula_values, *case, dtype)
    for one, other, true in zip(decoded(entry_values, *case, dtype), plain, exact, strict=True):
        assert_no_worse(one, other, true, 8 * true.abs().amax())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_gradients_where_the_norm_is_floored(n_tokens, parameters, share, dtype):
    # x = b_dec, or at a tenth of the floor from it: the norm is a constant there, and x_c enters by its product alone
    (x, b_dec, W_enc, b_enc, *rest), kind = make_leaves(n_tokens, 13, 7, parameters)
    x = torch.nn.functional.normalize(x) * NORM_FLOOR * share
    if n_tokens > 1:
        x[n_tokens // 2] = 1.0  # an ordinary one
    leaves, entries = [x, 0 * b_dec, W_enc, b_enc.abs() + 1, *rest], make_entries(n_tokens, 13, 5 * n_tokens)
    case = ([1] * 7, entries, kind, torch.randn(n_tokens, 7, dtype=F64))
    exact = decoded(formula_values, leaves, *case, F64)
    for one, true in zip(decoded(entry_values, leaves, *case, dtype), exact, strict=True):
        size = true.abs().amax(dim=-1, keepdim=True) if true.ndim else true.abs()  # rows of x differ by 1e8 and more
        assert ((one.double() - true).abs() <= 200 * torch.finfo(dtype).eps * size.clamp_min(1e-6)).all()


def test_values_that_are_not_positive_have_no_gradient():
    # scores (1, 0) . w + b_enc: 2, -1, and 1 - 1 = 0; only the first is above 0
    W_enc, b_enc = t([2, -1, 1], [0, 0, 0]).requires_grad_(), t(0, 0, -1).requires_grad_()
    entries, one = Entries(torch.zeros(3, dtype=torch.int64), torch.arange(3), 1, 3), torch.tensor(1.0)
    values = entry_values(t([1, 0]), None, W_enc, b_enc, one, 0 * one, entries, False, False)
    assert values.tolist() == [2, 0, 0]
    values.sum().backward()
    assert b_enc.grad.tolist() == [1, 0, 0]
    assert W_enc.grad.tolist() == [[1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_gradients_equal_finite_differences(parameters):
    (*leaves, W_dec), kind = make_leaves(3, 5, 4, parameters)
    leaves[3] = 9 * leaves[3].sign()  # no score is near 0
    entries = make_entries(3, 5, 8)
    assert 0 < (formula_values(*leaves, entries, *kind) > 0).sum() < 8
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *p: entry_values(*p, entries, *kind), leaves)
    values = torch.randn(8, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: EntryDecode.apply(v, w, entries), (values, W_dec.requires_grad_()))


def make_codes(n=7, requires_grad=False):
    """Codes [3, 5] and the ordinary tensor that they stand for; one value is 0."""
    values = torch.randn(n)
    values[n // 2 : n // 2 + 1] = 0
    codes = EntryCodes(make_entries(3, 5, n), values.requires_grad_(requires_grad))
    return codes, codes.entries.to_dense(values)


def same_of_both(operation, codes, dense):
    """The result for codes and for the dense tensor, as tensors; f: [5], w: [5, 4]."""
    names = {"torch": torch, "copy": copy, "pickle": pickle, "f": torch.randn(5, requires_grad=codes.requires_grad)}
    names["w"] = torch.randn(5, 4, requires_grad=codes.requires_grad)
    got, expected = (eval(operation, {**names, "z": z}) for z in (codes, dense))
    got = got.dense() if isinstance(got, EntryCodes) else got
    torch.testing.assert_close(got, expected)  # shape and dtype too
    assert got.requires_grad == expected.requires_grad
    if expected.requires_grad:
        leaves, weight = (codes.values, names["f"], names["w"]), torch.randn(expected.shape, dtype=expected.dtype)
        torch.testing.assert_close(
            *(torch.autograd.grad(out, leaves, weight, allow_unused=True) for out in (got, expected))
        )


OPERATIONS = [
    "z.abs()", "torch.relu(z)", "z.pow(2)", "z.sum()", "z.sum(None)", "z.sum(0)", "z.sum(1)", "z.sum(-1)", "z.sum(-2)",
    "z.sum(dim=0)", "z.sum(0, keepdim=True)", "z.sum(-1, keepdim=True)", "z.sum((0, 1))", "torch.sum(z, 1)", "z.mean()",
    "z.mean(0)", "z == 0", "0 < z", "z[1]", "z[:, -1]", "z[z > 0]", "z.nonzero()", "z @ f", "z @ w", "z.matmul(w)",
    "z @ w.T.contiguous().T", "torch.matmul(z, w)", "w[:2, :3] @ z", "z @ torch.stack([w, w])", "torch.cat([z, z], 1)",
    "torch.nn.functional.linear(z, w.T)", "z.clone()", "z.bool()", "z.bool().sum(0)", "z.bool().float().sum(-2).bool()",
    "z.float()", "z.double()", "z.to_dense()", "z.detach()", "z * f", "z.mul(f)", "f * z", "z * w[:3, :1]", "2 * z * 3.0",
    "z * z", "z.bool() * f", "(z * (1 / w.norm(dim=-1))) @ w", "torch.empty(3, 5).copy_(z)", "torch.zeros_like(z)", "z.T",
    "torch.add(z.detach(), 1, out=torch.empty(3, 5))", "copy.deepcopy(z.detach())", "pickle.loads(pickle.dumps(z.detach()))",
    "z.flatten()", "z.max(0).values", "z.to(torch.float64)", "z.sum(0) * f", "z.sum(-1) * w[:3, 0]", "z.float() @ w",
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_codes_behave_as_the_dense_tensor(operation):
    for n in (7, 15, 0):
        same_of_both(operation, *make_codes(n))
        same_of_both(operation, *make_codes(n, requires_grad=True))


@pytest.mark.parametrize(
    "operation", ["z.sum(0, dtype=torch.float64)", "z.sum(axis=0)", "z.to_dense(dtype=torch.float64)"]
)
def test_codes_take_the_keywords_of_tensors(operation):
    same_of_both(operation, *make_codes())


@pytest.mark.parametrize("change", ["z.mul_(2)", "z.zero_()", "z.__setitem__((0, 0), 5.0)"])
def test_changes_in_place_are_seen_or_refused(change):
    codes, dense = make_codes(n=15)
    eval(change, {"z": dense})
    try:
        eval(change, {"z": codes})
    except (RuntimeError, TypeError):
        return
    assert torch.equal(codes.dense(), dense)


def test_codes_by_parts_of_the_features():
    # tokens 0 and 1; features 0 | 1 2 | 3: part i of token b is row 2 i + b
    codes = EntryCodes(Entries(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 3, 0, 2]), 2, 4), t(5, 6, 7, -8))
    parts = codes.split_features([0, 1, 3, 4])
    assert isinstance(parts, EntryCodes)
    assert parts.dense().view(3, 2, 4).tolist() == [
        [[0, 0, 0, 0], [7, 0, 0, 0]],
        [[0, 5, 0, 0], [0, 0, -8, 0]],
        [[0, 0, 0, 6], [0, 0, 0, 0]],
    ]
    assert codes.split_features([0, 4]).dense().tolist() == codes.dense().tolist()


@pytest.mark.parametrize("edges", [[0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]])
def test_parts_pass_gradients_to_their_codes(edges):
    codes, dense = make_codes(n=9, requires_grad=True)
    weight = torch.randn(len(edges) - 1, 3, 5)
    masks = [(torch.arange(5) >= a) & (torch.arange(5) < b) for a, b in itertools.pairwise(edges)]
    out = codes.split_features(edges).dense().view(weight.shape)
    assert torch.equal(out, torch.stack([dense * mask for mask in masks]))
    expected = sum(w * mask for w, mask in zip(weight, masks, strict=True))
    (gradient,) = torch.autograd.grad((out * weight).sum(), codes.values)
    entries = codes.entries
    torch.testing.assert_close(gradient, expected[entries.tokens, entries.features])


def test_what_codes_say_of_themselves():
    codes, dense = make_codes()
    for made in (codes, codes.bool(), codes.detach(), codes * torch.ones(5)):
        assert isinstance(made, EntryCodes)
        assert isinstance(made, torch.Tensor)
    assert (codes.shape, codes.dtype, codes.device) == (dense.shape, dense.dtype, dense.device)
    assert (len(codes), codes.ndim, codes.size(1), codes.numel(), codes.is_sparse) == (3, 2, 5, 15, False)
    assert repr(codes) == repr(dense)
    assert codes.numpy().tolist() == codes.tolist() == dense.tolist()
    assert codes.fired().tolist() == (dense != 0).any(0).tolist()
    assert EntryCodes(make_entries(1, 2, 2), t(0, 3)).fired().tolist() == [False, True]
    with pytest.raises(RuntimeError, match="requires grad"):
        make_codes(requires_grad=True)[0].numpy()


def test_what_saelens_does_in_training_never_makes_the_dense_tensor(monkeypatch):
    def step(codes, W_dec):
        firing = codes.bool().float()
        rescaled = codes * (1 / W_dec.norm(dim=-1))
        l0 = codes.bool().float().sum(-1).to_dense().mean()
        assert (codes.is_sparse, codes.shape[0], codes.dtype) == (False, 3, F32)
        return firing.sum(-2).bool(), firing.sum(0), l0, codes.detach().sum(), codes @ W_dec, rescaled @ W_dec

    codes, dense = make_codes(requires_grad=True)
    W_dec = torch.randn(5, 4, requires_grad=True)
    expected = step(dense, W_dec)
    monkeypatch.setattr(Entries, "to_dense", lambda *_: pytest.fail("the dense tensor was made"))
    *_, out, rescaled = results = step(codes, W_dec)
    torch.testing.assert_close(results, expected)
    (out + rescaled).sum().backward()
    with pytest.raises(pytest.fail.Exception, match="was made"):
        codes.abs()


def make_scores(parameter):
    """Pre-activations `x @ parameter [4, 6]` of three tokens, x, and what was asked for."""
    x, calls = torch.randn(3, 4), []

    def compute(features):
        calls.append(features)
        return x @ (parameter if features is None else parameter[:, features])

    return (
        ScoresOnDemand(compute, lambda *_: None, [parameter], torch.zeros(0), shape=(3, 6), dtype=F32, device=x.device),
        x,
        calls,
    )


def test_scores_on_demand():
    parameter = torch.randn(4, 6, requires_grad=True)
    scores, x, calls = make_scores(parameter)
    assert isinstance(scores, torch.Tensor)
    assert (scores.shape, scores.dtype, len(scores), calls) == ((3, 6), F32, 3, [])  # nothing was computed for that
    expected = x @ parameter
    assert torch.equal(scores.dense(), expected)
    assert torch.equal(scores.relu(), expected.relu())
    assert torch.equal(scores[:, 1], expected[:, 1])
    few = scores.columns(torch.tensor([5, 0]))
    torch.testing.assert_close(few, expected[:, [5, 0]])
    few.sum().backward()
    torch.testing.assert_close(parameter.grad, x.sum(0).unsqueeze(1) * t(1, 0, 0, 0, 0, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_scores_on_demand_are_gone_after_a_step(fused, watch):
    parameter = torch.nn.Parameter(torch.randn(6, 4).T)  # feature-major
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    if fused:
        watch(parameter)
    scores, _, calls = make_scores(parameter)
    scores.sum().backward()
    optimizer.step()
    assert bool(optimizer.param_groups[0]["fused"]) == fused
    for ask in (scores.dense, lambda: scores.columns(torch.tensor([0])), lambda: scores + 1):
        with pytest.raises(RuntimeError, match='kernels="reference"'):
            ask()
    assert len(calls) == 1


def test_inference_between_fused_steps_sees_the_new_weights():
    sae, x = make_sae("cosine_topk", kernels="auto", d_sae=64), make_activations(5, 7)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    for step in range(2):
        sparse = encode_sparse(sae.eval(), x)
        codes = torch.zeros(5, 64).scatter_add(1, sparse.indices, sparse.values)
        torch.testing.assert_close(codes, sae.encode(x).detach())
        train_step(sae.train(), x, step).loss.backward()
        optimizer.step()


def test_lagged_count():
    count, source, other = LaggedCount(), torch.zeros(4), torch.zeros(4)
    assert count.get(source) is None
    count.put(torch.tensor([3, 8]), source)
    assert [count.get(source), count.get(source)] == [[3, 8], [3, 8]]
    assert [count.get(source.clone()), count.get(source[:])] == [None, None]
    for copied in (copy.deepcopy(count), copy.copy(count), pickle.loads(pickle.dumps(count))):
        assert isinstance(copied, LaggedCount)
        assert copied.get(source) is None
    source.add_(1)
    assert count.get(source) is None
    count.put(torch.tensor([5, 5]), source)
    assert count.get(source) == [5, 5]
    count.put(torch.tensor([0, 1]), other)
    assert [count.get(other), count.get(source)] == [[0, 1], None]
