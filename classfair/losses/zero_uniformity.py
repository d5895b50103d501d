"""Zero-uniformity training: a probe without content beside the images, to which a classifier should say nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from classfair import _validate as check

KINDS = ("std", "mean", "entropy")
PROBES = ("zero", "one", "mean", "random")
MODES = ("concat", "separate")


def zero_uniformity_loss(logits: Tensor, *, kind: str = "std", correction: int = 0) -> Tensor:
    r"""How far the response v to an input without content is from saying the same of all classes.

    .. math:: L_{\mathrm{std}} = \sqrt{\tfrac1C \sum_i (v_i - \bar v)^2}, \qquad
        L_{\mathrm{mean}} = \tfrac1C \sum_i \lvert v_i \rvert, \qquad
        L_{\mathrm{entropy}} = \sum_i p_i \log p_i + \log C, \quad p = \mathrm{softmax}(v)

    Source: Pan et al. 2025, "Zero-uniformity training", eq. 1 to 3, for dense predictions eq. 4. Their second one is
    called a mean and is a mean of sizes: it draws every logit to 0, while the other two let all of them shift together.

    Args:
        logits: ``(C,)``, ``(P, C)`` or ``(P, L, C)``, any float: one response in the last dimension; or
            ``(P, C, H, W)``, of which the mean over H and W is the response. A class with the logit -inf is masked: it
            takes no part, and C is the number of the others.
        kind: ``"std"``, ``"mean"`` or ``"entropy"``.
        correction: 0 divides the variance by C, as the paper; 1 by C - 1, as its code. Only ``"std"`` has one.

    Returns:
        ``()`` float32, or float64 for float64 logits, the mean over all responses; >= 0, and for a single class 0
        (``"mean"`` excepted).

    Gradient: ``logits``, any order. At its least value, where all logits are equal (for ``"mean"``: at logits of 0),
    ``"std"`` and ``"mean"`` have the gradient 0.

    Raises:
        TypeError, ValueError: ``zero_uniformity_loss: expected X, got Y``.

    Example:
        >>> v = torch.tensor([3.0, -1.0, 1.0, 1.0])
        >>> losses = [classfair.zero_uniformity_loss(v, kind=kind) for kind in ("std", "mean", "entropy")]
        >>> [round(loss.item(), 3) for loss in losses]
        [1.414, 1.5, 0.656]
    """
    name = "zero_uniformity_loss"
    check.check_floats(name, "logits", logits, getattr(logits, "shape", ()))
    if not 1 <= logits.dim() <= 4 or logits.numel() == 0:
        raise ValueError(
            f"{name}: expected logits of shape (C,), (P, C), (P, L, C) or (P, C, H, W) with all sizes >= 1,"
            f" got {tuple(logits.shape)}"
        )
    check.check_choice(name, "kind", kind, KINDS)
    check.check_choice(name, "correction", correction, (0, 1))
    if kind != "std" and correction:
        raise ValueError(f"{name}: expected correction 0 with kind {kind!r}, got {correction}")
    wide = logits.to(check.acc_dtype(logits))
    rows = wide.mean((2, 3)) if wide.dim() == 4 else wide.reshape(-1, wide.shape[-1])  # (R, C)
    if kind == "entropy":
        return divergence_from_uniform(rows).mean()
    there = rows != -torch.inf
    number = there.sum(1, dtype=rows.dtype).clamp_min(1.0)
    if kind == "mean":
        return (torch.where(there, rows, 0.0).abs().sum(1) / number).mean()
    return _deviation(rows, there, number, correction).mean()


def _deviation(rows: Tensor, there: Tensor, number: Tensor, correction: int) -> Tensor:
    """(R,) standard deviations; their gradient is 0 where they are."""
    # Less the largest of them, equal logits are zeros; their mean would be off by rounding, and not in the middle.
    kept = torch.where(there, rows, 0.0) - torch.where(there, rows.detach().amax(1, keepdim=True), 0.0)
    gap = torch.where(there, kept - kept.sum(1, keepdim=True) / number[:, None], 0.0)
    variance = gap.square().sum(1) / (number - correction).clamp_min(1.0)
    positive = variance != 0  # masked before the root, which has no derivative at 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)


def divergence_from_uniform(rows: Tensor) -> Tensor:
    """Kullback-Leibler divergence (R,) of the softmax of rows (R, C) from the uniform one, over logits above -inf."""
    there = rows != -torch.inf
    number = there.sum(1, keepdim=True, dtype=rows.dtype).clamp_min(1.0)
    log_p = torch.log_softmax(torch.where(there.any(1, keepdim=True), rows, 0.0), 1)
    # A probability that underflows, or of a masked class, counts 0 and not 0 * inf.
    return (log_p.exp() * torch.where(there, log_p + number.log(), 0.0)).sum(1)


class ZeroUniformity(nn.Module):
    r"""A model that sees a probe without content in front of every batch, and returns its answer to it apart.

    .. math:: L = L_{\mathrm{cls}}(u, y) + \alpha\, L_z(v), \qquad (v, u) = f(\mathrm{cat}(z, x))

    with :math:`L_z` of :func:`zero_uniformity_loss`: what a classifier answers to nothing is its bias, which the loss
    evens out. For training alone: evaluate with ``model`` itself, whose parameters these are, and save its state.
    Source: Pan et al. 2025, "Zero-uniformity training", algorithm 1.

    Args:
        model: maps a batch ``(N, ...)`` to tensors with N rows: logits, or a tuple, list or dict of such, as those of
            ``nn.with_features``. With DDP: ``DistributedDataParallel(ZeroUniformity(model))``, where each process adds
            its own probe.
        probe: ``"zero"`` is 0 in every normalised pixel, the mean colour of the data set; ``"one"``; ``"mean"`` the
            mean image of the batch; ``"random"`` standard normal pixels, new for every batch; or a tensor ``(...)``, or
            ``(P, ...)`` for several probes, of the shape of an image.
        mode: ``"concat"`` runs probe and images in one pass, as the paper: its cost is (N + 1) / N, and batch norm has
            the probe in its statistics, with a weight of 1 / (N + 1). ``"separate"`` runs the probe alone, after the
            images and with batch norm as in evaluation, so that neither batch nor running statistics see it; the
            smallest batch costs more than a share of a large one.

    Shape: images ``(N, ...)``, N may be 0; further arguments go to the model. Returns what the model returns for the
    images, and for the probe: ``(u, v)``, logits ``(N, C)`` and ``(1, C)``. In evaluation as in training.
    State: that of the model under ``model.``; the tensor of a probe is not in it.
    Gradient: the model, through both; none into the probe. Random numbers: ``"random"`` draws from torch's generator.

    Raises:
        TypeError, ValueError: unknown probe or mode; ``"separate"`` where a batch norm keeps no running statistics; a
            probe of another shape than the images.
        RuntimeError: an output of the model without a row for every image.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> net = classfair.ZeroUniformity(model)
        >>> logits, response = net(torch.randn(4, 3, 2, 2))
        >>> loss = logits.logsumexp(1).mean() + 0.1 * classfair.zero_uniformity_loss(response)
        >>> torch.allclose(response[0], model[1].bias)  # to nothing a linear layer answers its bias
        True
    """

    tensor: Tensor | None

    def __init__(self, model: nn.Module, probe: str | Tensor = "zero", mode: str = "concat") -> None:
        super().__init__()
        name = "ZeroUniformity"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: expected model as a torch.nn.Module, got {type(model).__name__}")
        if isinstance(probe, Tensor):
            check.check_floats(name, "probe", probe, probe.shape)
        else:
            check.check_choice(name, "probe", probe, PROBES)
        check.check_choice(name, "mode", mode, MODES)
        if mode == "separate" and any(norm.running_mean is None for norm in _batch_norms(model)):
            raise ValueError(
                f"{name}: expected batch norm with running statistics for mode 'separate', got one without"
            )
        self.model, self.mode = model, mode
        self.probe = "tensor" if isinstance(probe, Tensor) else probe
        self.register_buffer("tensor", probe.detach() if isinstance(probe, Tensor) else None, persistent=False)

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What the model returns for the images ``(N, ...)``, and for the probe."""
        probe = self._probe(images)
        if self.mode == "separate":
            output = self.model(images, *args, **kwargs)
            with _as_in_evaluation(self.model):
                return output, self.model(probe, *args, **kwargs)
        together = self.model(torch.cat([probe, images]), *args, **kwargs)
        first, rows = len(probe), len(probe) + len(images)
        for value in pytree.tree_leaves(together):
            if isinstance(value, Tensor) and (value.dim() == 0 or len(value) != rows):
                raise RuntimeError(
                    f"ZeroUniformity: expected outputs of the model with {rows} rows, of images and probe,"
                    f" got shape {tuple(value.shape)}"
                )
        return tuple(
            pytree.tree_map(lambda value, part=part: value[part] if isinstance(value, Tensor) else value, together)
            for part in (slice(first, None), slice(first))
        )

    @torch.no_grad()
    def _probe(self, images: Tensor) -> Tensor:
        """(P, ...) in the dtype, on the device and in the memory format of the images."""
        check.check_floats("ZeroUniformity", "images", images, getattr(images, "shape", ()))
        one = (1, *images.shape[1:])
        if self.tensor is not None:
            probe = self.tensor if self.tensor.dim() == images.dim() else self.tensor[None]
            if probe.shape[1:] != images.shape[1:]:
                raise ValueError(
                    f"ZeroUniformity: expected a probe of the shape of an image, {tuple(images.shape[1:])},"
                    f" got {tuple(self.tensor.shape)}"
                )
            probe = probe.to(images)
        elif self.probe == "random":
            probe = torch.randn(one, dtype=images.dtype, device=images.device)
        elif self.probe == "mean":
            probe = images.mean(0, keepdim=True) if len(images) else images.new_zeros(one)
        else:
            probe = images.new_full(one, float(self.probe == "one"))
        last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
        return probe.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def extra_repr(self) -> str:
        return f"probe={self.probe!r}, mode={self.mode!r}"


def _batch_norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def _as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by its running statistics and leaves them alone."""
    norms = [norm for norm in _batch_norms(model) if norm.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
