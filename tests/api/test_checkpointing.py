"""Activation checkpoints around a loss: its forward runs again inside the backward pass."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.losses import LOSSES, PLAIN, WITH_STATE, loss_of, problem

PERTURBING = [name for name in LOSSES if name not in PLAIN]


def train(criterion, **options):
    """Losses and gradients of three steps; ``options`` are those of the checkpoint, if there is to be one."""
    results = []
    for seed in range(3):
        *inputs, target = problem(seed)

        def run(*inputs, target=target):
            return loss_of(criterion, *inputs, target)

        loss = checkpoint(run, *inputs, **options) if options else run(*inputs)
        loss.backward()
        results += [loss.detach(), *(x.grad for x in inputs)]
    return results


def assert_same_state(criterion, expected):
    state, wanted = criterion.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_a_recomputed_loss_is_the_loss_and_counts_once(name):
    criterion, plain = LOSSES[name](), LOSSES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = train(criterion, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(results, train(plain), strict=True))
    assert_same_state(criterion, plain)


@pytest.mark.parametrize("name", ["logit adjusted", "isda"])
def test_statistics_along_with_a_recomputed_loss_are_counted_once(name):
    criterion, plain = LOSSES[name](), LOSSES[name]()
    features, weight, bias, target = problem()
    arguments = (features, weight) if name == "isda" else (features @ weight.T + bias,)

    def run(*arguments):
        loss, stats = criterion.with_stats(*arguments, target)
        return loss, stats.mass

    loss, mass = checkpoint(run, *arguments, use_reentrant=False)
    expected, stats = plain.with_stats(*arguments, target)
    assert torch.equal(mass, stats.mass)
    (gradient,) = torch.autograd.grad(loss + mass[0, 0], arguments[0], retain_graph=True)
    (wanted,) = torch.autograd.grad(expected + stats.mass[0, 0], arguments[0])
    assert torch.equal(gradient, wanted)
    assert_same_state(criterion, plain)


@pytest.mark.parametrize("name", PERTURBING)
def test_a_reentrant_checkpoint_warns_once_and_names_the_other(name):
    """Its value is that of evaluation, its gradient that of training: nothing that the loss could put right."""
    criterion = LOSSES[name]()
    before = copy.deepcopy(criterion.state_dict())
    with pytest.warns(UserWarning, match="use_reentrant=False") as caught:
        results = train(criterion, use_reentrant=True)
    assert len(caught) == 1
    assert torch.equal(results[0], loss_of(LOSSES[name]().eval(), *problem()).detach())
    assert all(torch.equal(value, before[key]) for key, value in criterion.state_dict().items())


def test_a_reentrant_checkpoint_of_a_loss_that_does_not_perturb_is_right():
    criterion = LOSSES["plain"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = train(criterion, use_reentrant=True)
    assert all(torch.equal(a, b) for a, b in zip(results, train(LOSSES["plain"]()), strict=True))


@pytest.mark.parametrize("name", PERTURBING)
def test_an_evaluation_between_the_steps_is_no_reentrant_checkpoint(name):
    criterion = LOSSES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            with torch.no_grad():  # and criterion.eval() forgotten
                loss_of(criterion, *problem(seed))
            train(criterion, use_reentrant=False)


def compiled_step(criterion, **options):
    def run(*arguments):
        return checkpoint(lambda *inputs: loss_of(criterion, *inputs), *arguments, use_reentrant=False)

    torch._dynamo.reset()
    return torch.compile(run, backend="aot_eager", **options)


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_checkpoint(name):
    """Losses with statistics break the graph there and run as they do without the compiler."""
    criterion, plain = LOSSES[name](), LOSSES[name]()
    step = compiled_step(criterion, fullgraph=name not in WITH_STATE)
    for seed in range(2):
        *inputs, target = problem(seed)
        loss, expected = step(*inputs, target), loss_of(plain, *inputs, target)
        torch.testing.assert_close(loss, expected)
        gradients = (torch.autograd.grad(x, inputs) for x in (loss, expected))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
    state, wanted = criterion.state_dict(), plain.state_dict()
    for key in wanted:
        torch.testing.assert_close(state[key], wanted[key], msg=key)


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_compiled_checkpoint_of_one_graph_refuses_statistics(name):
    """The recomputation of the compiler would merge the batch a second time before it uses the statistics."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        compiled_step(LOSSES[name](), fullgraph=True)(*problem())
