"""Bad input: an error that says what was expected, before any kernel."""

import re

import numpy as np
import pytest
import torch

import classfair
from classfair import MixedTarget, PairTerms, cross_entropy, cross_entropy_with_stats
from classfair.ops import label_index
from tests.support.pairs import runnable

LOGITS, TARGET = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
DENSE = torch.full((4, 3), 1 / 3)
TABLE = torch.zeros(3, 3)
PAIR = PairTerms(torch.zeros(3, 3), TARGET, torch.arange(3), torch.tensor(3))

BAD_CROSS_ENTROPY = [
    ([1.0], TARGET, {}, TypeError, "expected logits as a tensor, got list"),
    (LOGITS.long(), TARGET, {}, TypeError, "expected logits of dtype float16, .*, got torch.int64"),
    (LOGITS.to_sparse(), TARGET, {}, TypeError, "expected dense"),
    (torch.zeros(()), torch.zeros(()).long(), {}, ValueError, r"with C >= 1, got \(\)"),
    (torch.zeros(4, 0), TARGET, {}, ValueError, r"with C >= 1, got \(4, 0\)"),
    (LOGITS, [0, 1, 2, 0], {}, TypeError, "expected target as a tensor or MixedTarget, got list"),
    (LOGITS, TARGET.int(), {}, TypeError, "expected target of dtype torch.int64 or torch.uint8, got torch.int32"),
    (LOGITS, TARGET[:3], {}, ValueError, r"expected target of shape \(4,\), got \(3,\)"),
    (LOGITS, TARGET[:, None], {}, ValueError, r"expected target of shape \(4,\), got \(4, 1\)"),
    (LOGITS, DENSE[:3], {}, ValueError, r"expected target \(probabilities\) of shape \(4, 3\), got \(3, 3\)"),
    (LOGITS, TARGET.to("meta"), {}, ValueError, "expected target on the device of the logits, cpu, got meta"),
    (LOGITS, TARGET, {"weight": torch.ones(2)}, ValueError, r"expected weight of shape \(3,\), got \(2,\)"),
    (LOGITS, TARGET, {"weight": [1, 1, 1]}, TypeError, "expected weight as a floating tensor, got list"),
    (LOGITS, TARGET, {"weight": torch.ones(3, requires_grad=True)}, ValueError, "expected weight without gradient"),
    (
        LOGITS,
        TARGET,
        {"offset": torch.ones(3).long()},
        TypeError,
        "expected offset as a floating tensor, got torch.int64",
    ),
    (LOGITS, TARGET, {"offset": torch.ones(3, device="meta")}, ValueError, "expected offset on the device"),
    (LOGITS, TARGET, {"margin": torch.ones(3, 1)}, ValueError, r"expected margin of shape \(3,\), got \(3, 1\)"),
    (LOGITS, TARGET, {"pair": torch.ones(3, 2)}, ValueError, r"expected pair of shape \(3, 3\), got \(3, 2\)"),
    (LOGITS, TARGET, {"pair": PAIR * 1.0, "margin": torch.ones(2)}, ValueError, "expected margin"),
    (LOGITS[:2], TARGET[:2], {"pair": PAIR}, ValueError, r"expected pair.slot of shape \(2,\), got \(4,\)"),
    (LOGITS, TARGET, {"label_smoothing": 1.5}, ValueError, r"expected label_smoothing in \[0, 1\], got 1.5"),
    (LOGITS, TARGET, {"gamma": -1.0}, ValueError, r"expected gamma in \[0, 1000\], got -1.0"),
    (LOGITS, TARGET, {"reduction": "avg"}, ValueError, "expected reduction 'none', 'mean' or 'sum', got 'avg'"),
    (LOGITS, TARGET, {"backend": "cuda"}, ValueError, "expected backend 'native', 'triton' or 'reference', got 'cuda'"),
    (LOGITS, DENSE, {"pair": TABLE}, ValueError, "with pair, got probabilities; .*MixedTarget"),
    (LOGITS, DENSE, {"margin": torch.ones(3)}, ValueError, "with margin, got probabilities; .*MixedTarget"),
    (LOGITS, DENSE, {"gamma": 2.0}, ValueError, "expected hard labels with gamma > 0"),
    (LOGITS, DENSE, {"ignore_index": 1}, ValueError, "expected hard labels with ignore_index >= 0"),
    (LOGITS, MixedTarget(TARGET, TARGET, 1.5), {}, ValueError, r"expected target.lam in \[0, 1\], got 1.5"),
    (LOGITS, MixedTarget(TARGET, TARGET[:2], 0.5), {}, ValueError, r"expected target.y_b of shape \(4,\)"),
    (LOGITS, MixedTarget(TARGET, TARGET, torch.ones(4, requires_grad=True)), {}, ValueError, "lam without gradient"),
    (
        LOGITS,
        MixedTarget(TARGET, TARGET, torch.ones(3)),
        {},
        ValueError,
        r"expected target.lam that broadcasts to \(4,\), got \(3,\)",
    ),
    (LOGITS, MixedTarget(TARGET, TARGET, 0.5), {"pair": PAIR}, ValueError, r"expected pair.slot of shape \(8,\), got"),
]


@pytest.mark.parametrize(("logits", "target", "keywords", "error", "match"), BAD_CROSS_ENTROPY)
def test_cross_entropy(logits, target, keywords, error, match):
    with pytest.raises(error, match="^(cross_entropy|softmax_loss): .*" + match):
        cross_entropy(logits, target, **keywords)


BAD_STATS = [
    (TARGET, {"group": TARGET}, ValueError, "expected num_groups with group, got None"),
    (TARGET, {"num_groups": 0}, ValueError, "expected num_groups >= 1, got 0"),
    (TARGET, {"group": TARGET[:2], "num_groups": 2}, ValueError, r"expected group of shape \(4,\), got \(2,\)"),
    (TARGET, {"group": TARGET.bool(), "num_groups": 2}, TypeError, "expected group of dtype torch.int64"),
    (DENSE, {}, ValueError, "expected label=.* with probability targets, got None"),
    (TARGET, {"label": TARGET}, ValueError, "expected label only with probability targets"),
]


@pytest.mark.parametrize(("target", "keywords", "error", "match"), BAD_STATS)
def test_cross_entropy_with_stats(target, keywords, error, match):
    with pytest.raises(error, match="^cross_entropy_with_stats: " + match):
        cross_entropy_with_stats(LOGITS, target, **keywords)


def test_confusion_is_refused_where_it_would_be_large():
    with pytest.raises(ValueError, match=r"expected at most 4096 classes with confusion=True, got 5000 \(0.2 GB\)"):
        cross_entropy_with_stats(torch.zeros(1, 5000), torch.tensor([0]), confusion=True)


@pytest.mark.parametrize("backend", [b for b, d in runnable("softmax_loss") if d == "cpu"])
class TestLabelsOutOfRange:
    @pytest.mark.parametrize("bad", [3, -1, 2**31, 2**32 + 1, -(2**63)])
    def test_names_the_first_row(self, bad, backend):
        target = torch.zeros(100, dtype=torch.int64)
        target[70], target[90] = bad, 17
        message = re.escape(f"softmax_loss: expected label in [0, 3) or ignore_index -100, got {bad} at row 70")
        with pytest.raises(IndexError, match=f"^{message}$"):
            cross_entropy(torch.zeros(100, 3), target, backend=backend)

    def test_second_label_of_a_mixed_target(self, backend):
        mixed = MixedTarget(TARGET, torch.tensor([0, 0, 9, 0]), 0.5)
        with pytest.raises(IndexError, match="got 9 at row 2"):
            cross_entropy(LOGITS, mixed, backend=backend)

    def test_group(self, backend):
        group = torch.tensor([0, 1, -1, 2])
        with pytest.raises(IndexError, match=r"expected group in \[0, 2\) or -1, got 2 at row 3"):
            cross_entropy_with_stats(LOGITS, TARGET, group=group, num_groups=2, backend=backend)

    def test_names_the_first_row_also_where_rows_are_visited_by_group(self, backend):
        group, target = torch.arange(100).flip(0) // 50, torch.zeros(100, dtype=torch.int64)
        target[20], target[70], group[90] = 400, 500, 60
        with pytest.raises(IndexError, match="got 400 at row 20"):
            cross_entropy_with_stats(torch.zeros(100, 300), target, group=group, num_groups=60, backend=backend)

    def test_ignored_rows_may_have_any_group(self, backend):
        _, stats = cross_entropy_with_stats(
            LOGITS,
            torch.tensor([0, 1, 2, -100]),
            group=torch.tensor([0, 1, 1, 77]),
            num_groups=2,
            backend=backend,
        )
        assert stats.count.sum().item() == 3

    def test_label_index(self, backend):
        with pytest.raises(IndexError, match=r"label_index: expected label in \[0, 3\).*, got 3 at row 1"):
            label_index(torch.tensor([0, 3]), 3, backend=backend)
        with pytest.raises(IndexError, match=r"label_index: expected group in \[0, 2\) or -1, got 5 at row 1"):
            label_index(torch.tensor([0, 1]), 3, torch.tensor([0, 5]), 2, backend=backend)


@pytest.mark.parametrize(
    ("counts", "error", "match"),
    [
        ([3, -1], ValueError, "expected finite class counts >= 0, got -1 for class 1"),
        ([3, float("nan")], ValueError, "got nan for class 1"),
        ([float("inf"), 1], ValueError, "got inf for class 0"),
        ([0, 0], ValueError, "expected at least one non-zero class count"),
        ([], ValueError, r"of shape \(C,\) with C >= 1, got \(0,\)"),
        ([[1, 2]], ValueError, r"of shape \(C,\) with C >= 1, got \(1, 2\)"),
        ("many", TypeError, "expected class_counts as a tensor, array or sequence of numbers, got str"),
    ],
)
@pytest.mark.parametrize("function", [classfair.LogitAdjustedLoss, classfair.logit_adjustment])
def test_class_counts_of_losses(function, counts, error, match):
    with pytest.raises(error, match="logit_adjustment: .*" + match):
        function(counts)


def test_a_class_without_samples_is_warned_about():
    with pytest.warns(UserWarning, match="1 of 3 classes have no sample"):
        offset = classfair.logit_adjustment([5, 0, 5])
    assert offset[1].item() == pytest.approx(np.log(1e-12))


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        ([0, 1, 5], ValueError, r"expected labels in \[0, 3\), got 5 at position 2"),
        ([0, -1], ValueError, ".*got -1 at position 1"),
        ([0.5], TypeError, "expected integer labels, got torch.float64"),
        (torch.eye(3, dtype=torch.int64), TypeError, r"expected labels, got one-hot rows of shape \(3, 3\); argmax"),
        ([[0, 1, 0], [1, 0, 0]], TypeError, r"expected labels, got one-hot rows of shape \(2, 3\); argmax"),
        (iter([1]), TypeError, "expected integer labels or a data set with .targets"),
    ],
)
def test_class_counts(targets, error, match):
    with pytest.raises(error, match="class_counts: " + match):
        classfair.class_counts(targets, 3)


def test_posthoc_counts_of_another_size():
    with pytest.raises(ValueError, match=r"expected class_counts of shape \(3,\), got \(2,\)"):
        classfair.posthoc_logit_adjustment(LOGITS, [1, 2])


def test_pair_terms_of_different_batches_do_not_add():
    with pytest.raises(ValueError, match=r"expected rows of shape \(3, 3\), got \(2, 3\)"):
        PAIR + PairTerms(torch.zeros(2, 3), TARGET, torch.arange(2), torch.tensor(2))


def test_a_named_backend_is_never_replaced(monkeypatch):
    monkeypatch.setitem(classfair.backends._available, ("softmax_loss", "cpu"), ("reference",))
    with pytest.raises(
        RuntimeError, match=r"backend 'native' cannot run on device 'cpu' .*available here: 'reference'"
    ):
        cross_entropy(LOGITS, TARGET, backend="native")


def test_kernels_built_for_other_gpus_are_passed_over(monkeypatch):
    monkeypatch.setitem(classfair.backends._available, ("softmax_loss", "cuda"), ("native", "triton", "reference"))
    monkeypatch.setitem(classfair.backends._unusable, 3, "no kernel image is available")
    monkeypatch.setitem(classfair.backends._unusable, 4, "")
    monkeypatch.delitem(classfair.backends.load_errors, "_cuda", raising=False)
    old, new = torch.device("cuda:3"), torch.device("cuda:4")
    assert classfair.backends.choose("softmax_loss", old, None) == "triton"
    assert classfair.backends.choose("softmax_loss", new, None) == "native"
    with pytest.raises(
        RuntimeError,
        match=r"cannot run on device 'cuda:3' \(classfair._cuda: no kernel image .*here: 'triton', 'reference'",
    ):
        classfair.backends.choose("softmax_loss", old, "native")


@pytest.mark.skipif(
    "native" not in classfair.backends.available("softmax_loss", "cpu"), reason="no compiled CPU kernels"
)
def test_no_memory_is_said_in_torchs_words():
    """Those who then retry with less look for them."""
    group = torch.zeros(len(TARGET), dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"DefaultCPUAllocator: can't allocate memory\..*\d{14} elements"):
        cross_entropy_with_stats(LOGITS, TARGET, group=group, num_groups=2**45, backend="native")
