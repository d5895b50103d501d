"""Every combination of the tables in docs/cross_entropy.md, against their formulas written out sample by sample."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from classfair import MixedTarget, PairTerms, backends, cross_entropy, total_weight
from classfair.ops import label_index

BACKENDS = [b for b in ("native", "reference") if b in backends.available("softmax_loss", "cpu")]
KINDS = ("labels", "MixedTarget", "probabilities")
KEYWORDS = ("offset", "margin", "pair", "weight", "sample_weight", "label_smoothing", "gamma")
N, C, IGNORED = 6, 3, -100


def rand(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS = 4 * rand(N, C, seed=0) - 2
VALUES = {
    "offset": rand(C, seed=1) - 0.5,
    "margin": rand(C, seed=2),
    "pair": rand(C, C, seed=3) - 0.5,  # its diagonal is not 0: the formula does not ask for it
    "weight": rand(C, seed=4) + 0.5,
    "sample_weight": torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5, 0.25], dtype=torch.float64),
    "label_smoothing": 0.2,
    "gamma": 1.5,
}
Y_A = torch.tensor([2, 0, IGNORED, 1, IGNORED, 0])
Y_B = torch.tensor([1, 0, 2, IGNORED, IGNORED, 1])
LAM = torch.tensor([0.7, 0.25, 0.4, 0.9, 0.6, 0.0], dtype=torch.float64)
TARGETS = {
    "labels": Y_A,
    "MixedTarget": MixedTarget(Y_A, Y_B, LAM),
    "probabilities": rand(N, C, seed=5),  # not normalised, as torch allows
}


def nll(z, k, y=None):
    """List of -log p'_c of one sample."""
    x = []
    for c in range(C):
        x.append(z[c] + k["offset"][c])
        if y is not None:
            x[c] = x[c] + k["pair"][y, c]
            if c == y:
                x[c] = x[c] - k["margin"][y]
    log_sum = sum(v.exp() for v in x).log()
    return [log_sum - v for v in x]


def label_loss(z, y, k):
    w, eps = k["weight"], k["label_smoothing"]
    loss = nll(z, k, y)
    p = (-loss[y]).exp()
    smooth = eps / C * sum(w[c] * loss[c] for c in range(C))
    return (1 - eps) * w[y] * (1 - p) ** k["gamma"] * loss[y] + smooth


def formula(kind, logits, k):
    """Losses (N,) and the denominator, from the table."""
    losses, denominator = [], 0.0
    for n in range(N):
        z, loss, own_weight = logits[n], 0.0 * logits[n].sum(), k["sample_weight"][n]
        if kind == "probabilities":
            own, eps = nll(z, k), k["label_smoothing"]
            for c in range(C):
                loss = loss + k["weight"][c] * ((1 - eps) * TARGETS[kind][n, c] + eps / C) * own[c]
            denominator += own_weight
        else:
            mixed = ((Y_A[n], LAM[n]), (Y_B[n], 1 - LAM[n]))
            for y, share in mixed if kind == "MixedTarget" else ((Y_A[n], 1.0),):
                if y != IGNORED:
                    loss = loss + share * label_loss(z, int(y), k)
                    denominator += share * k["weight"][y] * own_weight
        losses.append(own_weight * loss)
    return torch.stack(losses), denominator


def neutral():
    zeros = torch.zeros(C, dtype=torch.float64)
    return {
        "offset": zeros,
        "margin": zeros,
        "pair": torch.zeros(C, C, dtype=torch.float64),
        "weight": zeros + 1,
        "sample_weight": torch.ones(N, dtype=torch.float64),
        "label_smoothing": 0.0,
        "gamma": 0.0,
    }


REFUSED = {"margin", "pair", "gamma"}  # with probabilities
COMBINATIONS = [
    (kind, on)
    for kind in KINDS
    for size in range(len(KEYWORDS) + 1)
    for on in itertools.combinations(KEYWORDS, size)
    if not (kind == "probabilities" and REFUSED & set(on))
]


def test_nothing_is_left_out():
    # Probabilities have no label for margin, pair and gamma: 16 of 128 remain.
    assert len(COMBINATIONS) == 128 + 128 + 16


@pytest.mark.parametrize(
    ("kind", "on"), COMBINATIONS, ids=lambda v: v if isinstance(v, str) else "+".join(v) or "plain"
)
def test_value_and_gradient(kind, on):
    logits = LOGITS.clone().requires_grad_()
    keywords = {name: VALUES[name] for name in on}
    leaves = [logits]
    for name in {"offset", "margin", "pair"} & set(on):
        keywords[name] = VALUES[name].clone().requires_grad_()
        leaves.append(keywords[name])
    losses, denominator = formula(kind, logits, neutral() | keywords)
    weights = {name: keywords.get(name) for name in ("weight", "sample_weight")}
    total = total_weight(TARGETS[kind], **weights)
    in_float64 = "weight" in on or "sample_weight" in on
    assert total.item() == pytest.approx(float(denominator), rel=1e-12 if in_float64 else 1e-7)
    factor = rand(N, seed=6)
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / denominator}
    for reduction, backend in itertools.product(expected, BACKENDS):
        got = cross_entropy(logits, TARGETS[kind], reduction=reduction, backend=backend, **keywords)
        upstream = factor if reduction == "none" else factor[0]
        pairs = [(got, expected[reduction])]
        for value in (got, expected[reduction]):
            pairs.append(torch.autograd.grad(value, leaves, upstream, retain_graph=True))
        torch.testing.assert_close(*pairs[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(pairs[1], pairs[2], rtol=1e-11, atol=1e-13)


ASKING = [on for size in range(1, 8) for on in itertools.combinations(KEYWORDS, size) if REFUSED & set(on)]


@pytest.mark.parametrize("on", ASKING, ids="+".join)
def test_probabilities_refuse_what_needs_a_label(on):
    first = next(name for name in ("pair", "margin", "gamma") if name in on)
    expected = {
        "pair": "expected hard labels or MixedTarget with pair, got probabilities",
        "margin": "expected hard labels or MixedTarget with margin, got probabilities",
        "gamma": "expected hard labels with gamma > 0, got probabilities",
    }[first]
    with pytest.raises(ValueError, match=f"^cross_entropy: {expected}"):
        cross_entropy(LOGITS, TARGETS["probabilities"], **{name: VALUES[name] for name in on})


def pair_terms(labels=Y_A):
    index = label_index(labels, C)
    return PairTerms(VALUES["pair"][index.key_of_slot], index.slot, index.key_of_slot, index.num_slots)


def documented():
    """{keyword: {kind: whether it is refused}} of the table of keywords."""
    text = (Path(__file__).parents[2] / "docs" / "cross_entropy.md").read_text()
    table = re.search(r"^\| keyword \|.*?\n\n", text, re.M | re.S)[0].strip().splitlines()
    assert [cell.strip(" `") for cell in table[0].split("|")[2:-1]] == list(KINDS)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[2:]]
    return {
        row[0]: {kind: cell.startswith("refused") for kind, cell in zip(KINDS, row[1:], strict=True)} for row in rows
    }


ARGUMENTS = {
    "`offset` `(C,)`": {"offset": VALUES["offset"]},
    "`margin` `(C,)`": {"margin": VALUES["margin"]},
    "`pair` table `(C, C)`": {"pair": VALUES["pair"]},
    "`pair` as `PairTerms`": {"pair": pair_terms()},  # of mixtures: the slots of both labels
    "`weight` `(C,)`": {"weight": VALUES["weight"]},
    "`sample_weight` `(N,)`": {"sample_weight": VALUES["sample_weight"]},
    "`label_smoothing`": {"label_smoothing": 0.2},
    "`gamma`": {"gamma": 1.5},
    "`ignore_index` >= 0": {"ignore_index": 1},
}


def test_the_document_names_every_keyword():
    assert set(documented()) == {*ARGUMENTS, "statistics"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keyword", ARGUMENTS)
def test_the_document_says_what_is_refused(keyword, kind):
    target = TARGETS[kind]
    if "PairTerms" in keyword and kind == "MixedTarget":
        arguments = {"pair": pair_terms(torch.cat([Y_A, Y_B]))}
    else:
        arguments = ARGUMENTS[keyword]
    if "ignore_index" in ARGUMENTS[keyword] and kind != "probabilities":  # then -100 is no label any more
        target = Y_A.clamp_min(0) if kind == "labels" else MixedTarget(Y_A.clamp_min(0), Y_B.clamp_min(0), LAM)
    if documented()[keyword][kind]:
        with pytest.raises(ValueError, match=r"^cross_entropy: expected .*, got (probabilities|PairTerms)"):
            cross_entropy(LOGITS, target, **arguments)
    else:
        assert bool(cross_entropy(LOGITS, target, **arguments).isfinite())


def test_pair_terms_mean_the_table():
    for reduction in ("none", "mean", "sum"):
        rows = cross_entropy(LOGITS, Y_A, pair=pair_terms(), reduction=reduction)
        table = cross_entropy(LOGITS, Y_A, pair=VALUES["pair"], reduction=reduction)
        torch.testing.assert_close(rows, table, rtol=1e-14, atol=0)


def test_pair_terms_of_mixtures_mean_the_table():
    values = VALUES["pair"].clone().requires_grad_()
    index = label_index(torch.cat([Y_A, Y_B]), C)
    pair = PairTerms(values[index.key_of_slot], index.slot, index.key_of_slot, index.num_slots)
    target = TARGETS["MixedTarget"]
    for reduction in ("mean", "sum"):
        losses = [cross_entropy(LOGITS, target, pair=p, reduction=reduction) for p in (pair, values)]
        torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(loss, values, retain_graph=True)[0] for loss in losses))
    with pytest.raises(ValueError, match=r"expected pair\.slot of shape"):
        cross_entropy(LOGITS, target, pair=pair_terms())
