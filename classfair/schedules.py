"""Schedules that change a loss from epoch to epoch, with the manners of torch's learning-rate schedulers."""

from typing import Any

import torch
from torch import Tensor

from classfair import _validate as check
from classfair.losses import CrossEntropyLoss, ISDALoss
from classfair.priors import effective_number_weights


class _Schedule:
    """Counts epochs and puts what belongs to the epoch into the criterion's buffers."""

    _STATE: tuple[str, ...] = ("last_epoch",)

    def __init__(self, criterion: CrossEntropyLoss) -> None:
        # A compiled module keeps the loss it was made from, and runs on the same buffers.
        criterion = getattr(criterion, "_orig_mod", criterion)
        if not isinstance(criterion, CrossEntropyLoss):
            got = type(criterion).__name__
            raise TypeError(f"{type(self).__name__}: expected criterion as a loss of classfair, got {got}")
        if criterion._place.is_meta:
            name = type(self).__name__
            raise ValueError(f"{name}: expected criterion with values, got one on the meta device; make {name} later")
        self.criterion = criterion
        self.last_epoch = 0

    def _put(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        """To be called once at the end of every epoch."""
        self.last_epoch += 1
        self._put()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, as in torch's schedulers, and tensors; loads with ``torch.load(weights_only=True)``."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position and the criterion's buffers, before or after the criterion's own state is loaded."""
        if set(state_dict) != set(self._STATE):
            expected, got = sorted(self._STATE), sorted(map(str, state_dict))
            raise ValueError(f"{type(self).__name__}: expected a state with {expected}, got {got}")
        for name in self._STATE:
            setattr(self, name, state_dict[name])
        self._put()


class DeferredReweighting(_Schedule):
    """Plain weights until epoch ``start``, class-balanced ones from then on.

    Features are learnt from the data as they are, and only the last epochs, with a small learning rate, are balanced.
    It sets ``criterion.reweight``, to None before ``start`` and to :func:`effective_number_weights` from there; the
    user's ``weight`` is left alone and multiplies. With :class:`LDAMLoss` it is LDAM-DRW.
    Source: Cao et al. 2019, section 3.3 and algorithm 1 (start = 160 of 200 epochs).

    Args:
        criterion: any loss of classfair without weights of its own (:class:`ClassBalancedLoss` has them).
        class_counts: ``(C,)`` samples of each class in the training set: tensor, array or sequence.
        start: first epoch >= 0, counted from 0, with the weights.
        beta: in [0, 1).

    State: ``last_epoch``, ``start`` and the weights; as with torch's schedulers the loaded ones win over the
    constructor's. It is applied at construction, for epoch 0, so construct it before loading a checkpoint.

    Raises:
        TypeError, ValueError: another kind of criterion or one with weights of its own; counts, start or beta out of
            range, or counts of another number of classes than the criterion's.

    Example:
        >>> criterion = classfair.LDAMLoss([100, 10])
        >>> schedule = DeferredReweighting(criterion, [100, 10], start=1)
        >>> criterion.reweight is None
        True
        >>> schedule.step()  # at the end of epoch 0
        >>> [round(w, 2) for w in criterion.reweight.tolist()]
        [0.18, 1.82]
    """

    _STATE = ("last_epoch", "start", "weights")

    def __init__(self, criterion: CrossEntropyLoss, class_counts: Any, *, start: int, beta: float = 0.9999) -> None:
        super().__init__(criterion)
        name = type(self.criterion).__name__
        if "reweight" in self.criterion.own:
            raise ValueError(f"DeferredReweighting: expected criterion without class weights of its own, got {name}")
        check.check_number("DeferredReweighting", "start", start, 0)
        self.start = start
        self.weights = effective_number_weights(class_counts, beta).cpu()
        self.criterion.put("reweight", self.weights)  # so that a wrong size is an error now and not at `start`
        self._put()

    def _put(self) -> None:
        self.criterion.put("reweight", self.weights if self.last_epoch >= self.start else None)


class Warmup(_Schedule):
    """What a loss does to plain cross-entropy, grown linearly from nothing to full strength over the first epochs.

    In epoch e the loss's own vectors (the offset of :class:`LogitAdjustedLoss`, the margin of :class:`LDAMLoss`, the
    weights of :class:`ClassBalancedLoss`) have the strength s = min(1, e / epochs): offset and margin are multiplied
    by s, weights are 1 + (w - 1) s. So epoch 0 is plain cross-entropy and epoch ``epochs`` the loss itself. The
    focusing exponent is no vector and is not ramped.

    It composes with :class:`DeferredReweighting` in any order of construction and of steps: that one owns
    ``reweight`` of a loss that has no weights of its own, this one what the loss made itself.

    Args:
        criterion: a loss with vectors of its own, and without another Warmup.
        epochs: >= 1, the epoch that has full strength.

    State: ``last_epoch``, ``epochs`` and the vectors at full strength (the criterion's state has the ramped ones); as
    with torch's schedulers the loaded ones win over the constructor's. It is applied at construction, for epoch 0.

    Raises:
        TypeError, ValueError: another kind of criterion, one with nothing to ramp, or one that has a Warmup; epochs
            < 1.

    Example:
        >>> criterion = classfair.LogitAdjustedLoss([90, 10])
        >>> schedule = Warmup(criterion, epochs=2)
        >>> for epoch in range(3):
        ...     print([round(x, 4) for x in criterion.offset.tolist()])  # train an epoch here
        ...     schedule.step()
        [0.0, 0.0]
        [-0.0527, -1.1513]
        [-0.1054, -2.3026]
    """

    _STATE = ("last_epoch", "epochs", "full")

    def __init__(self, criterion: CrossEntropyLoss, epochs: int) -> None:
        super().__init__(criterion)
        criterion, name = self.criterion, type(self.criterion).__name__
        check.check_number("Warmup", "epochs", epochs, 1)
        if not criterion.own:
            raise ValueError(f"Warmup: expected criterion with an offset, a margin or weights of its own, got {name}")
        if criterion.ramped:  # its vectors would be taken for the full ones, which at epoch 0 are zeros
            raise ValueError(f"Warmup: expected criterion without a Warmup, got {name} that has one; make a new {name}")
        criterion.ramped = True
        self.epochs = epochs
        self.full = {vector: getattr(criterion, vector).detach().cpu().clone() for vector in criterion.own}
        self._put()

    def _put(self) -> None:
        strength = min(1.0, self.last_epoch / self.epochs)
        for name, full in self.full.items():
            neutral = torch.ones_like(full) if name == "reweight" else torch.zeros_like(full)
            # lerp is exact at both ends, 1 + (w - 1) is not.
            self.criterion.put(name, torch.lerp(neutral, full, strength))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, as in torch's schedulers, and the vectors by their names."""
        return {"last_epoch": self.last_epoch, "epochs": self.epochs, **self.full}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position and the criterion's buffers, before or after the criterion's own state is loaded."""
        state = dict(state_dict)
        # Up to version 0.1 the vectors were a dictionary of their own.
        full: dict[str, Tensor] = state.pop("full", None) or {
            name: state.pop(name) for name in ("offset", "margin", "reweight") if name in state
        }
        if set(full) != set(self.full):
            raise ValueError(f"Warmup: expected a state of {sorted(self.full)}, got one of {sorted(full)}")
        super().load_state_dict(state | {"full": full})


class ISDARamp(_Schedule):
    r"""The strength of :class:`ISDALoss`, grown linearly: :math:`\lambda_0 e / E` in epoch e of E.

    It is 0 in the first epoch, where covariances are those of an untrained network, and never quite reaches
    :math:`\lambda_0`, as in the authors' code.
    Source: Wang et al. 2019, "Implicit Semantic Data Augmentation for Deep Networks", section 3.3.

    Args:
        criterion: an :class:`ISDALoss`; its strength is :math:`\lambda_0`.
        epochs: E >= 1.

    State: ``last_epoch``, ``epochs`` and the full strength. It is applied at construction, for epoch 0.

    Raises:
        TypeError, ValueError: another kind of criterion; epochs < 1.

    Example:
        >>> criterion = classfair.ISDALoss(num_classes=3, feature_dim=2, strength=0.5)
        >>> schedule = ISDARamp(criterion, epochs=4)
        >>> schedule.step()
        >>> criterion.strength.item()
        0.125
    """

    _STATE = ("last_epoch", "epochs", "full")

    def __init__(self, criterion: ISDALoss, epochs: int) -> None:
        super().__init__(criterion)
        if not isinstance(self.criterion, ISDALoss):
            raise TypeError(f"ISDARamp: expected criterion as ISDALoss, got {type(self.criterion).__name__}")
        check.check_number("ISDARamp", "epochs", epochs, 1)
        self.epochs = epochs
        self.full = float(self.criterion.strength)
        self._put()

    def _put(self) -> None:
        assert isinstance(self.criterion, ISDALoss)
        self.criterion.strength.fill_(self.full * min(1.0, self.last_epoch / self.epochs))
