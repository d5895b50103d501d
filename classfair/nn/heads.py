"""Classifiers in the place of a linear layer."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classfair import _validate as check
from classfair._state import KeepsPrecision
from classfair.ops import LabelIndex, label_index
from classfair.ops.label_index import check_index
from classfair.statistics._processes import batch_means
from classfair.statistics.offsets import empirical_offset


class CosineLinear(nn.Module):
    r"""Classifier without bias whose logits are scaled cosines: :math:`z_c = s\,\cos(x, w_c)`.

    The scale is part of the model, so that ``model(x)`` are the logits of the softmax: give :class:`LDAMLoss` the same
    ``scale``. Norms are computed in float32 (float64 for float64), under autocast as well; the product with the
    weights is rounded as that of :class:`torch.nn.Linear` is. Only the direction of a row of ``weight`` matters, and
    rows start as unit vectors of random direction; the shorter a row, the faster it turns.
    Source: Cao et al. 2019, "Learning imbalanced datasets with label-distribution-aware margin loss", section 3.2.

    Args:
        in_features: D.
        out_features: C.
        scale: s > 0, a constant.
        device, dtype: of the weight, as for :class:`torch.nn.Linear`.

    Shape: ``(..., D)`` to ``(..., C)``, of the dtype of the input; in ``[-s, s]``.
    State: ``weight`` ``(C, D)``, a parameter.
    Gradients: input and ``weight``, every order. A zero input or a zero row gives the logit 0; its gradient is that at
    norm 1, so that a zero row can leave zero.

    Raises:
        ValueError: a number of features below 1, or a scale that is not a finite number > 0.

    Example:
        >>> head = classfair.nn.CosineLinear(2, 2, scale=10.0)
        >>> _ = head.load_state_dict({"weight": torch.tensor([[3.0, 0.0], [0.0, 0.5]])})
        >>> head(torch.tensor([[3.0, 4.0]])).tolist()
        [[6.0, 8.0]]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 30.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.check_count("CosineLinear", "in_features", in_features)
        check.check_count("CosineLinear", "out_features", out_features)
        if not 0 < scale < math.inf:
            raise ValueError(f"CosineLinear: expected a finite scale > 0, got {scale}")
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new directions."""
        with torch.no_grad():
            self.weight.copy_(_with_norm(torch.randn_like(self.weight), 1.0))

    def forward(self, input: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., C)``."""
        return F.linear(_with_norm(input, self.scale), _with_norm(self.weight, 1.0))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"


def _with_norm(x: Tensor, norm: float) -> Tensor:
    """Rows of the given norm, and of the dtype of x; zero rows stay zero."""
    # Autocast has no operation here on its list of those to run in half precision.
    wide = x.to(check.acc_dtype(x))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * (norm / torch.where(length > 0, length, 1.0))).to(x.dtype)


class EstimatedOffsetLinear(KeepsPrecision):
    r"""Classifier whose offset follows from its weights and from centres of the classes.

    .. math:: z_c = w_c \cdot x - w_{c0}, \qquad w_{c0} = \tfrac12\, c_c \cdot w_c

    A trained bias learns how frequent a class is. This offset is part of the prediction, in training and in
    evaluation, and :class:`classfair.EstimatedOffsetLoss` keeps it uniform. The centres follow the features of their
    class, not the gradient: :meth:`update`, which the loss calls, moves them by the rule of Wen et al.,

    .. math:: c_j \leftarrow c_j + \alpha\, \frac{n_j}{1 + n_j}\, (m_j - c_j),

    :math:`n_j` and :math:`m_j` the number and the mean of the samples of class j in the batch. Classes without a sample
    keep their centre; that of a class never seen is 0, and so is its offset.
    Source: Kim and Kim 2021, "Imbalanced image classification with estimated offset", section 3.2; Wen et al. 2016, "A
    discriminative feature learning approach for deep face recognition", eq. 4.

    Args:
        in_features: D.
        num_classes: C.
        bias: False fixes the offset at zero; the centres are there all the same, for the uniform constraint alone.
        alpha: step of the centres in (0, 1].
        centre_grad: ``"wen"``, centres as above; ``"full"`` makes them parameters, which every term of the loss moves
            and :meth:`update` does not. They then leave the means of their classes.
        device, dtype: of the weight, as for :class:`torch.nn.Linear`.

    Shape: ``(..., D)`` to ``(..., C)``, of the dtype of the input.
    State: ``weight`` ``(C, D)``, a parameter, initialised as that of :class:`torch.nn.Linear`; ``centers`` ``(C, D)``,
    zero at first, float32 (float64 after ``double()``): ``half()`` and ``to(bfloat16)`` do not round them.
    Gradients: input and ``weight``, through the product and the offset, and ``centers`` if they are parameters; every
    order. A checkpoint that recomputes the head in the backward pass would see the centres after their step: leave the
    head out of it.

    Raises:
        TypeError, ValueError: a size below 1; alpha or centre_grad out of range.

    Example:
        >>> head = classfair.nn.EstimatedOffsetLinear(2, 2)
        >>> weight, centers = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> _ = head.load_state_dict({"weight": weight, "centers": centers})
        >>> head.offset.tolist(), head(torch.tensor([[1.0, 1.0]])).tolist()
        ([3.0, 2.0], [[0.0, -1.0]])
    """

    centers: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        alpha: float = 0.5,
        centre_grad: str = "wen",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "EstimatedOffsetLinear"
        check.check_size(name, "in_features", in_features)
        check.check_size(name, "num_classes", num_classes)
        check.check_flag(name, "bias", bias)
        check.check_number(name, "alpha", alpha)
        if not 0 < alpha <= 1:
            raise ValueError(f"{name}: expected alpha in (0, 1], got {alpha}")
        check.check_choice(name, "centre_grad", centre_grad, ("wen", "full"))
        self.in_features, self.num_classes = in_features, num_classes
        self.subtracts, self.alpha, self.centre_grad = bias, alpha, centre_grad
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        centers = torch.empty(num_classes, in_features, device=device, dtype=wide)
        if centre_grad == "full":
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights; centres of zero."""
        nn.init.uniform_(self.weight, -(self.in_features**-0.5), self.in_features**-0.5)
        self.centers.zero_()

    @property
    def offset(self) -> Tensor:
        """``(C,)`` the estimated offset, float32 or float64; with gradient."""
        return empirical_offset(self.weight, self.centers)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., C)``."""
        return F.linear(input, self.weight, -self.offset.to(self.weight.dtype) if self.subtracts else None)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        target: Tensor | LabelIndex,
        *,
        ignore_index: int = -100,
        process_group: Any = None,
        sync: bool = True,
        max_batch: int | None = None,
    ) -> None:
        """Move the centres towards the means of a batch; nothing with ``centre_grad="full"``.

        ``centers`` is another tensor afterwards, so that a backward pass still finds those of its forward pass. A CUDA
        graph, which reads fixed addresses, has to leave this call out.

        Args:
            features: ``(N, D)`` floating, detached; N may be 0. Rows with a NaN or an infinity do not enter.
            target: ``(N,)`` int64; or a ``LabelIndex`` of it that is there already.
            ignore_index: label of samples that are left out.
            process_group, sync, max_batch: as in :meth:`classfair.ClassStatistics.update`: one step for the batches of
                all processes together.

        Raises:
            TypeError, ValueError: for arguments of another dtype, shape or device.
            IndexError: on the CPU, for a label out of range. On other devices such samples are left out.
        """
        if self.centre_grad == "full":
            return
        if isinstance(target, LabelIndex):
            check_index("EstimatedOffsetLinear.update", target, self.num_classes, self.centers.device)
            index = target
        else:
            index = label_index(target, self.num_classes, ignore_index=ignore_index)
        check.check_floats("EstimatedOffsetLinear.update", "features", features, (len(index.slot), self.in_features))
        moments, key = batch_means(features, index, process_group=process_group, sync=sync, max_batch=max_batch)
        count = moments.count.to(moments.mean.dtype)[:, None]  # (M, 1), 0 for rows without a class
        step = torch.where(count > 0, self.alpha * count / (1 + count) * (moments.mean - self.centers[key]), 0.0)
        # Not in place: whatever graph, compiled or not, has saved the centres of its forward pass still needs them.
        self.centers = self.centers.index_add(0, key, step.to(self.centers.dtype))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.subtracts}"
        return f"{sizes}, alpha={self.alpha}, centre_grad={self.centre_grad!r}"
