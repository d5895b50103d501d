"""Estimated offset: cross-entropy on logits with an offset made of weights and centres, which is kept uniform."""

from typing import Any, Unpack

import torch
from torch import Tensor

from classfair import _validate as check
from classfair import backends
from classfair._dtensor import whole_weight
from classfair.functional import cross_entropy
from classfair.functional_stats import cross_entropy_with_stats
from classfair.losses._buffers import Keywords
from classfair.losses.base import CrossEntropyLoss
from classfair.losses.zero_uniformity import divergence_from_uniform
from classfair.nn import EstimatedOffsetLinear
from classfair.statistics import BatchStats
from classfair.statistics.offsets import empirical_offset
from classfair.targets import MixedTarget, flat_mixture, major_label


def uniform_constraint(offset: Tensor) -> Tensor:
    r"""How far the offsets of a classifier are from being equal: 0 if they are.

    .. math:: L_{uni} = \sum_c q_c \log q_c + \log C, \qquad q = \mathrm{softmax}(-w_0)

    q are the probabilities that the classifier gives to features of 0. The constant :math:`\log C`, which the paper
    leaves out, makes the least value 0. Source: Kim and Kim 2021, "Imbalanced image classification with estimated
    offset", section 3.2.

    Args:
        offset: ``(C,)`` what the classifier subtracts from its logits, any float.

    Returns:
        ``()`` float32, or float64 for float64 offsets.

    Gradient: ``offset``, any order; 0 for equal offsets.

    Raises:
        TypeError, ValueError: ``uniform_constraint: expected X, got Y``.

    Example:
        >>> offset = torch.tensor([1.0, 3.0]).log()  # q is 3/4 and 1/4
        >>> round(classfair.uniform_constraint(offset).item(), 4)
        0.1308
    """
    name = "uniform_constraint"
    check.check_floats(name, "offset", offset, (offset.numel() if isinstance(offset, Tensor) else 0,))
    if offset.numel() == 0:
        raise ValueError(f"{name}: expected offset of shape (C,) with C >= 1, got (0,)")
    return divergence_from_uniform(-offset.to(check.acc_dtype(offset))[None])[0]


def center_loss(
    features: Tensor, centers: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Mean squared distance of features from the centre of their class.

    .. math:: \frac1N \sum_i \lVert x_i - c_{y_i} \rVert^2

    Without the factor 1/2 of Wen et al. 2016, "A discriminative feature learning approach for deep face recognition",
    eq. 2, as in Kim and Kim 2021, section 3.2. Takes ``(N, D)`` numbers, never ``(N, C)`` distances.

    Args:
        features: ``(N, D)``, any float.
        centers: ``(C, D)``, any float.
        target: ``(N,)`` int64 or uint8 in ``[0, C)`` or ``ignore_index``.
        ignore_index: label of samples that are left out, of the denominator as well.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        ``()``, or ``(N,)`` for ``"none"``; float32, or float64 where one of both is. The mean of no sample is NaN.

    Gradient: features and centers, any order. The method itself moves centres by another rule:
    :meth:`classfair.nn.EstimatedOffsetLinear.update`.

    Raises:
        TypeError, ValueError: ``center_loss: expected X, got Y``.
        IndexError: on the CPU, for a label out of range. On other devices the distance of such a sample is NaN.

    Example:
        >>> features, centers = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> classfair.center_loss(features, centers, torch.tensor([0, 1])).item()
        6.5
    """
    name = "center_loss"
    check.check_matrix(name, "centers", centers)
    rows = features.shape[0] if isinstance(features, Tensor) and features.dim() == 2 else -1
    check.check_floats(name, "features", features, (max(rows, 0), centers.shape[1]))
    check.check_device(name, "centers", centers, features.device, "features")
    check.check_labels_tensor(name, "target", target, features.shape[:1], check.LABELS)
    check.check_device(name, "target", target, features.device, "features")
    check.check_choice(name, "reduction", reduction, check.REDUCTIONS)
    ignore_index = check.integer(name, "ignore_index", ignore_index)
    target = target.long()
    counted = target != ignore_index
    bad = counted & ((target < 0) | (target >= len(centers)))
    if features.device.type == "cpu" and not backends.transformed() and bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(f"{name}: expected labels in [0, {len(centers)}), got {int(target[row])} in row {row}")
    loss = _squared_distance(features, centers, target, counted & ~bad)
    loss = torch.where(bad, torch.nan, loss)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def _squared_distance(features: Tensor, centers: Tensor, label: Tensor, counted: Tensor) -> Tensor:
    """(N,) from the centre of the label; 0, value and gradient, where a sample does not count."""
    acc = torch.promote_types(check.acc_dtype(features), check.acc_dtype(centers))
    own = centers.to(acc)[torch.where(counted, label, 0)]  # (N, D)
    gap = torch.where(counted[:, None], features.to(acc) - own, 0.0)
    return gap.square().sum(1)


class EstimatedOffsetLoss(CrossEntropyLoss):
    r"""Cross-entropy, with features drawn to the centres of their class and the offset of the classifier kept uniform.

    .. math:: L = \mathrm{CE}(z, y) + \lambda_1 \frac1N \sum_i \lVert x_i - c_{y_i} \rVert^2
        + \lambda_2 L_{uni}(w_0), \qquad z_c = w_c \cdot x - w_{c0}, \quad w_{c0} = \tfrac12\, c_c \cdot w_c

    The offset is part of the model: the classifier is an :class:`classfair.nn.EstimatedOffsetLinear`, whose centres the
    loss moves once it has been computed with the old ones (Wen's rule). The offsets of frequent and rare classes become
    alike; no gain in accuracy is promised. Source: Kim and Kim 2021,
    "Imbalanced image classification with estimated offset", section 3.2; Wen et al. 2016 for the centres.

    ============================== ========================= ======================
    method                         head                      loss
    ============================== ========================= ======================
    estimated offset               ``bias=True``             ``l1 > 0``, ``l2 > 0``
    offset only ("w/o UC")         ``bias=True``             ``l1 > 0``, ``l2=0``
    constraint only ("UC only")    ``bias=False``            ``l1 > 0``, ``l2 > 0``
    zero-fixed offset              ``bias=False``            ``l1=0``, ``l2=0``
    ============================== ========================= ======================

    Args:
        l1: :math:`\lambda_1 \ge 0`, of the centre loss. The authors use 1; small networks want less, 0.1.
        l2: :math:`\lambda_2 \ge 0`, of the uniform constraint.
        weight, ignore_index, reduction, label_smoothing, backend: as in :class:`CrossEntropyLoss`. Class and sample
            weights weigh the whole loss of a sample, so that ``"mean"`` is the weighted mean of all three terms;
            ``"sum"`` is that times :meth:`total_weight`.

    Shape: features ``(N, D)``; head: the classifier of the model; target ``(N,)`` int64 or :class:`MixedTarget` (its
    distances are mixed, and the centre of the larger share moves); optional logits ``(N, C)``, the head's own, as
    :func:`classfair.nn.with_features` returns them.
    Gradients: features, ``head.weight`` (through logits and offset), logits, and the centres if they are parameters of
    the head; every order.
    State: that of :class:`CrossEntropyLoss`; the centres are the head's. No parameters. In evaluation, and without
    gradient, the loss is plain cross-entropy and no centre moves. With an initialised process group one step of the
    centres is of the batches of all processes.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, shape or range.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
        >>> _ = classfair.nn.replace_head(model, lambda old: classfair.nn.EstimatedOffsetLinear(4, 3))
        >>> net, criterion = classfair.nn.with_features(model), classfair.EstimatedOffsetLoss(l1=0.1, l2=1.0)
        >>> features, logits = net(torch.randn(6, 8))
        >>> loss = criterion(features, net.head, torch.arange(6) % 3, logits=logits)
        >>> loss.backward()
        >>> bool(net.head.centers.any())  # they have moved
        True
    """

    def __init__(self, l1: float = 1.0, l2: float = 1.0, **keywords: Unpack[Keywords]) -> None:
        super().__init__(**keywords)
        check.check_number("EstimatedOffsetLoss", "l1", l1, 0.0)
        check.check_number("EstimatedOffsetLoss", "l2", l2, 0.0)
        self.l1, self.l2 = float(l1), float(l2)

    def _perturbs(self) -> bool:
        return True

    def forward(  # type: ignore[override]
        self,
        features: Tensor,
        head: EstimatedOffsetLinear,
        target: Tensor | MixedTarget,
        *,
        logits: Tensor | None = None,
        sample_weight: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        """The loss; see the class for shapes. ``update=False`` leaves the centres alone, as in virtual steps."""
        self._check(features, head, target)
        recomputes = self._recomputes()
        logits = head(features) if logits is None else logits
        loss = cross_entropy(logits, target, sample_weight=sample_weight, **self._arguments())
        return self._finish(loss, features, head, target, sample_weight, update and not recomputes)

    def with_stats(  # type: ignore[override]
        self,
        features: Tensor,
        head: EstimatedOffsetLinear,
        target: Tensor | MixedTarget,
        *,
        logits: Tensor | None = None,
        sample_weight: Tensor | None = None,
        update: bool = True,
        **options: Any,
    ) -> tuple[Tensor, BatchStats]:
        """The loss and the :class:`BatchStats` of the logits, from one pass over them.

        ``options``: as in :meth:`ISDALoss.with_stats <FeatureLoss.with_stats>`.
        """
        self._check(features, head, target)
        recomputes = self._recomputes()
        logits = head(features) if logits is None else logits
        options |= {"sample_weight": sample_weight, **self._arguments()}
        loss, stats = cross_entropy_with_stats(logits, target, **options)
        return self._finish(loss, features, head, target, sample_weight, update and not recomputes), stats

    def _finish(
        self,
        loss: Tensor,
        features: Tensor,
        head: EstimatedOffsetLinear,
        target: Tensor | MixedTarget,
        sample_weight: Tensor | None,
        update: bool,
    ) -> Tensor:
        """The other two terms beside the loss, and then the step of the centres."""
        if not self.active:
            return loss
        own = self._of_samples(features, head, target, sample_weight)
        if self.reduction == "none":
            loss = loss + own
        elif self.reduction == "sum":
            loss = loss + own.sum()
        else:
            loss = loss + own.sum() / self.total_weight(target, sample_weight=sample_weight)
        if update:
            head.update(features, major_label(target), ignore_index=self.ignore_index)
        return loss

    def _of_samples(
        self,
        features: Tensor,
        head: EstimatedOffsetLinear,
        target: Tensor | MixedTarget,
        sample_weight: Tensor | None,
    ) -> Tensor:
        """(N,) the second and third term of each sample, weighted as its cross-entropy is."""
        centers, classes = whole_weight(head.centers), head.num_classes
        constraint = self.l2 * uniform_constraint(empirical_offset(whole_weight(head.weight), centers))
        if isinstance(target, MixedTarget):
            y_a, y_b, share = flat_mixture("EstimatedOffsetLoss", target, features.shape[:1], constraint.dtype)
            parts = [(y_a, share), (y_b, 1 - share)]
        else:
            parts = [(target.long(), torch.ones_like(target, dtype=constraint.dtype))]
        weight, total = self._arguments()["weight"], constraint.new_zeros(features.shape[0])
        for label, part in parts:
            counted = (label >= 0) & (label < classes) & (label != self.ignore_index)
            scale = torch.where(counted, part, 0.0)
            if weight is not None:
                scale = scale * weight[torch.where(counted, label, 0)]
            distance = _squared_distance(features, centers, label, counted)
            total = total + scale * (self.l1 * distance + constraint)
        return total if sample_weight is None else total * sample_weight

    def _check(self, features: Any, head: Any, target: Any) -> None:
        name = type(self).__name__
        if not isinstance(head, EstimatedOffsetLinear):
            raise TypeError(f"{name}: expected head as an EstimatedOffsetLinear, got {type(head).__name__}")
        if check.is_dtensor(features):
            raise TypeError(f"{name}: expected features as a plain tensor of this process's samples, got a DTensor")
        rows = features.shape[0] if isinstance(features, Tensor) and features.dim() == 2 else -1
        check.check_floats(name, "features", features, (max(rows, 0), head.in_features))
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(f"{name}: expected hard labels or MixedTarget, got probabilities")

    def extra_repr(self) -> str:
        return f"l1={self.l1}, l2={self.l2}, {super().extra_repr()}"
