"""Schedules: what an epoch computes, and that a resumed run continues bit for bit."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from classfair import (
    ClassBalancedLoss,
    CrossEntropyLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    Warmup,
    cross_entropy,
    effective_number_weights,
)

COUNTS = [80, 15, 5]
USER = torch.tensor([0.5, 1.0, 2.0])
RAMPED = {
    "LogitAdjustedLoss": lambda **k: LogitAdjustedLoss(COUNTS, **k),
    "LDAMLoss": lambda **k: LDAMLoss(COUNTS, scale=4.0, **k),
    "ClassBalancedLoss": lambda **k: ClassBalancedLoss(COUNTS, beta=0.99, gamma=1.0, **k),
}
VECTOR = {"LogitAdjustedLoss": "offset", "LDAMLoss": "margin", "ClassBalancedLoss": "reweight"}


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=g, requires_grad=True), torch.randint(0, 3, (12,), generator=g)


def value_and_gradient(criterion, batch):
    logits, target = batch
    loss = criterion(logits, target)
    return loss.detach(), *torch.autograd.grad(loss, logits)


def assert_equal(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("weight", [None, USER])
def test_deferred_reweighting(batch, weight):
    """Cao et al., algorithm 1: plain until `start`, weighted by the effective number from then on."""
    logits, target = batch
    criterion = CrossEntropyLoss(weight)
    schedule = DeferredReweighting(criterion, COUNTS, start=3, beta=0.99)
    effective = torch.tensor([(1 - 0.99) / (1 - 0.99**n) for n in COUNTS])
    user = torch.ones(3) if weight is None else weight
    for epoch in range(5):
        assert schedule.last_epoch == epoch
        expected = F.cross_entropy(logits, target, user * effective if epoch >= 3 else user)
        torch.testing.assert_close(criterion(logits, target), expected)
        criterion.eval()
        torch.testing.assert_close(criterion(logits, target), F.cross_entropy(logits, target, weight))
        criterion.train()
        schedule.step()


def test_deferred_reweighting_from_the_first_epoch():
    criterion = LDAMLoss(COUNTS)
    DeferredReweighting(criterion, COUNTS, start=0)
    assert torch.equal(criterion.reweight, effective_number_weights(COUNTS, 0.9999))


@pytest.mark.parametrize("name", RAMPED)
def test_warmup(name):
    full = RAMPED[name]()
    criterion = RAMPED[name](weight=USER)
    vector = getattr(full, VECTOR[name])
    schedule = Warmup(criterion, epochs=4)
    held = getattr(criterion, VECTOR[name])
    for epoch in range(7):
        s = min(1.0, epoch / 4)
        expected = 1 + (vector - 1) * s if name == "ClassBalancedLoss" else vector * s
        torch.testing.assert_close(getattr(criterion, VECTOR[name]), expected)
        if epoch >= 4:
            assert torch.equal(held, vector)
        schedule.step()
    assert getattr(criterion, VECTOR[name]) is held  # written in place


@pytest.mark.parametrize("name", ["LogitAdjustedLoss", "LDAMLoss"])
def test_warmup_begins_with_plain_cross_entropy(batch, name):
    criterion = RAMPED[name](weight=USER)
    assert not torch.equal(criterion(*batch), cross_entropy(*batch, weight=USER))
    Warmup(criterion, epochs=2)
    assert torch.equal(criterion(*batch), cross_entropy(*batch, weight=USER))


def test_warmup_of_weights_begins_with_the_users(batch):
    criterion = ClassBalancedLoss(COUNTS, gamma=1.0, weight=USER)
    Warmup(criterion, epochs=2)
    assert torch.equal(criterion(*batch), cross_entropy(*batch, weight=USER, gamma=1.0))


def run(criterion, schedules, batch, epochs):
    history = []
    for _ in range(epochs):
        history.append(value_and_gradient(criterion, batch))
        for schedule in schedules:
            schedule.step()
    return history


def drw_of(criterion):
    return DeferredReweighting(criterion, COUNTS, start=4, beta=0.9)


def warmup_of(criterion):
    return Warmup(criterion, epochs=3)


@pytest.mark.parametrize("order", list(itertools.permutations(["criterion", "warmup", "drw"])), ids="-".join)
@pytest.mark.parametrize("constructed", ["before", "after"])
@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("name", ["LogitAdjustedLoss", "LDAMLoss"])
def test_resumes_bit_equal_in_any_order(batch, tmp_path, name, stop, constructed, order):
    """Loaded in any order, and constructed before or after the criterion's state was loaded."""
    criterion = RAMPED[name](weight=USER)
    schedules = [warmup_of(criterion), drw_of(criterion)]
    run(criterion, schedules, batch, stop)
    state = {
        "criterion": criterion.state_dict(),
        "warmup": schedules[0].state_dict(),
        "drw": schedules[1].state_dict(),
    }
    torch.save(state, tmp_path / "state.pt")
    expected = run(criterion, schedules, batch, 7 - stop)

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = type(criterion)([1, 2, 3], weight=USER)  # of other counts: the states must say it all
    if constructed == "after":
        resumed.load_state_dict(state["criterion"])
    warmup = Warmup(resumed, epochs=9)
    drw = DeferredReweighting(resumed, [1, 2, 3], start=8)
    parts = {"criterion": resumed, "warmup": warmup, "drw": drw}
    for part in order:
        if part != "criterion" or constructed == "before":
            parts[part].load_state_dict(state[part])
    if name == "LDAMLoss":
        assert resumed.scale != criterion.scale  # the margins in the state are scaled
    for got, wanted in zip(run(resumed, [warmup, drw], batch, 7 - stop), expected, strict=True):
        assert_equal(got, wanted)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_warmup_of_weights_resumes_bit_equal(batch, stop):
    criterion = RAMPED["ClassBalancedLoss"]()
    warmup = warmup_of(criterion)
    run(criterion, [warmup], batch, stop)
    states = copy.deepcopy((criterion.state_dict(), warmup.state_dict()))
    expected = run(criterion, [warmup], batch, 3)
    resumed = RAMPED["ClassBalancedLoss"]()
    again = warmup_of(resumed)
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    for got, wanted in zip(run(resumed, [again], batch, 3), expected, strict=True):
        assert_equal(got, wanted)


def test_going_back_to_an_earlier_epoch_takes_the_weights_away():
    criterion = CrossEntropyLoss()
    schedule = DeferredReweighting(criterion, COUNTS, start=1)
    before = copy.deepcopy(schedule.state_dict())
    schedule.step()
    assert criterion.reweight is not None
    schedule.load_state_dict(before)
    assert schedule.last_epoch == 0
    assert criterion.reweight is None


@pytest.mark.parametrize("first", ["warmup", "drw"])
def test_both_compose_in_any_order(first):
    """One has the margins, the other the weights; neither sees the other."""
    criterion = LDAMLoss(COUNTS, scale=4.0)
    makers = [warmup_of, drw_of] if first == "warmup" else [drw_of, warmup_of]
    schedules = [make(criterion) for make in makers]
    alone = [LDAMLoss(COUNTS, scale=4.0), LDAMLoss(COUNTS, scale=4.0)]
    apart = [warmup_of(alone[0]), drw_of(alone[1])]
    for _ in range(6):
        assert torch.equal(criterion.margin, alone[0].margin)
        a, b = criterion.reweight, alone[1].reweight
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
        for schedule in (*schedules, *apart):
            schedule.step()
    assert a is not None


def test_compiled_code_is_not_compiled_again_every_epoch(batch):
    torch._dynamo.reset()
    counter = CompileCounter()
    criterion = LogitAdjustedLoss(COUNTS)
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    warmup = Warmup(compiled, epochs=5)
    drw = DeferredReweighting(compiled, COUNTS, start=3)
    frames = []
    for epoch in range(6):
        loss = compiled(*batch)
        s = min(1.0, epoch / 5)
        offset = s * torch.tensor(COUNTS).div(100).log()
        weight = effective_number_weights(COUNTS, 0.9999) if epoch >= 3 else None
        torch.testing.assert_close(loss, F.cross_entropy(batch[0] + offset, batch[1], weight))
        frames.append(counter.frame_count)
        warmup.step()
        drw.step()
    assert frames == [1, 1, 1, 2, 2, 2]  # once more, when the weights come
    torch._dynamo.reset()


def test_buffers_stay_on_their_device_and_keep_their_precision():
    criterion = LDAMLoss(COUNTS)
    warmup, drw = Warmup(criterion, 2), DeferredReweighting(criterion, COUNTS, start=1)
    criterion.to(torch.bfloat16)
    for schedule in (warmup, drw):
        schedule.step()
    assert criterion.margin.dtype == criterion.reweight.dtype == torch.float32
    criterion.to("meta")
    for schedule in (warmup, drw):
        schedule.step()
    assert criterion.margin.device.type == criterion.reweight.device.type == "meta"
    assert all(t.device.type == "cpu" for t in (warmup.full["margin"], drw.weights))


BAD = [
    (lambda: Warmup(FocalLoss(), 5), ValueError, r"Warmup: expected criterion with an offset, a margin or .*FocalLoss"),
    (lambda: Warmup(CrossEntropyLoss(), 5), ValueError, r"Warmup: .*got CrossEntropyLoss"),
    (lambda: Warmup(LDAMLoss(COUNTS), 0), ValueError, r"Warmup: expected epochs >= 1, got 0"),
    (lambda: Warmup(LDAMLoss(COUNTS), "5"), TypeError, r"Warmup: expected epochs as a number, got str"),
    (lambda: Warmup(torch.nn.CrossEntropyLoss(), 5), TypeError, r"Warmup: expected criterion as a loss of classfair"),
    (
        lambda: DeferredReweighting(ClassBalancedLoss(COUNTS), COUNTS, start=1),
        ValueError,
        r"DeferredReweighting: expected criterion without class weights of its own, got ClassBalancedLoss",
    ),
    (lambda: DeferredReweighting(LDAMLoss(COUNTS), COUNTS, start=-1), ValueError, r"expected start >= 0, got -1"),
    (lambda: DeferredReweighting(LDAMLoss(COUNTS), COUNTS, start=1, beta=1), ValueError, r"beta in \[0, 1\), got 1"),
    (
        lambda: DeferredReweighting(LDAMLoss(COUNTS), [1, 2], start=9),
        ValueError,
        r"LDAMLoss: expected reweight of the shape of margin, \(3,\), got \(2,\)",
    ),
    (lambda: DeferredReweighting(None, COUNTS, start=1), TypeError, r"DeferredReweighting: .*got NoneType"),
    (
        lambda: DeferredReweighting(LDAMLoss(COUNTS), COUNTS, start=1).load_state_dict({"last_epoch": 1}),
        ValueError,
        r"DeferredReweighting: expected a state with \['last_epoch', 'start', 'weights'\], got \['last_epoch'\]",
    ),
    (
        lambda: Warmup(LDAMLoss(COUNTS), 1).load_state_dict(Warmup(LogitAdjustedLoss(COUNTS), 1).state_dict()),
        ValueError,
        r"Warmup: expected a state of \['margin'\], got one of \['offset'\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match[:60] for _, _, match in BAD])
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_second_warmup_is_refused():
    """It would take the ramped vectors, at epoch 0 zeros, for the full ones."""
    criterion = LogitAdjustedLoss(COUNTS)
    Warmup(criterion, 5)
    for again in (criterion, copy.deepcopy(criterion)):
        with pytest.raises(ValueError, match="Warmup: expected criterion without a Warmup, got LogitAdjustedLoss"):
            Warmup(again, 5)
