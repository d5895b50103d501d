"""``MixedTargetCollate`` against torchvision, and the samplers: every process, every length."""

import pickle
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from classfair import MixedTarget, cross_entropy
from classfair.data import ClassBalancedSampler, MixedTargetCollate, UnpaddedDistributedSampler, balanced_subset

CLASSES = 12


def transforms(name, **keywords):
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="needs torchvision")
    mixup, cutmix = v2.MixUp(alpha=0.8, **keywords), v2.CutMix(alpha=1.0, **keywords)
    return {
        "MixUp": mixup,
        "CutMix": cutmix,
        "RandomChoice": v2.RandomChoice([mixup, cutmix]),
        "RandomApply": v2.RandomApply([v2.RandomChoice([cutmix, mixup])], p=0.5),
        "Compose": v2.Compose([v2.Normalize([0.0], [1.0]), mixup]),
    }[name]


NAMES = ["MixUp", "CutMix", "RandomChoice", "RandomApply", "Compose"]


def samples(number=8, seed=0):
    """Constant images whose value is the position in the batch: a mean tells what has been mixed."""
    labels = torch.randint(CLASSES, (number,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(torch.full((1, 6, 5), float(i)), y) for i, y in enumerate(labels)]


# MixedTargetCollate


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(6))
def test_loss_is_that_of_torchvisions_dense_targets(name, seed):
    batch = samples(seed=seed)
    torch.manual_seed(seed)
    expected_images, dense = transforms(name, num_classes=CLASSES)(*default_collate(batch))
    if dense.dim() == 1:  # RandomApply has not
        dense = F.one_hot(dense, CLASSES).float()
    torch.manual_seed(seed)
    images, target = MixedTargetCollate(transforms(name))(batch)
    assert torch.equal(images, expected_images)
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(seed + 1))
    torch.testing.assert_close(cross_entropy(logits, target), F.cross_entropy(logits, dense))
    assert isinstance(target, MixedTarget)
    assert target.y_a.dtype == target.y_b.dtype == torch.int64
    assert target.lam.dtype == torch.float32
    assert target.lam.shape == (8,)


@pytest.mark.parametrize("name", NAMES)
def test_labels_and_shares_are_those_of_the_images(name):
    """With the position as label, each mixed image tells its target; CutMix shares are exact areas."""
    batch = [(image, i) for i, (image, _) in enumerate(samples())]
    collate = MixedTargetCollate(transforms(name))
    shares = set()
    for seed in range(20):
        torch.manual_seed(seed)
        images, (y_a, y_b, lam) = collate(batch)
        torch.testing.assert_close(images.mean((1, 2, 3)), lam * y_a + (1 - lam) * y_b, rtol=1e-5, atol=1e-5)
        assert bool(((lam >= 0.5) & (lam <= 1)).all())
        assert torch.equal(y_a == y_b, lam == 1)
        shares.add(lam[0].item())
        if name == "CutMix":
            pasted = (images != y_a.view(-1, 1, 1, 1)).sum((1, 2, 3))
            torch.testing.assert_close(1 - lam, pasted / 30, rtol=0, atol=1e-6)
    assert len(shares) > 3
    assert (1.0 in shares) == (name in ("CutMix", "RandomChoice", "RandomApply"))  # boxes may be empty


def test_default_dtype_changes_nothing():
    torch.set_default_dtype(torch.float64)
    try:
        _, target = MixedTargetCollate(lambda images, rows: (images, rows))(samples())
    finally:
        torch.set_default_dtype(torch.float32)
    assert target.lam.dtype == torch.float32


def test_ignored_labels_stay_ignored():
    batch = [(image, -100 if i in (2, 3) else y) for i, (image, y) in enumerate(samples())]
    torch.manual_seed(3)
    _, (y_a, y_b, lam) = MixedTargetCollate(transforms("MixUp"))(batch)
    logits = torch.randn(8, CLASSES, requires_grad=True)
    cross_entropy(logits, MixedTarget(y_a, y_b, lam)).backward()
    assert bool((logits.grad[3] == 0).all())  # both of its labels are ignored
    assert bool((logits.grad[[0, 1, 2, 4, 5, 6, 7]] != 0).any(1).all())
    assert (y_a == -100).sum() + (y_b == -100).sum() == 4


@pytest.mark.parametrize("number", [0, 1, 2])
def test_batches_too_small_to_mix(number):
    collate = MixedTargetCollate(
        transforms("MixUp"),
        collate=lambda batch: (torch.zeros(len(batch), 1, 2, 2), torch.tensor([y for _, y in batch]).long()),
    )
    torch.manual_seed(0)
    _, (y_a, y_b, lam) = collate(samples(number))
    assert y_a.shape == y_b.shape == lam.shape == (number,)
    if number == 1:
        assert torch.equal(y_a, y_b)
        assert lam.tolist() == [1]


def test_shares_that_were_rounded():
    """MixUp of a sample with itself: lam + (1 - lam) is not always 1."""
    _, target = MixedTargetCollate(lambda images, rows: (images, rows * (1 - 2**-23)))(samples(3))
    assert target.lam.tolist() == [1, 1, 1]


def test_replaced_images_take_their_label_along():
    """A box over the whole image leaves one label, not two."""
    _, target = MixedTargetCollate(lambda images, rows: (images.roll(1, 0), rows.roll(1, 0)))(samples(3))
    labels = torch.tensor([y for _, y in samples(3)])
    assert torch.equal(target.y_a, labels.roll(1))
    assert torch.equal(target.y_b, labels.roll(1))
    assert target.lam.tolist() == [1, 1, 1]


def test_works_in_worker_processes():
    collate = MixedTargetCollate(transforms("RandomChoice"))
    assert repr(pickle.loads(pickle.dumps(collate))) == repr(collate)
    dataset = TensorDataset(torch.arange(10.0).view(10, 1, 1, 1).expand(-1, 3, 4, 4), torch.arange(10))
    torch.manual_seed(0)
    loader = DataLoader(dataset, batch_size=5, num_workers=1, collate_fn=collate)
    batches = list(loader)
    assert len(batches) == 2
    for images, (y_a, y_b, lam) in batches:
        torch.testing.assert_close(images.mean((1, 2, 3)), lam * y_a + (1 - lam) * y_b)
    assert bool((batches[0][1].lam != 1).any() | (batches[1][1].lam != 1).any())


def three(images, rows):
    return images, (rows + rows.roll(1, 0) + rows.roll(2, 0)) / 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MixedTargetCollate(3), TypeError, "expected mix as a function, got int"),
        (lambda: MixedTargetCollate(three, collate=None), TypeError, "expected collate as a function, got NoneType"),
        (
            lambda: MixedTargetCollate(transforms("RandomApply", num_classes=10)),
            ValueError,
            "expected CutMix without num_classes .*, got num_classes=10; leave it out",
        ),
        (
            lambda: MixedTargetCollate(three)(samples()),
            ValueError,
            "expected mixtures of at most two, got 3 in sample 0",
        ),
        (lambda: MixedTargetCollate(three)([(torch.zeros(1), 1, 2)]), TypeError, "images and labels, got 3 parts"),
        (lambda: MixedTargetCollate(three)([torch.zeros(1)]), TypeError, "images and labels, got Tensor"),
        (lambda: MixedTargetCollate(three)([(torch.zeros(1), 0.5)]), TypeError, r"integer labels .*float64 \(1,\)"),
        (lambda: MixedTargetCollate(three)([(torch.zeros(1), "a")]), TypeError, "integer labels .*got tuple"),
        (lambda: MixedTargetCollate(three)([(torch.zeros(1), torch.ones(2).long())]), TypeError, r"got .*\(1, 2\)"),
    ],
)
def test_wrong_arguments_of_the_collate(make, error, message):
    with pytest.raises(error, match=f"^MixedTargetCollate: .*{message}"):
        make()


# ClassBalancedSampler

LABELS = torch.tensor([3] * 60 + [0] * 30 + [7] * 9 + [1])[torch.randperm(100, generator=torch.manual_seed(0))]


def test_classes_present_are_drawn_equally_often_and_samples_within():
    sampler = ClassBalancedSampler(LABELS, num_samples=40_000)
    drawn = torch.tensor(list(sampler))
    assert len(drawn) == len(sampler) == 40_000
    share = torch.bincount(LABELS[drawn], minlength=8) / 40_000
    expected = torch.tensor([0.25, 0.25, 0, 0.25, 0, 0, 0, 0.25])
    assert (share - expected).abs().max() < 4 * (0.25 * 0.75 / 40_000) ** 0.5  # four standard deviations
    assert (share[expected == 0] == 0).all()
    for label, count in Counter(LABELS.tolist()).items():
        times = torch.bincount(drawn, minlength=100)[label == LABELS]
        mean = 10_000 / count
        assert ((times - mean).abs() < 5 * mean**0.5 + 100 * (count == 1)).all(), label


class Unloadable(torch.utils.data.Dataset):
    targets = LABELS.tolist()

    def __getitem__(self, i):
        raise AssertionError("a sample was loaded")


@pytest.mark.parametrize(
    "source", [LABELS.tolist(), LABELS.numpy(), LABELS.byte(), Unloadable(), Subset(Unloadable(), range(100))]
)
def test_labels_of_every_source(source):
    assert list(ClassBalancedSampler(source, 8, seed=5)) == list(ClassBalancedSampler(LABELS, seed=5))


def test_epochs_and_seeds_differ_and_repeat():
    def draw(seed, epoch):
        sampler = ClassBalancedSampler(LABELS, seed=seed)
        sampler.set_epoch(epoch)
        first = list(sampler)
        assert list(sampler) == first
        return tuple(first)

    draws = [draw(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(draws)) == 9
    assert draw(1, 2) == draws[5]


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    list(ClassBalancedSampler(LABELS))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_one_draw(world):
    parts = [list(ClassBalancedSampler(LABELS, num_samples=20, num_replicas=world, rank=r)) for r in range(world)]
    total = -(-20 // world) * world
    assert [len(p) for p in parts] == [total // world] * world
    whole = list(ClassBalancedSampler(LABELS, num_samples=total))
    assert [whole[r::world] for r in range(world)] == parts


@pytest.mark.slow
def test_more_samples_than_a_float32_counts():
    """torch.multinomial, which WeightedRandomSampler uses, refuses more than 2^24."""
    labels = torch.zeros(2**24 + 3, dtype=torch.uint8)
    labels[-1] = 1
    drawn = torch.tensor(list(ClassBalancedSampler(labels, num_samples=1000)))
    rare = drawn == 2**24 + 2
    assert 400 < rare.sum() < 600
    assert drawn[~rare].unique().numel() == (~rare).sum()


@pytest.mark.parametrize("sampler", [ClassBalancedSampler, UnpaddedDistributedSampler])
def test_processes_of_the_default_group(sampler, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    assert list(sampler(LABELS)) == list(sampler(LABELS, num_replicas=3, rank=2))
    assert list(sampler(LABELS, num_replicas=3, rank=1)) != list(sampler(LABELS))


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((object(),), {}, TypeError, "expected labels or a data set with .targets, .labels or .tensors, got object"),
        (([0.5, 1.0],), {}, TypeError, "expected integer labels, got torch.float64"),
        (([True, False],), {}, TypeError, "expected integer labels, got torch.bool"),
        (
            (torch.eye(3, dtype=torch.int64),),
            {},
            ValueError,
            r"expected one label per sample, got labels of shape \(3, 3\)",
        ),
        ((torch.zeros(5, 1).long(), 2), {}, ValueError, r"expected one label per sample, got labels of shape \(5, 1\)"),
        ((torch.tensor(3),), {}, ValueError, r"expected one label per sample, got labels of shape \(\)"),
        (([],), {}, ValueError, "expected at least one sample, got none"),
        (([0, 1, -1],), {}, ValueError, "expected labels >= 0, got -1 at position 2"),
        (([0, 5, 1], 4), {}, ValueError, r"expected labels in \[0, 4\), got 5 at position 1"),
        (([0, 1],), {"num_samples": 0}, ValueError, "expected num_samples >= 1, got 0"),
        (([0, 1],), {"seed": -1}, ValueError, "expected seed >= 0, got -1"),
        (([0, 1],), {"num_replicas": 0, "rank": 0}, ValueError, "expected num_replicas >= 1, got 0"),
        (([0, 1],), {"num_replicas": 2, "rank": 2}, ValueError, r"expected rank in \[0, 1\], got 2"),
    ],
)
def test_wrong_arguments_of_the_class_balanced_sampler(arguments, keywords, error, message):
    with pytest.raises(error, match=f"^ClassBalancedSampler: {message}"):
        ClassBalancedSampler(*arguments, **keywords)


# UnpaddedDistributedSampler


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("number", range(21))
def test_every_index_once_in_order(world, number):
    samplers = [UnpaddedDistributedSampler(range(number), num_replicas=world, rank=r) for r in range(world)]
    parts = [list(s) for s in samplers]
    assert [len(s) for s in samplers] == [len(p) for p in parts]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(p == sorted(p) for p in parts)
    assert sorted(i for p in parts for i in p) == list(range(number))


def test_counts_of_a_loader_are_exact():
    """Five images, the first two of class 0: padded to eight, three more images of class 0 and 1 would count."""
    dataset = TensorDataset(torch.tensor([0, 0, 1, 1, 2]))
    counts = torch.zeros(3, dtype=torch.int64)
    for rank in range(8):
        sampler = UnpaddedDistributedSampler(dataset, num_replicas=8, rank=rank)
        for (target,) in DataLoader(dataset, batch_size=2, sampler=sampler):
            counts += torch.bincount(target, minlength=3)
    assert counts.tolist() == [2, 2, 1]


def test_wrong_arguments_of_the_unpadded_sampler():
    with pytest.raises(TypeError, match=r"^UnpaddedDistributedSampler: expected dataset with a length, got int"):
        UnpaddedDistributedSampler(3)
    with pytest.raises(ValueError, match=r"^UnpaddedDistributedSampler: expected rank in \[0, 3\], got -1"):
        UnpaddedDistributedSampler(range(3), num_replicas=4, rank=-1)


# balanced_subset


def test_subset_has_as_many_of_every_class():
    labels = torch.arange(60).sqrt().long()  # 1, 3, 5, ... samples of classes 0 to 6, and 11 of class 7
    labels = labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    several = labels[labels > 1] - 2  # of class c at least 5 + 2c
    chosen = balanced_subset(several, 5, seed=1)
    assert several[chosen].bincount().tolist() == [5] * 6
    assert torch.equal(chosen, chosen.unique())  # ascending, none twice
    assert torch.equal(chosen, balanced_subset(several.tolist(), 5, seed=1))
    assert not torch.equal(chosen, balanced_subset(several, 5, seed=2))
    assert set(balanced_subset(several, 3, seed=1).tolist()) < set(chosen.tolist())


def test_every_sample_is_drawn_equally_often():
    labels = torch.tensor([0] * 5 + [1] * 3)
    drawn = torch.zeros(8)
    for seed in range(2000):
        drawn[balanced_subset(labels, 2, seed=seed)] += 1
    expected = torch.tensor([2 / 5] * 5 + [2 / 3] * 3)
    assert float((drawn / 2000 - expected).abs().max()) < 0.05  # four standard deviations


def test_a_class_with_too_few_samples():
    labels = TensorDataset(torch.zeros(6), torch.tensor([0, 0, 0, 1, 3, 3]))
    for per_class, got in ((2, "got 1 of class 1"), (1, "got 0 of class 2")):
        with pytest.raises(ValueError, match=f"^balanced_subset: expected {per_class} or more .*, {got}$"):
            balanced_subset(labels, per_class, seed=0)
    with pytest.raises(ValueError, match="expected 1 or more samples of every class, got 0 of class 2"):
        balanced_subset(labels, 2, seed=0, allow_fewer=True)
    with pytest.raises(ValueError, match="got 0 of class 2"):
        balanced_subset([0, 1], 1, seed=0, num_classes=3)
    assert balanced_subset([0, 0, 0, 1, 2, 2], 2, seed=0, allow_fewer=True)[2:].tolist() == [3, 4, 5]


@pytest.mark.parametrize("arguments", [{"per_class": 0}, {"per_class": 1.5}, {"seed": -1}, {"seed": None}])
def test_wrong_arguments_of_a_subset(arguments):
    with pytest.raises((TypeError, ValueError), match=r"^balanced_subset: expected"):
        balanced_subset([0, 1], **{"per_class": 1, "seed": 0, **arguments})
