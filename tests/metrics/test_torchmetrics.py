"""The torchmetrics classes: against scikit-learn, fairlearn, torchmetrics and the functions; inputs and corners."""

import math
import warnings

import numpy as np
import pytest
import torch
from fairlearn import metrics as fairlearn
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

import classfair.metrics as cm
from classfair import cross_entropy_with_stats, prediction_bias
from tests.support.metric_cases import (
    CLASSES,
    GROUPS,
    MAKERS,
    REFERENCE,
    TRAIN_COUNT,
    Forbidden,
    assert_same,
    samples,
    values,
)

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
every_metric = pytest.mark.parametrize("name", MAKERS)


def predictions(logits, target):
    return logits.argmax(1).numpy(), target.numpy()


# --- values -----------------------------------------------------------------------------------------------------------


def test_accuracies_equal_the_functions():
    logits, target, group = samples()
    prediction, truth = predictions(logits, target)
    matrix = confusion_matrix(truth, prediction, labels=range(CLASSES))
    correct, count = matrix.diagonal(), matrix.sum(1)
    acc = cm.per_class_accuracy(correct, count)
    twins = {
        "per-class": acc,
        "balanced": cm.balanced_accuracy(acc),
        "worst": cm.worst_class_accuracy(acc),
        "best": cm.best_class_accuracy(acc),
        "geometric": cm.geometric_mean_accuracy(acc),
        "shot": list(cm.shot_accuracy(acc, TRAIN_COUNT).values()),
        "difficulty": list(cm.difficulty_accuracy(acc, REFERENCE).values()),
        "interval": [acc, *cm.wilson_interval(correct, count, 0.9)],
        "confusion": matrix,
    }
    for name, expected in twins.items():
        metric = MAKERS[name]()
        metric.update(logits, target, group)
        result = metric.compute()
        result = torch.stack(list(result.values())) if isinstance(result, dict) else result
        np.testing.assert_allclose(result, expected, rtol=1e-12, err_msg=name)
    curve, area = cm.cumulative_false_positives(matrix.sum(0), correct, TRAIN_COUNT)
    metric = MAKERS["false-positives"]()
    metric.update(logits, target)
    np.testing.assert_array_equal(metric.compute()["curve"], curve)
    assert metric.compute()["area"].item() == pytest.approx(area, abs=1e-15)


def test_accuracy_of_groups():
    logits, target, group = samples()
    metric = MAKERS["balanced-group"]()
    metric.update(logits, target, group)
    for g in range(GROUPS):
        one = MAKERS["balanced"]()
        one.update(logits[group == g], target[group == g])
        assert metric.compute()[g] == one.compute()
    shots = cm.ShotAccuracy(TRAIN_COUNT, num_groups=GROUPS)
    shots.update(logits, target, group)
    assert shots.compute()["few"].shape == (GROUPS,)


@pytest.mark.parametrize(("correct", "count", "confidence"), [(0, 10, 0.95), (25, 50, 0.95), (50, 50, 0.99)])
def test_wilson_interval_against_scipy(correct, count, confidence):
    expected = binomtest(correct, count).proportion_ci(confidence, method="wilson")
    lower, upper = cm.wilson_interval([correct], [count], confidence)
    assert (lower[0], upper[0]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_prediction_bias_from_its_definition():
    logits, target, _ = samples()
    p, own = logits.double().softmax(1), torch.nn.functional.one_hot(target, CLASSES)
    g_n, g_p = (p * (1 - own)).sum(0), (p * own).sum(0)
    divisors = {"none": (1, 1), "sum": (g_n.sum(), g_p.sum()), "samples": (200, 200)}
    for normalize, (a, b) in divisors.items():
        metric = cm.PredictionBias(CLASSES, normalize=normalize)
        metric.update(logits, target)
        assert_same(metric.compute(), {"negative": g_n / a, "positive": g_p / b})
        _, stats = cross_entropy_with_stats(logits.double(), target)
        twin = prediction_bias(stats, normalize=normalize)
        assert metric.compute().keys() == {"negative", "positive"}
        assert_same(metric.compute(), {"negative": twin.negative, "positive": twin.positive})
    metric = MAKERS["frequency"]()
    metric.update(logits, target)
    assert_same(metric.compute(), g_p / target.bincount())


@pytest.mark.parametrize("seed", range(5))
def test_binary_fairness_equals_fairlearn(seed):
    logits, target, group = samples(classes=2, seed=seed)
    prediction, truth = predictions(logits, target)
    frame = {"y_true": truth, "y_pred": prediction, "sensitive_features": group.numpy()}
    for metric, name in ((cm.DemographicParity, "demographic_parity"), (cm.EqualizedOdds, "equalized_odds")):
        for reduction in ("difference", "ratio"):
            ours = metric(2, GROUPS, reduction=reduction)
            ours.update(logits, target, group)
            expected = getattr(fairlearn, f"{name}_{reduction}")(**frame)
            assert ours.compute().item() == pytest.approx(expected, abs=1e-12), (name, reduction)


def test_multi_class_fairness_is_the_worst_class_against_the_rest():
    logits, target, group = samples()
    prediction, truth = predictions(logits, target)
    for metric, name in ((cm.DemographicParity, "demographic_parity"), (cm.EqualizedOdds, "equalized_odds")):
        for reduction, worst in (("difference", max), ("ratio", min)):
            ours = metric(CLASSES, GROUPS, reduction=reduction)
            ours.update(logits, target, group)
            expected = [
                getattr(fairlearn, f"{name}_{reduction}")(truth == c, prediction == c, sensitive_features=group.numpy())
                for c in range(CLASSES)
            ]
            assert ours.compute().item() == pytest.approx(worst(expected), abs=1e-12), (name, reduction)


def test_rates_by_group_and_overall_equal_a_metric_frame():
    logits, target, group = samples()
    prediction, truth = predictions(logits, target)
    rates = {"tpr": fairlearn.true_positive_rate, "fpr": fairlearn.false_positive_rate}
    by_group, overall = (cm.EqualizedOdds(CLASSES, GROUPS, reduction=r) for r in ("by_group", "overall"))
    for metric in (by_group, overall):
        metric.update(logits, target, group)
    for c in range(CLASSES):
        frame = fairlearn.MetricFrame(
            metrics=rates, y_true=truth == c, y_pred=prediction == c, sensitive_features=group.numpy()
        )
        np.testing.assert_allclose(by_group.compute()[:, :, c].T, frame.by_group.to_numpy(dtype=float))
        np.testing.assert_allclose(overall.compute()[:, c], frame.overall.to_numpy(dtype=float))


def test_soft_rates_from_their_definition():
    logits, target, group = samples()
    p = logits.double().softmax(1)
    parity = cm.DemographicParity(CLASSES, GROUPS, soft=True, reduction="by_group")
    odds = cm.EqualizedOdds(CLASSES, GROUPS, soft=True, reduction="by_group")
    for metric in (parity, odds):
        metric.update(logits, target, group)
    for g in range(GROUPS):
        np.testing.assert_allclose(parity.compute()[g], p[group == g].mean(0), rtol=1e-5)
        for c in range(CLASSES):
            own = (group == g) & (target == c)
            other = (group == g) & (target != c)
            np.testing.assert_allclose(odds.compute()[:, g, c], [p[own, c].mean(), p[other, c].mean()], rtol=1e-5)


def test_iou_against_scikit_learn_and_torchmetrics():
    logits, target, group = samples()
    prediction, truth = predictions(logits, target)
    metrics = {r: cm.GroupIoU(CLASSES, GROUPS, reduction=r) for r in ("by_group", "std", "overall", "difference")}
    for metric in metrics.values():
        metric.update(logits, target, group)
    rows = [(group == g).numpy() for g in range(GROUPS)]
    expected = [jaccard_score(truth[r], prediction[r], average="macro") for r in rows]
    np.testing.assert_allclose(metrics["by_group"].compute(), expected)
    assert metrics["std"].compute().item() == pytest.approx(np.std(expected, ddof=1))
    assert metrics["difference"].compute().item() == pytest.approx(max(expected) - min(expected))
    whole = MulticlassJaccardIndex(CLASSES)(logits, target).item()
    assert metrics["overall"].compute().item() == pytest.approx(whole, rel=1e-6)


def test_soft_iou_by_hand():
    p = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    metric = cm.GroupIoU(2, 2, soft=True, reduction="by_group", preds="probabilities")
    metric.update(p, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
    # Group 0: I = (.75, .5), n = (1, 1), m = (1.25, .75). Group 1 has class 0 only, perfectly predicted.
    expected = [(0.75 / (1 + 1.25 - 0.75) + 0.5 / (1 + 0.75 - 0.5)) / 2, 1.0]
    np.testing.assert_allclose(metric.compute(), expected)


# --- inputs -----------------------------------------------------------------------------------------------------------


@every_metric
def test_statistics_of_the_loss_give_the_same(name):
    logits, target, group = samples()
    direct, saved, plain = (MAKERS[name]() for _ in range(3))
    direct.update(logits, target, group)
    _, stats = cross_entropy_with_stats(logits.requires_grad_(), target, group=group, num_groups=GROUPS, confusion=True)
    saved.update_from(stats)
    plain.update(stats)
    assert_same(saved.compute(), direct.compute())
    assert_same(saved.compute(), plain.compute(), exact=True)
    assert not any(s.requires_grad for s in saved.metric_state.values())
    assert saved.update_count == 1


@every_metric
def test_batches_equal_the_whole(name):
    logits, target, group = samples()
    target[7], target[50] = -100, -100
    whole, parts, forward = (MAKERS[name]() for _ in range(3))
    whole.update(logits, target, group)
    for rows in (slice(0, 17), slice(17, 17), slice(17, 180), slice(180, 200)):
        parts.update(logits[rows], target[rows], group[rows])
        forward(logits[rows], target[rows], group[rows])
    assert_same(parts.compute(), whole.compute())
    assert_same(forward.compute(), whole.compute())


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - {"bias", "frequency", "stats", "odds-group"}))
def test_labels_instead_of_logits(name):
    if name in ("parity-soft", "iou-group"):
        with pytest.raises(ValueError, match="expected preds 'logits' or 'probabilities', got 'labels'"):
            MAKERS[name](preds="labels")
        return
    logits, target, group = samples()
    target[3], group[5] = -100, -1
    a, b = MAKERS[name](), MAKERS[name](preds="labels")
    a.update(logits, target, group)
    b.update(logits.argmax(1), target, group)
    assert_same(a.compute(), b.compute(), exact=True)


@every_metric
def test_probabilities_instead_of_logits(name):
    logits, target, group = samples()
    logits[0, 1:] = -torch.inf
    a, b = MAKERS[name](), MAKERS[name](preds="probabilities")
    a.update(logits, target, group)
    b.update(logits.softmax(1), target, group)
    for x, y in zip(values(a.compute()), values(b.compute()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


PROBABILITIES = {  # of the classes that read them in different ways
    "statistics": lambda **k: cm.PredictionBias(2, preds="probabilities", **k),
    "groups": lambda **k: cm.DemographicParity(2, 2, soft=True, preds="probabilities", **k),
}
NO_PROBABILITIES = {"negative": [-0.25, 1.25], "above": [0.5, 0.502], "below": [0.0, 0.0], "logits": [3.0, -1.0]}
NO_PROBABILITIES["infinite"] = [math.inf, 0.0]


@pytest.mark.parametrize("name", PROBABILITIES)
@pytest.mark.parametrize("row", NO_PROBABILITIES)
def test_what_is_no_probability_is_refused_or_counted(name, row, monkeypatch):
    good = torch.tensor([[0.25, 0.75], [0.5, 0.5005], [1.0, 0.0], [0.875, 0.125]])
    bad = torch.cat([good[:2], torch.tensor([NO_PROBABILITIES[row]]), good[2:]])
    target, group = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([0, 1, 0, 1, 0])
    kept = [0, 1, 3, 4]
    metric, expected = PROBABILITIES[name](), PROBABILITIES[name]()
    expected.update(good, target[kept], group[kept])
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\] with sum 1 .* at 2$"):
        metric.update(bad, target, group)
    ignored = target.clone()
    ignored[2] = -100
    metric.update(bad, ignored, group)
    assert_same(metric.compute(), expected.compute(), exact=True)
    assert metric.invalid == 0

    monkeypatch.setattr("classfair.metrics.base.host_can_look", lambda device: False)  # as on a GPU
    elsewhere = PROBABILITIES[name]()
    with Forbidden():
        elsewhere.update(bad, target, group)
    assert_same(elsewhere.compute(), expected.compute(), exact=True)
    assert (elsewhere.invalid, elsewhere.nonfinite) == (1, 0)


@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_row_with_nan_is_not_finite(name):
    metric = PROBABILITIES[name]()
    rows = torch.tensor([[0.25, 0.75], [0.75, 0.25], [math.nan, 7.0]])
    metric.update(rows, torch.tensor([1, 0, 0]), torch.tensor([0, 1, 0]))
    assert (metric.invalid, metric.nonfinite) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000, 21841])
def test_a_softmax_of_any_dtype_is_probabilities(classes, dtype):
    probabilities = (3 * torch.randn(50, classes, generator=torch.Generator().manual_seed(0))).to(dtype).softmax(1)
    metric = cm.BalancedAccuracy(classes, preds="probabilities")
    metric.update(probabilities, torch.zeros(50, dtype=torch.int64))
    assert metric.count.sum() == 50


def test_pixels_are_samples():
    logits, target, group = samples(120)
    a, b = MAKERS["odds"](), MAKERS["odds"]()
    a.update(logits, target, group)
    shaped = logits.view(2, 6, 10, CLASSES).permute(0, 3, 1, 2)
    b.update(shaped, target.view(2, 6, 10), group.view(2, 6, 10))
    assert_same(a.compute(), b.compute(), exact=True)


def test_rows_that_do_not_count():
    logits, target, group = samples()
    logits[0, 0], target[1], group[2] = float("nan"), -100, -1
    kept = slice(3, None)
    for name in MAKERS:
        a, b = MAKERS[name](), MAKERS[name]()
        rows = slice(2, None) if getattr(a, "num_groups", 1) == 1 else kept  # one group: no row is without it
        a.update(logits, target, group)
        b.update(logits[rows], target[rows], group[rows])
        assert_same(a.compute(), b.compute())
    assert MAKERS["balanced"]().nonfinite == 0
    metric = MAKERS["balanced"]()
    metric.update(logits, target)
    assert metric.nonfinite == 1


# --- corners ----------------------------------------------------------------------------------------------------------


@every_metric
def test_no_sample_is_nan_and_no_exception(name):
    none = MAKERS[name]()
    nothing = MAKERS[name]()
    nothing.update(torch.zeros(0, CLASSES), *(torch.zeros(2, 0, dtype=torch.int64)))
    for metric in (none, nothing):
        result = metric.compute()
        floats = [v for v in values(result) if v.dtype.kind == "f"]
        assert floats or name == "confusion"
        for v in floats:
            assert np.isnan(v).all()


@every_metric
def test_an_absent_class_and_an_empty_group(name):
    logits, target, group = samples()
    target, group = target.clamp_max(CLASSES - 2), group.clamp_max(GROUPS - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = MAKERS[name]()
        metric.update(logits, target, group)
        result = metric.compute()
    if not isinstance(result, dict) and result.dim() == 0:
        assert not result.isnan()
    if name == "per-class":
        assert result.isnan().tolist() == [False] * (CLASSES - 1) + [True]
    if name == "iou-group":
        assert result.isnan().tolist() == [False, False, True]


def test_one_class_and_one_group():
    logits, target = torch.randn(6, 1), torch.zeros(6, dtype=torch.int64)
    for name in ("PerClassAccuracy", "BalancedAccuracy", "WorstClassAccuracy", "GeometricMeanAccuracy"):
        metric = getattr(cm, name)(1)
        metric.update(logits, target)
        assert metric.compute() == 1
    sigma, parity, odds = cm.GroupIoU(1, 1), cm.DemographicParity(1, 1), cm.EqualizedOdds(1, 1)
    for metric in (sigma, parity, odds):
        metric.update(logits, target)
    for metric in (sigma, parity, odds):
        assert math.isnan(metric.compute())  # nothing to compare


def test_area_of_false_positives_without_one_is_nan():
    metric = MAKERS["false-positives"](preds="labels")
    metric.update(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert metric.compute()["curve"].tolist() == [0] * CLASSES
    assert math.isnan(metric.compute()["area"])


def test_a_ratio_leaves_out_what_nobody_is_predicted_as():
    metric = cm.DemographicParity(3, 2, reduction="ratio", preds="labels")
    metric.update(torch.tensor([0, 1, 0, 0]), torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 1, 1]))
    assert metric.compute() == 0  # class 1: 1/2 and 0; class 2: never
    metric = cm.DemographicParity(3, 2, reduction="ratio", preds="labels")
    metric.update(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
    assert metric.compute() == 1


@pytest.mark.parametrize("reduction", ["difference", "ratio"])
def test_no_comparison_is_not_a_fair_one(reduction):
    """Of a class, or of all, that fewer than two groups have a rate of."""
    rows = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 0])
    for metric in (cm.DemographicParity, cm.EqualizedOdds, cm.GroupIoU):
        alone = metric(2, 2, reduction=reduction, preds="labels")
        alone.update(*rows)
        assert math.isnan(alone.compute())
    # Label 1 in group 0 only, where it is found half the time: no TPR to compare. FPR 1/2 in group 0, 1/4 in group 1.
    odds = cm.EqualizedOdds(2, 2, reduction=reduction, preds="labels")
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    odds.update(torch.tensor([0, 1, 0, 1, 1, 0, 0, 0]), torch.tensor([0, 1, 1, 0, 0, 0, 0, 0]), group)
    assert odds.compute() == {"difference": 0.25, "ratio": 0.5}[reduction]
    both_undefined = cm.EqualizedOdds(2, 2, reduction=reduction, preds="labels")
    both_undefined.update(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]))
    assert math.isnan(both_undefined.compute())
