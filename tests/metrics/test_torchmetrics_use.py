"""The torchmetrics classes in use: states, collections, wrappers, processes, plots and errors."""

import math
import pickle
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAUROC

import classfair.metrics as cm
from classfair import cross_entropy_with_stats, equalized_odds_loss
from tests.support.metric_cases import (
    AVERAGED,
    CLASSES,
    GROUPS,
    MAKERS,
    UNEQUAL,
    Forbidden,
    assert_same,
    penalties_of,
    run_rank,
    run_unequal_rank,
    samples,
    values,
)
from tests.support.processes import run_processes

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
every_metric = pytest.mark.parametrize("name", MAKERS)


# --- states -----------------------------------------------------------------------------------------------------------


@every_metric
def test_copies_and_resets(name):
    logits, target, group = samples()
    metric, other = MAKERS[name](), MAKERS[name]()
    metric.update(logits[:80], target[:80], group[:80])
    assert metric.state_dict() == {}
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert_same(copy.compute(), metric.compute(), exact=True)
        copy.update(logits[80:], target[80:], group[80:])
        other.update(logits[80:], target[80:], group[80:])
        other.merge_state(metric)
        assert_same(other.compute(), copy.compute())
        other.reset()
    fresh = MAKERS[name]()
    fresh.update(logits[:80], target[:80], group[:80])
    metric.reset()
    metric.update(logits[:80], target[:80], group[:80])
    assert_same(metric.compute(), fresh.compute(), exact=True)


@every_metric
def test_states_keep_their_precision(name):
    logits, target, group = samples()
    metric, expected = MAKERS[name](), MAKERS[name]()
    expected.update(logits, target, group)
    metric.update(logits[:90], target[:90], group[:90])
    metric.half().to(torch.bfloat16)
    torch.nn.ModuleDict({"metric": metric}).to(torch.float16)
    metric.update(logits[90:], target[90:], group[90:])
    for state, default in metric._defaults.items():
        if isinstance(default, torch.Tensor):
            assert getattr(metric, state).dtype == default.dtype in (torch.int64, torch.float64)
    assert_same(metric.compute(), expected.compute())
    metric.reset()
    assert metric.to("meta").device.type == "meta"


def test_memory_is_groups_times_classes():
    classes, groups = 21841, 3
    counts = torch.arange(classes)
    for metric in (
        cm.PerClassAccuracy(classes, groups),
        cm.EqualizedOdds(classes, groups),
        cm.GroupIoU(classes, groups),
        cm.ShotAccuracy(counts, num_groups=groups),
        cm.PredictionBias(classes, groups),
    ):
        assert sum(s.numel() for s in metric.metric_state.values()) <= 5 * groups * classes + 8
    labels = cm.WorstClassAccuracy(classes, preds="labels")
    labels.update(counts, counts.flip(0))
    assert labels.compute() == 0
    with pytest.raises(ValueError, match=r"ConfusionMatrix: expected at most 4096 classes, got 21841 \(3.8 GB\)"):
        cm.ConfusionMatrix(classes)


@every_metric
def test_updates_do_not_wait_for_the_device(name):
    logits, target, group = samples()
    _, stats = cross_entropy_with_stats(logits, target, group=group, num_groups=GROUPS, confusion=True)
    metric = MAKERS[name]()
    with Forbidden():
        metric.update(logits, target, group)
        metric.update_from(stats)
        metric.compute()
    average = cm.BatchAverage(MAKERS["odds"]())
    with Forbidden():
        average.update(logits, target, group)


def test_labels_do_not_wait_for_another_device_either():
    metric = MAKERS["odds"](preds="labels").to("meta")  # a device from which nothing can be read
    rows = torch.zeros(7, dtype=torch.int64, device="meta")
    metric.update(rows, rows, rows)
    assert metric.count.device.type == "meta"


# --- collections and wrappers -----------------------------------------------------------------------------------------


def test_a_collection_updates_equal_states_once():
    names = [n for n in sorted(MAKERS) if n != "confusion"]
    logits, target, group = samples()
    collection = MetricCollection({n: MAKERS[n]() for n in names})
    saved = MetricCollection({n: MAKERS[n]() for n in names})
    for rows in (slice(0, 60), slice(60, 200)):
        collection.update(logits[rows], target[rows], group=group[rows])
        _, stats = cross_entropy_with_stats(logits[rows], target[rows], group=group[rows], num_groups=GROUPS)
        saved.update(stats)
    assert len(collection.compute_groups) == 2  # one group of samples, or GROUPS
    a, b = collection.compute(), saved.compute()
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-6)
    assert a["balanced"] == cm.balanced_accuracy(a["per-class"])


def test_groups_of_statistics_are_added_up():
    logits, target, group = samples()
    group[:50] = -1
    _, stats = cross_entropy_with_stats(logits, target, group=group, num_groups=GROUPS)
    saved, direct = cm.PerClassAccuracy(CLASSES), cm.PerClassAccuracy(CLASSES)
    saved.update_from(stats)
    direct.update(logits, target, group)
    assert saved.count.sum() == 150
    assert direct.count.sum() == 200


def test_a_collection_keeps_different_readings_apart():
    logits, target, _ = samples()
    collection = MetricCollection(
        {"all": cm.BalancedAccuracy(CLASSES), "without": cm.BalancedAccuracy(CLASSES, ignore_index=0)}
    )
    first = target != 0  # both have the same states after it
    collection.update(logits[first], target[first])
    collection.update(logits[~first], target[~first])
    acc = cm.PerClassAccuracy(CLASSES)
    acc.update(logits, target)
    result = collection.compute()
    assert result["all"] == acc.compute().mean()
    assert result["without"] == acc.compute()[1:].mean()


def test_members_of_a_collection_can_be_updated_one_by_one():
    logits, target, _ = samples()
    collection = MetricCollection([cm.BalancedAccuracy(CLASSES), cm.WorstClassAccuracy(CLASSES)])
    collection.update(logits, target)
    _, stats = cross_entropy_with_stats(logits, target)
    for metric in collection.values(copy_state=False):
        metric.update_from(stats)
    for metric in collection.values():
        assert metric.count.sum() == 400


def test_batch_average_by_hand():
    logits, target, group = samples()
    group[:100] = 0  # the first batch has one group: no spread, left out
    metric = cm.BatchAverage(cm.GroupIoU(CLASSES, GROUPS))
    total = 0.0
    for rows in (slice(0, 40), slice(100, 160), slice(160, 200)):
        metric.update(logits[rows], target[rows], group[rows])
        if rows.start:
            one = cm.GroupIoU(CLASSES, GROUPS)
            one.update(logits[rows], target[rows], group[rows])
            total += one.compute().item() * (rows.stop - rows.start)
    assert metric.compute().item() == pytest.approx(total / 100)
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    metric.reset()
    assert math.isnan(metric.compute())


def test_batch_averages_never_share_states():
    logits, target, _ = samples()
    perfect = torch.nn.functional.one_hot(target, CLASSES).float()
    collection = MetricCollection(
        {k: cm.BatchAverage(m(CLASSES)) for k, m in (("best", cm.BestClassAccuracy), ("worst", cm.WorstClassAccuracy))}
    )
    collection.update(perfect, target)  # both 1
    collection.update(logits, target)
    result = collection.compute()
    assert result["best"] > result["worst"]


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_equal_one(tmp_path):
    """One, two and three processes, one of which never has a sample."""
    logits, target, group = samples()
    results = run_processes(run_rank, 3, tmp_path)
    assert [len(results[rank]) for rank in range(3)] == [3 * len(AVERAGED), 2 * len(AVERAGED), len(AVERAGED)]
    for name, make in AVERAGED.items():
        metric = make()
        for first in range(0, 200, 50):
            rows = slice(first, first + 50)
            metric.update(logits[rows], target[rows], group[rows])
        expected = values(metric.compute())
        for rank in range(3):
            for processes in range(rank + 1, 4):
                for x, y in zip(results[rank][processes, name], expected, strict=True):
                    np.testing.assert_allclose(x, y, rtol=1e-12, err_msg=name)


@pytest.mark.slow
def test_penalties_as_metrics_of_unequal_processes(tmp_path):
    """Two batches and three: no collective of a penalty inside ``compute``."""
    results = run_processes(run_unequal_rank, 2, tmp_path)
    alone, together = penalties_of(UNEQUAL[0]), penalties_of(UNEQUAL[0] + UNEQUAL[1])
    assert results[0][0] == pytest.approx(alone, rel=1e-9)
    for rank in range(2):
        assert results[rank][1] == pytest.approx(together, rel=1e-9)
        refused = results[rank][2]
        for name in ("BalancedAccuracy", "BatchAverage"):
            message = f"{name}.update_from: expected statistics of this process, got those of all processes"
            assert refused[name] == (message, message)
        assert refused["not synced"] == refused["one process"] == (None, None)


# --- plots ------------------------------------------------------------------------------------------------------------


@every_metric
def test_plots(name):
    import matplotlib.pyplot as plt

    logits, target, group = samples()
    metric = MAKERS[name]()
    metric.update(logits, target, group)
    figure, axes = metric.plot()
    assert figure is not None
    assert axes.has_data()
    assert metric.plot(ax=plt.figure().subplots())[0] is None
    plt.close("all")
    if not isinstance(metric.compute(), dict) and metric.compute().dim() == 0:
        _, axes = metric.plot([metric.compute(), metric.compute()])
        assert axes.get_xlabel() == "Step"
    plt.close("all")


def test_rows_of_equalized_odds_are_named():
    import matplotlib.pyplot as plt

    for reduction, expected in (("overall", ["TPR", "FPR"]), ("by_group", ["TPR 0", "TPR 1", "FPR 0", "FPR 1"])):
        metric = cm.EqualizedOdds(3, 2, reduction=reduction)
        metric.update(torch.eye(3), torch.arange(3), torch.tensor([0, 1, 1]))
        _, axes = metric.plot()
        assert [label.get_text() for label in axes.get_yticklabels()] == expected
        assert axes.get_ylabel().startswith("rate of")
    plt.close("all")


# --- errors -----------------------------------------------------------------------------------------------------------

ROWS = (torch.zeros(4, CLASSES), torch.zeros(4, dtype=torch.int64))
STATS = cross_entropy_with_stats(*ROWS)[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cm.BalancedAccuracy(0), "BalancedAccuracy: expected num_classes >= 1, got 0"),
        (lambda: cm.BalancedAccuracy(2.0), "BalancedAccuracy: expected num_classes as an int, got float"),
        (lambda: cm.DemographicParity(2, 0), "DemographicParity: expected num_groups >= 1, got 0"),
        (lambda: cm.BalancedAccuracy(2, preds="raw"), "BalancedAccuracy: expected preds 'logits', 'probabilities' or"),
        (lambda: cm.BalancedAccuracy(2, ignore_index=None), "BalancedAccuracy: expected ignore_index as an int"),
        (lambda: cm.PerClassAccuracy(2, confidence=1.0), r"PerClassAccuracy: expected confidence in \(0, 1\), got 1.0"),
        (lambda: cm.PerClassAccuracy(2, confidence="95"), "PerClassAccuracy: expected confidence as a number, got str"),
        (lambda: cm.ShotAccuracy([1, 2], few="5"), "ShotAccuracy: expected few as a number, got str"),
        (lambda: cm.ShotAccuracy([1, 2], many=None), "ShotAccuracy: expected many as a number, got NoneType"),
        (lambda: cm.GeometricMeanAccuracy(2, eps=0), r"GeometricMeanAccuracy: expected eps in \(0, 1\], got 0"),
        (lambda: cm.ShotAccuracy([[1]]), r"ShotAccuracy: expected train_count of shape \(C,\)"),
        (lambda: cm.ShotAccuracy([1], many=1, few=2), "ShotAccuracy: expected 0 <= few <= many"),
        (lambda: cm.DifficultyAccuracy([1.5]), r"DifficultyAccuracy: expected accuracies in \[0, 1\] or nan, got 1.5"),
        (lambda: cm.CumulativeFalsePositives([-1]), "CumulativeFalsePositives: expected finite train_count"),
        (lambda: cm.PredictionBias(2, preds="labels"), "PredictionBias: expected preds 'logits' or 'probabilities'"),
        (lambda: cm.PredictionBias(2, normalize="l2"), "PredictionBias: expected normalize 'none', 'sum' or 'samples'"),
        (lambda: cm.DemographicParity(2, 2, reduction="std"), "DemographicParity: expected reduction 'difference'"),
        (lambda: cm.EqualizedOdds(2, 2, soft=True, preds="labels"), "EqualizedOdds: expected preds 'logits' or"),
        (lambda: cm.StatsMetric(3, None), "StatsMetric: expected function to be callable, got NoneType"),
        (
            lambda: cm.StatsMetric(3, equalized_odds_loss, num_groups=2),
            r"^StatsMetric: expected a function of sums over batches, .*EqualizedOdds\(soft=...\)\), got ValueError",
        ),
        (lambda: cm.ConfusionMatrix(5, num_groups=2), "ConfusionMatrix: expected num_groups=1 .*, got 2"),
        (lambda: cm.CumulativeFalsePositives([1], num_groups=2), "CumulativeFalsePositives: expected num_groups=1 .*2"),
        (lambda: cm.BatchAverage(MulticlassAUROC(3)), "BatchAverage: expected a ClassMetric, got MulticlassAUROC"),
        (lambda: cm.BatchAverage(cm.ShotAccuracy([1])), "BatchAverage: expected a metric with one tensor, got dict"),
        (lambda: cm.BalancedAccuracy(3).update(*ROWS), r"BalancedAccuracy: expected logits of shape \(N, 3\) or"),
        (lambda: cm.BalancedAccuracy(5).update(ROWS[0]), "BalancedAccuracy: expected target with preds, got None"),
        (
            lambda: cm.BalancedAccuracy(5).update(ROWS[1], ROWS[1]),
            "expected logits as a floating tensor, got torch.int",
        ),
        (lambda: cm.BalancedAccuracy(5).update(STATS, ROWS[1]), "BalancedAccuracy: expected statistics alone"),
        (lambda: cm.BalancedAccuracy(5).update_from(1), "BalancedAccuracy: expected stats as BatchStats, got int"),
        (lambda: cm.BalancedAccuracy(3).update_from(STATS), r"expected statistics of shape \(1, 3\), got \(1, 5\)"),
        (lambda: cm.DemographicParity(5, 2).update_from(STATS), r"expected statistics of shape \(2, 5\), got \(1, 5\)"),
        (lambda: cm.DemographicParity(5, 2).update(*ROWS), "DemographicParity: expected group with num_groups=2"),
        (lambda: cm.ConfusionMatrix(5).update(STATS), "ConfusionMatrix: expected statistics made with confusion=True"),
        (lambda: cm.BalancedAccuracy(5).to("meta").update(*ROWS), "expected statistics on the device of the metric"),
        (
            lambda: cm.BalancedAccuracy(5, preds="labels").update(ROWS[1], ROWS[1] + 5),
            r"BalancedAccuracy: expected labels in \[0, 5\) and groups in \[-1, 1\), got others in row 0",
        ),
        (lambda: cm.BalancedAccuracy(5, preds="labels").update(*ROWS), "expected preds of dtype torch.int64"),
        (
            lambda: cm.BalancedAccuracy(5).update(ROWS[0], ROWS[1][1:]),
            r"BalancedAccuracy: expected target of shape \(4,\)",
        ),
        (
            lambda: cm.GroupIoU(5, 2).update(*ROWS, ROWS[0]),
            "GroupIoU: expected group of dtype torch.int64, got torch.f",
        ),
        (lambda: cm.BalancedAccuracy(5).update(ROWS[0], ROWS[1] + 5), r"expected label in \[0, 5\)"),
        (lambda: cm.BalancedAccuracy(5, no_such_option=1), "Unexpected keyword arguments: `no_such_option`"),
    ],
)
def test_wrong_use_says_what_was_expected(call, message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call()


def test_a_refused_batch_leaves_the_states_alone():
    metric = cm.BalancedAccuracy(5)
    metric.update(*ROWS)
    with pytest.raises(IndexError):
        metric.update(ROWS[0], ROWS[1] + 7)
    assert metric.count.sum() == 4


def test_without_torchmetrics_the_functions_work_and_the_classes_name_the_extra():
    code = """
import sys
sys.modules["torchmetrics"] = None
import classfair, classfair.metrics
from classfair import metrics
assert metrics.balanced_accuracy([0.5, 1.0]) == 0.75
assert "BalancedAccuracy" in dir(metrics)
for name in sorted(metrics._MODULE):
    try:
        getattr(metrics, name)
    except ModuleNotFoundError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert len(lines) == len(cm._MODULE)
    remedy = 'expected torchmetrics, got none; pip install "classfair[metrics]"'
    assert lines[0] == f"classfair.metrics.BalancedAccuracy: {remedy}"


@pytest.mark.slow
def test_metrics_come_with_the_package_when_they_are_asked_for():
    code = """
import sys, classfair
assert "classfair.metrics" not in sys.modules
assert classfair.metrics.balanced_accuracy([0.5, 1.0]) == 0.75
assert "torchmetrics" not in sys.modules
classfair.metrics.BalancedAccuracy(2)
try:
    classfair.metric
except AttributeError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "module 'classfair' has no attribute 'metric'\n"


def test_names():
    assert {name for name in cm.__all__ if name[0].isupper()} == set(cm._MODULE)
    for name in cm.__all__:
        documentation = getattr(cm, name).__doc__
        assert ">>>" in documentation, name
    with pytest.raises(AttributeError, match="no attribute 'NoSuch'"):
        cm.NoSuch  # noqa: B018
