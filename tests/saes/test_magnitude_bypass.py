"""The magnitude bypass: selected by cosine, norms restored in the codes; all eight cells of experiment 46 by their formula."""

import itertools
import math

import pytest
import torch
from helpers import (
    FREE_DECODER,
    assert_close,
    make_activations,
    make_sae,
    make_trainer,
    planted_batches,
    save_inference,
    train_step,
)

NAMES = ["magnitude_bypass_topk", "magnitude_bypass_batchtopk"]
SWITCHES = ["unit_encoder", "unit_decoder", "restore_output_norm"]
CELLS = [dict(zip(SWITCHES, on, strict=True)) for on in itertools.product([True, False], repeat=3)]
CELL_IDS = ["".join("FT"[on] for on in cell.values()) for cell in CELLS]
AUX = "auxiliary_reconstruction_loss"
D, F, K, B = 12, 40, 4, 30


def make(name, **options):
    return make_sae(name, dtype="float64", **{"d_in": D, "d_sae": F, "k": K, **options})


def x_of(tokens=B, seed=0, d_in=D):
    return make_activations(tokens, d_in, seed=seed, dtype=torch.float64)


def by_the_paper(sae, x, threshold=None):
    """The authors' model (experiments 39 and 46): cosines selected, decoded, and then the norm restored.

    Cosines of each token `z`, its reconstruction, and the codes by which a plain decoder makes it. Without a threshold the k
    highest cosines of each token, or k times the batch's tokens, are selected.
    """
    W_enc, W_dec, b_dec = (p.detach() for p in (sae.W_enc, sae.W_dec, sae.b_dec))
    if sae.cfg.unit_encoder:
        W_enc = W_enc / W_enc.square().sum(0).sqrt()
    if sae.cfg.unit_decoder:
        W_dec = W_dec / W_dec.square().sum(1, keepdim=True).sqrt()
    x_c = x - b_dec
    n = x_c.square().sum(1, keepdim=True).sqrt()
    p = ((x_c / n) @ W_enc).clamp_min(0)
    if threshold is None:
        rows = p if "batchtopk" not in sae.cfg.architecture() else p.reshape(1, -1)
        k = K if len(rows) == len(p) and len(p) > 1 else K * len(p)
        best = rows.topk(k, dim=-1)
        p = torch.zeros_like(rows).scatter(-1, best.indices, best.values).view_as(p)
    else:
        p = p * (p > threshold)
    r = p @ W_dec
    if not sae.cfg.restore_output_norm:
        return p, r + b_dec, p
    gain = n / r.square().sum(1, keepdim=True).sqrt().clamp_min(1e-8)
    return p, r * gain + b_dec, p * gain


@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("cell", CELLS, ids=CELL_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_the_authors_formula_in_training(name, cell, kernels):
    sae = make(name, kernels=kernels, **cell).train()
    x = x_of()
    expected_z, expected_out, expected_codes = by_the_paper(sae, x)
    output = train_step(sae, x, step=1)
    assert_close(output.feature_acts.to_dense().detach(), expected_codes, 1e-12)
    assert_close(output.sae_out.detach(), expected_out, 1e-12)
    assert output.losses["mse_loss"].item() == pytest.approx(
        (x - expected_out).square().sum(1).mean().item(), rel=1e-12
    )
    assert torch.equal(expected_z > 0, output.feature_acts.to_dense() > 0)


@pytest.mark.parametrize("cell", CELLS, ids=CELL_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_saved_exactly(name, cell, tmp_path):
    sae = make(name, **cell)
    x = x_of()
    threshold = sae.topk_threshold if "batchtopk" in name else None
    _, expected_out, expected_codes = by_the_paper(sae, x, threshold)
    saved = save_inference(sae, tmp_path)
    for each in (sae, saved):
        codes = each.encode(x).detach()
        assert_close(codes, expected_codes, 1e-12)
        assert_close(each.decode(codes).detach(), expected_out, 1e-12)
    assert saved.cfg.restore_output_norm == cell["restore_output_norm"]
    assert saved.norm_exponent.item() == 0
    assert not saved.b_enc.any()


@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("cell", CELLS, ids=CELL_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_has_the_gradients_of_the_formula(name, cell, kernels):
    # by autograd through the authors' order of operations: decode, restore, loss
    sae = make(name, kernels=kernels, aux_loss_coefficient=0.0, **cell).train()
    x = x_of()
    train_step(sae, x, step=1).loss.backward()
    z, _, _ = by_the_paper(sae, x)
    W_enc, W_dec, b_dec = (p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_dec))
    x_c = x - b_dec
    n = x_c.norm(dim=1, keepdim=True)
    p = (x_c / n) @ (W_enc / W_enc.norm(dim=0) if cell["unit_encoder"] else W_enc) * (z > 0)
    r = p @ W_dec
    if cell["restore_output_norm"]:
        r = r * n / r.norm(dim=1, keepdim=True).clamp_min(1e-8)
    (x - r - b_dec).square().sum(1).mean().backward()
    d_W_dec = W_dec.grad
    if cell["unit_decoder"]:
        rows = W_dec.detach()
        d_W_dec = d_W_dec - (d_W_dec * rows).sum(1, keepdim=True) * rows
    assert_close(sae.W_enc.grad, W_enc.grad, 1e-11)
    assert_close(sae.W_dec.grad, d_W_dec, 1e-11)
    assert_close(sae.b_dec.grad, b_dec.grad, 1e-11)
    assert sae.b_enc.grad is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["training", "saved"])
def test_the_reconstruction_has_the_inputs_norm(name, form, tmp_path):
    sae = make(name)
    sae = save_inference(sae, tmp_path) if form == "saved" else sae
    x = x_of(200)
    codes = sae.encode(x)
    on = (codes > 0).any(dim=1)
    assert on.sum() > 100
    length = (sae.decode(codes) - sae.b_dec).norm(dim=1)
    torch.testing.assert_close(length[on], (x - sae.b_dec).norm(dim=1)[on], rtol=1e-12, atol=0)
    assert torch.equal(sae.decode(codes)[~on], sae.b_dec.expand(int((~on).sum()), D))


@torch.no_grad()
def test_a_token_without_codes_becomes_b_dec(tmp_path):
    sae = make("magnitude_bypass_batchtopk")
    sae.topk_threshold.fill_(0.999)
    x = torch.cat([x_of(20), sae.b_dec.unsqueeze(0)])  # the last has norm 0
    saved = save_inference(sae, tmp_path)
    for each in (sae, saved):
        assert not each.encode(x).any()
        assert torch.equal(each(x), sae.b_dec.expand(21, D))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["training", "saved"])
@torch.no_grad()
def test_decode_keeps_no_state_and_is_affine(name, form, tmp_path):
    sae = make(name)
    sae = save_inference(sae, tmp_path) if form == "saved" else sae
    one, two = x_of(20, seed=1), 50 * x_of(31, seed=2)
    codes = sae.encode(one)
    expected = sae(one)
    sae.encode(two)  # a norm that was kept on the module would be this batch's now
    torch.testing.assert_close(sae.decode(codes), expected, rtol=1e-13, atol=1e-13)
    order = torch.randperm(20)
    torch.testing.assert_close(sae.decode(codes[order]), expected[order], rtol=1e-12, atol=1e-12)
    # affine: zeros to b_dec, twice the codes to twice the distance from it, one feature's removal by its row
    torch.testing.assert_close(sae.decode(0 * codes), sae.b_dec.expand(20, D))
    torch.testing.assert_close(sae.decode(2 * codes) - sae.b_dec, 2 * (expected - sae.b_dec))
    feature = int((codes > 0).sum(0).argmax())
    without = codes.index_fill(1, torch.tensor([feature]), 0)
    torch.testing.assert_close(expected - sae.decode(without), codes[:, [feature]] * sae.W_dec[feature])


def test_by_hand():
    # x_c = (6, 8), n = 10: cosines 0.6, 0.8 and 0 with the axes; both kept, r = (0.6, 0.8) of norm 1, gain 10
    sae = make_sae("magnitude_bypass_topk", seed=None, d_in=2, d_sae=3, k=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[3.0, 0.0, -1.0], [0.0, 0.2, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        sae.b_dec.copy_(torch.tensor([1.0, -1.0]))
    codes = sae.encode(torch.tensor([[7.0, 7.0]]))
    torch.testing.assert_close(codes, torch.tensor([[6.0, 8.0, 0.0]]))
    torch.testing.assert_close(sae.decode(codes), torch.tensor([[7.0, 7.0]]))


@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("decoder", [{}, FREE_DECODER], ids=["unit", "free"])
def test_the_threshold_is_of_cosines(kernels, decoder):
    sae = make("magnitude_bypass_batchtopk", kernels=kernels, topk_threshold_lr=0.25, **decoder).train()
    sae.topk_threshold.zero_()
    smallest = []
    for step in (1, 2):
        x = 100 * x_of(seed=step)
        cosines = torch.nn.functional.cosine_similarity((x - sae.b_dec).unsqueeze(1), sae.W_enc.T.unsqueeze(0), dim=-1)
        if decoder:
            cosines = cosines * sae.W_dec.norm(dim=1)  # what is ranked
        smallest.append(cosines.flatten().topk(K * B).values[-1].item())
        train_step(sae, x, step=step)
    expected = 0.75 * smallest[0] + 0.25 * smallest[1]
    assert sae.topk_threshold.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("start", [0, 2])
def test_the_threshold_starts_at_its_step(start):
    sae = make("magnitude_bypass_batchtopk", topk_threshold_start_step=start).train()
    sae.topk_threshold.zero_()
    for step in range(3):
        train_step(sae, x_of(seed=step), step=step)
        assert (sae.topk_threshold > 0) == (step >= start)


def test_the_saved_l0_is_k(tmp_path):
    # norms from 0.1 to 10 times the mean: a threshold on codes instead of cosines would keep nothing or everything
    sae = make_sae("magnitude_bypass_batchtopk", seed=None, d_in=16, d_sae=64, k=4)
    data = planted_batches(d_in=16, n_features=32, active=3, batch=512, spread=1.0)
    make_trainer(sae, data, steps=150, batch=512, lr=1e-3, lr_end=1e-3).fit()
    saved = save_inference(sae, tmp_path)
    with torch.no_grad():
        heldout = torch.cat([data.sample(100_000 + i) for i in range(10)])
        l0 = (saved.encode(heldout) > 0).sum(1).double()
    assert l0.mean().item() == pytest.approx(4, rel=0.1)
    norms = (heldout - saved.b_dec).norm(dim=1)
    for third in norms.argsort().chunk(3):
        assert 1 < l0[third].mean() < 8
    assert 0 < saved.threshold.max() < 1


# --- the auxiliary loss ---


def aux_gradients(mean_norm):
    """Norms of the encoder gradients of dead features from the auxiliary loss: ours, the authors', and the cosine arm's.

    All three on the same weights and data, of this mean norm, which is also the scale of the cosine arm.
    """
    d_in, d_sae, dead = 32, 128, 40
    x = make_activations(256, d_in, spread=0.3, dtype=torch.float64)
    x = x * (mean_norm / x.norm(dim=1).mean())
    bypass, cosine = (
        make_sae(name, dtype="float64", d_in=d_in, d_sae=d_sae, k=8, seed=None, **options).train()
        for name, options in (
            ("magnitude_bypass_batchtopk", {"kernels": "reference"}),
            ("cosine_batchtopk", {"kernels": "reference", "log_scale_init": math.log(mean_norm)}),
        )
    )
    with torch.no_grad():
        cosine.W_enc.copy_(bypass.W_enc)
        cosine.W_dec.copy_(bypass.W_dec)
    norms = {}
    for name, sae in (("ours", bypass), ("cosine", cosine)):
        output = train_step(sae, x, step=1)
        cut = torch.zeros(d_sae, dtype=torch.int64)
        cut[:dead] = 10**9
        sae.tokens_since_fired.copy_(cut)
        codes = output.feature_acts.detach().clone()
        codes[:, :dead] = 0
        pre = sae.score(sae.process_sae_in(x))
        out = sae.decode(codes).detach()
        step_input = type("StepInput", (), {"sae_in": x, "n_training_steps": 1, "dead_neuron_mask": None})()
        (gradient,) = torch.autograd.grad(sae.calculate_aux_loss(step_input, codes, pre, out)[AUX], sae.W_enc)
        norms[name] = gradient[:, :dead].norm(dim=0).mean().item()
        if name == "ours":
            # the authors': top d_in // 2 dead cosines, decoded as they are, against the same residual
            W_enc = sae.W_enc.detach().clone().requires_grad_()
            e = x - out
            p = torch.nn.functional.normalize(x - sae.b_dec, dim=1) @ torch.nn.functional.normalize(W_enc, dim=0)
            best = p[:, :dead].relu().topk(d_in // 2, dim=1)
            z = torch.zeros_like(p[:, :dead]).scatter(1, best.indices, best.values)
            error = (e - z @ sae.W_dec[:dead].detach()).square().sum(1).mean()
            loss = error / (e - e.mean(0)).square().sum(1).mean() / 32
            norms["authors"] = torch.autograd.grad(loss, W_enc)[0][:, :dead].norm(dim=0).mean().item()
    return norms


def test_dead_features_get_gradients_of_the_size_of_the_cosine_arms():
    # theirs has scores of at most 1 predict a residual of hundreds, and so gradients smaller by that factor
    norms = aux_gradients(405.0)  # the paper's last layers
    assert 0.1 < norms["ours"] / norms["cosine"] < 10
    assert norms["authors"] < norms["ours"] / 100


def test_the_aux_loss_by_hand():
    # u = (1, 0): cosine 1 with feature 0, which is alive, and 0.6 with feature 1, which is dead; n = 10, r = 1, so the gain
    # is 10 and x_hat = x: no residual. With W_dec row 0 = (0.8, 0.6): r = 1, x_hat = (8, 6), e = (2, -6) and (-2, 6) for the
    # second token at -x... whose cosines are negative: no codes, gain 1, prediction 0, e = x = (-10, 0).
    sae = make_sae(
        "magnitude_bypass_topk", dtype="float64", seed=None, d_in=2, d_sae=2, k=1, dead_feature_window_tokens=1
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.6], [0.0, 0.8]], dtype=torch.float64))
        sae.W_dec.copy_(torch.tensor([[0.8, 0.6], [0.0, 1.0]], dtype=torch.float64))
    sae.train()
    sae.tokens_since_fired.fill_(5)
    x = torch.tensor([[10.0, 0.0], [-10.0, 0.0]], dtype=torch.float64)
    output = train_step(sae, x, step=1)
    # token 0: dead score 0.6 times the living gain 10 along (0, 1): e - e_hat = (2, -12), 148; token 1: e = (-10, 0), 100
    # mean of e = (-4, -3): deviations (6, -3) and (-6, 3), 45 each
    assert output.losses[AUX].item() == pytest.approx((148 + 100) / 2 / 45 / 32, rel=1e-12)


# --- what stays, and what is refused ---


@pytest.mark.parametrize("name", NAMES)
def test_training_leaves_b_enc_at_zero_and_columns_at_length_one(name):
    sae = make_sae(name, seed=None, d_in=16, d_sae=64)
    data = planted_batches(d_in=16, n_features=24, active=3, batch=64)
    make_trainer(sae, data, steps=5, batch=64, lr=1e-2).fit()
    assert not sae.b_enc.any()
    train_step(sae.train(), data.sample(9), step=5)
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.ones(64))


@pytest.mark.parametrize("name", NAMES)
def test_a_free_encoders_columns_keep_their_lengths(name):
    sae = make(name, unit_encoder=False).train()
    before = sae.W_enc.detach().clone()
    train_step(sae, x_of(), step=1)
    assert torch.equal(sae.W_enc, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cell", CELLS, ids=CELL_IDS)
@pytest.mark.parametrize("s", [0.25, 3.0])
def test_input_scale_is_folded_exactly_in_every_cell(name, cell, s, tmp_path):
    sae = make(name, **cell)
    x = x_of()
    expected = sae(s * x) / s
    saved = save_inference(sae, tmp_path)
    for each in (sae, saved):
        each.fold_activation_norm_scaling_factor(s)
        assert_close(each(x).detach(), expected.detach(), 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, FREE_DECODER], ids=["unit", "free"])
def test_decoder_norms_are_refused_in_the_training_form(name, options):
    sae = make(name, **options)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    with pytest.raises(NotImplementedError, match=f"'{name}' has no scale .*save_inference_model"):
        sae.fold_W_dec_norm()
    assert all(torch.equal(tensor, before[key]) for key, tensor in sae.state_dict().items())


def test_sparse_tensors_are_refused():
    with pytest.raises(ValueError, match="use_sparse_activations=True"):
        make("magnitude_bypass_topk", use_sparse_activations=True)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_exponent_to_learn(name):
    with pytest.raises(TypeError, match="norm_exponent_init"):
        make(name, norm_exponent_init=0.5)
    assert not hasattr(make(name), "norm_exponent")
    assert not hasattr(make(name), "log_scale")
