"""SAELens' Adam in one pass: the same steps."""

import copy
import sys

import pytest
import torch
from kernel_cases import F32, F64, dtype, watch  # noqa: F401

from saelens_cosine.kernels.optimizer import fuse_adam_of


def make_parameters(dtype=F32):
    """Feature-major, ordinary, feature-major and square, a vector, a scalar."""
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=rng, dtype=F64).to(dtype) for shape in ((13, 7), (5, 6), (9, 9), (11,), ())]
    return [torch.nn.Parameter(tensor.T if i in (0, 2) else tensor) for i, tensor in enumerate(tensors)]


def take_steps(optimizer, parameters, steps, other_layout=False):
    """With a random gradient for each step, in the parameter's layout as backward leaves it."""
    for step in steps:
        rng = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=rng, dtype=F64).to(parameter.dtype)
            parameter.grad = gradient if other_layout else torch.empty_like(parameter).copy_(gradient)
        optimizer.step()


CHOICES = [
    ("Adam", {"betas": (0.9, 0.999)}, True),  # SAELens' arguments
    ("AdamW", {}, True),
    ("Adam", {"fused": True}, True),
    ("Adam", {"fused": False}, False),
    *(("Adam", option, None) for option in ({"foreach": True}, {"foreach": False}, {"differentiable": True})),
    *((kind, {}, None) for kind in ("NAdam", "SGD")),
]


@pytest.mark.parametrize(("kind", "options", "expected"), CHOICES)
def test_which_optimizers_are_fused(kind, options, expected, watch):
    parameters, strangers = make_parameters(), make_parameters()
    ours, theirs = (getattr(torch.optim, kind)(some, lr=1e-3, **options) for some in (parameters, strangers))
    watch(parameters[0])
    for optimizer in (ours, theirs):
        optimizer.step()  # no gradients yet: nothing is updated, but the step is what fuses
    assert ours.param_groups[0].get("fused") is expected
    assert theirs.param_groups[0].get("fused") is options.get("fused")


def test_an_adam_that_has_stepped_stays_and_a_watch_ends(watch):
    parameters = make_parameters()
    optimizer = torch.optim.Adam(parameters)
    fuse_adam_of(parameters[0]).remove()
    take_steps(optimizer, parameters, [0])
    assert optimizer.param_groups[0]["fused"] is None
    watch(parameters[0])
    take_steps(optimizer, parameters, [1])
    assert optimizer.param_groups[0]["fused"] is None


def assert_same_state(fused, unfused, parameters, others, tolerance):
    for one, other in zip(parameters, others, strict=True):
        assert (one - other).abs().max() <= tolerance
        assert fused.state[one].keys() == unfused.state[other].keys()
        for name, value in unfused.state[other].items():
            assert (fused.state[one][name] - value).abs().max() <= tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-6), (F64, 1e-12)])
@pytest.mark.parametrize(
    ("kind", "options"), [("Adam", {}), ("AdamW", {"weight_decay": 0.1}), ("Adam", {"amsgrad": True})]
)
def test_fused_steps_are_the_unfused(kind, options, dtype, tolerance, watch, monkeypatch):
    calls, function = [], f"_fused_{kind.lower()}_"
    step = getattr(torch, function)
    monkeypatch.setattr(torch, function, lambda *lists, **kw: calls.append(lists[:5]) or step(*lists, **kw))
    parameters, others = make_parameters(dtype), make_parameters(dtype)
    layout = [(p.shape, p.stride(), p.data_ptr()) for p in parameters]
    fused, unfused = (getattr(torch.optim, kind)(some, lr=0.01, **options) for some in (parameters, others))
    watch(parameters[0])
    take_steps(fused, parameters, range(5))
    take_steps(unfused, others, range(5))
    assert_same_state(fused, unfused, parameters, others, tolerance)
    assert [(p.shape, p.stride(), p.data_ptr()) for p in parameters] == layout
    for parameter in parameters:
        moments = [value for name, value in fused.state[parameter].items() if name != "step"]
        assert all((m.shape, m.stride()) == (parameter.shape, parameter.stride()) for m in moments)
    assert len(calls) == 5
    for lists in calls:  # the parameters themselves, and nothing that needs a copy
        assert [p.data_ptr() for p in lists[0]] == [pointer for _, _, pointer in layout]
        assert all(tensor.is_contiguous() for tensors in lists for tensor in tensors)


def test_gradients_in_another_layout(watch):
    both = make_parameters(), make_parameters()
    fused, unfused = (torch.optim.Adam(parameters, lr=0.01) for parameters in both)
    watch(both[0][0])
    for optimizer, parameters in zip((fused, unfused), both, strict=True):
        take_steps(optimizer, parameters, range(2), other_layout=True)
    assert_same_state(fused, unfused, *both, 1e-6)


def test_the_watch_may_last(watch):
    parameter = torch.nn.Parameter(torch.zeros(()))
    parameter.grad = torch.ones(())
    optimizer = torch.optim.Adam([parameter], lr=0.5)
    watch(parameter)
    for _ in range(sys.getrecursionlimit() + 100):  # more steps than Python nests calls
        optimizer.step()


@pytest.mark.parametrize("watched", [False, True])
def test_a_saved_optimizer_goes_on_identically(watched, watch):
    parameters = make_parameters()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    watch(parameters[0])
    take_steps(optimizer, parameters, range(3))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    fresh = torch.optim.Adam(resumed, lr=0.01)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if watched:
        watch(resumed[0])
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(fresh, resumed, range(3, 6))
    assert_same_state(fresh, optimizer, resumed, parameters, 0)
    assert [p.stride() for p in resumed] == [p.stride() for p in parameters]
