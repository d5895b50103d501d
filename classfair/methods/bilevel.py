"""Bilevel MetaLAD: the weights of its terms are learnt on a balanced meta set, one virtual step at a time."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from classfair import _validate as check
from classfair.functional import cross_entropy
from classfair.losses import MetaLADLoss
from classfair.methods.mixed_derivative import (
    MIXED,
    Head,
    Network,
    Outputs,
    Problem,
    along,
    gradients,
    lent,
    norm,
    works,
)
from classfair.nn import WithFeatures
from classfair.statistics._processes import world_size
from classfair.targets import MixedTarget, total_weight

TINY = torch.finfo(torch.float32).tiny  # to divide by in the place of 0


@contextlib.contextmanager
def _with_omega(criterion: MetaLADLoss, omega: Tensor) -> Iterator[None]:
    """The criterion with these weights of terms, as a sum over samples."""
    kept = criterion.omega, criterion.reduction
    criterion.omega, criterion.reduction = omega, "sum"
    try:
        yield
    finally:
        criterion.omega, criterion.reduction = kept


class MetaLADStep:
    r"""Iterations of bilevel MetaLAD: the weights of the terms follow the loss on a balanced meta set.

    One iteration takes a virtual step of plain SGD, moves the weights of the terms down the gradient of the meta loss
    at its end, and takes the real step with the new weights:

    .. math:: \hat\theta(\Omega) &= \theta - \eta_1 \nabla_\theta L_{train}(\theta; \Omega) \\
        \Omega &\leftarrow \Omega - \eta_2 \nabla_\Omega L_{meta}(\hat\theta(\Omega)) \\
        \theta &\leftarrow \text{optimizer step on } L_{train}(\theta; \Omega)

    :math:`\eta_1` is the current learning rate of the optimizer, of each parameter group.
    Source: Wu et al. 2023, "Rethinking Class Imbalance in Machine Learning", eq. 34 to 36 and algorithm 1.

    Args:
        model: what :func:`classfair.nn.with_features` returns; with several processes in DistributedDataParallel.
        criterion: its weights of terms, ``omega``, are what is learnt; in training mode.
        optimizer: of the model's parameters; those that it lacks, or that are frozen, stay in the virtual step, too.
        meta_lr: :math:`\eta_2 \ge 0`. It follows the scale of the losses; on small sets 10 works, 30 may diverge, the
            paper's 100 does. 0 leaves ``omega`` alone and saves the virtual step.
        outer: the meta loss. ``"ce"`` is plain cross-entropy; ``"perturbed"`` is the criterion itself, as the paper
            prints it. That falls fastest with the weights of the terms, which so are driven down without end.
        method: how the mixed second derivative is computed. ``"jvp"`` carries the meta gradient forward through the
            network once and differentiates twice in the loss alone; ``"double_backward"`` through everything;
            ``"finite_difference"`` compares two forward passes, for any network; ``"last_layer"`` takes the virtual
            step with the head alone, on fixed features, whose product must be the model's logits.
        process_group: of the processes that train together; None: the default one, if it is initialised.
        scaler: of mixed precision with float16.

    Called with images, target ``(N,)`` int64 or :class:`MixedTarget`, meta images and their target ``(K,)`` int64, it
    does one iteration and returns the training loss ``()``, the mean over all processes, without gradient. Whatever
    the reduction of the criterion, losses are means over the weights of all images of all processes.

    Virtual passes leave no trace: parameters, their ``.grad``, buffers (the running averages of batch norm) and random
    numbers are as before, and the real pass draws the dropout of the virtual one. So batch norm and the class
    statistics of the criterion move once, in the real step; hooks of the optimizer run once, too (clip the gradient
    in ``optimizer.register_step_pre_hook``). Autocast around the call is that of the forward passes. For a real step
    of one's own, with accumulation for example, there is :meth:`update_omega`.

    State: ``refused`` ``()`` int64, the number of updates that would have made ``omega`` non-finite: it stayed.
    ``omega`` is in the state of the criterion.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or range, an optimizer of other parameters, a plain model
            with several processes, a criterion in evaluation.
        RuntimeError: a network whose operators lack the derivative; the message names the methods that it has.

    Example:
        >>> net = classfair.nn.with_features(torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(),
        ...                                                      torch.nn.Linear(4, 3)))
        >>> criterion = classfair.MetaLADLoss([60, 30, 10], feature_dim=4)
        >>> step = classfair.MetaLADStep(net, criterion, torch.optim.SGD(net.parameters(), lr=0.1))
        >>> images, target = torch.randn(20, 5), torch.arange(20) % 3
        >>> loss = step(images, target, torch.randn(6, 5), torch.arange(6) % 3)
        >>> bool((criterion.omega != 1).any()), int(step.refused)
        (True, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: MetaLADLoss,
        optimizer: torch.optim.Optimizer,
        *,
        meta_lr: float = 10.0,
        outer: str = "ce",
        method: str = "jvp",
        process_group: Any = None,
        scaler: Any = None,
    ) -> None:
        plain = getattr(model, "_orig_mod", model)
        self._parallel = isinstance(plain, DistributedDataParallel)
        plain = plain.module if self._parallel else plain
        for name, value, kind in (
            ("criterion", criterion, MetaLADLoss),
            ("optimizer", optimizer, torch.optim.Optimizer),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"MetaLADStep: expected {name} as {kind.__name__}, got {type(value).__name__}")
        if not isinstance(plain, WithFeatures):
            raise TypeError(f"MetaLADStep: expected model from nn.with_features, got {type(plain).__name__}")
        check.check_number("MetaLADStep", "meta_lr", meta_lr, 0.0, torch.finfo(torch.float32).max)
        check.check_choice("MetaLADStep", "outer", outer, ("ce", "perturbed"))
        check.check_choice("MetaLADStep", "method", method, tuple(MIXED))
        self.model, self.criterion, self.optimizer, self.scaler = model, criterion, optimizer, scaler
        self.meta_lr, self.outer, self.method, self.process_group = meta_lr, outer, method, process_group
        self.refused = torch.zeros((), dtype=torch.int64, device=criterion.omega.device)
        self._network = Network(plain)
        self._trusted = False  # whether forward mode was found to agree with the gradient
        self._rates(self._part())

    def __call__(
        self, images: Tensor, target: Tensor | MixedTarget, meta_images: Tensor, meta_target: Tensor
    ) -> Tensor:
        """One iteration; the training loss, without gradient."""
        if self._world > 1 and not self._parallel:
            raise ValueError("MetaLADStep: expected model in DistributedDataParallel with several processes")
        self._check_training()
        if self.meta_lr:
            self.update_omega(images, target, meta_images, meta_target)
        total = self._mean_over(self.criterion.total_weight(target))
        self.optimizer.zero_grad()
        features, logits = self.model(images)
        with _with_omega(self.criterion, self.criterion.omega):
            loss = self.criterion(features, self._network.model.head.weight, target, logits=logits) / total
        with torch.autocast(loss.device.type, enabled=False):
            objective = loss * self._world  # of which DistributedDataParallel takes the mean
            (objective if self.scaler is None else self.scaler.scale(objective)).backward()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return self._sum([loss.detach()])[0]

    def update_omega(
        self, images: Tensor, target: Tensor | MixedTarget, meta_images: Tensor, meta_target: Tensor
    ) -> Tensor:
        """The first half of an iteration, the virtual step and the update of ``omega``; returns the hypergradient."""
        gradient = self.hypergradient(images, target, meta_images, meta_target)
        with torch.no_grad():
            omega = self.criterion.omega
            new = omega - self.meta_lr * gradient
            good = new.isfinite().all()
            omega.copy_(torch.where(good, new, omega))
            self.refused = self.refused.to(omega.device) + ~good
        return gradient

    def hypergradient(
        self, images: Tensor, target: Tensor | MixedTarget, meta_images: Tensor, meta_target: Tensor
    ) -> Tensor:
        """Gradient of the meta loss at the virtual parameters, of the shape of ``omega``; nothing moves.

        With several processes it is that of the meta images of all.
        """
        self._check_training()
        omega = self.criterion.omega.detach().clone().requires_grad_()
        module, rates = self._part(), self._rates(self._part())
        inputs, meta_inputs = images, meta_images
        if self.method == "last_layer":
            with torch.no_grad():
                inputs, meta_inputs = (_features(self._network, x) for x in (images, meta_images))
        theta = {n: p.detach().requires_grad_() for n, p in module.named_parameters() if n in rates}
        total, scale = self._mean_over(self.criterion.total_weight(target)), self._scale(omega)

        def loss(out: Outputs) -> Tensor:
            return self._perturbed(out, target) * (scale / total)

        problem = Problem(lambda parameters: lent(module, parameters, inputs), loss, theta, omega)
        with _with_omega(self.criterion, omega):
            with problem.run(theta) as out:
                own = gradients(loss(out), list(theta.values()))
            steps = zip(theta.items(), self._sum(own), rates.values(), strict=True)
            virtual = {n: (p - rate * (g / scale)).detach().to(p.dtype).requires_grad_() for (n, p), g, rate in steps}
            with lent(module, virtual, meta_inputs) as out:
                meta_loss = self._meta_loss(out, meta_target) * scale
                *meta, direct = gradients(meta_loss, [*virtual.values(), omega])
            meta = [rate * (g / scale) for g, rate in zip(self._sum(meta), rates.values(), strict=True)]
            length = norm(meta).clamp_min(TINY)
            direction = [(g / length).to(p.dtype) for g, p in zip(meta, theta.values(), strict=True)]
            mixed = self._mixed(problem, direction)
        return self._sum([(direct - length * mixed).div_(scale).to(omega.dtype)])[0]

    def state_dict(self) -> dict[str, Tensor]:
        return {"refused": self.refused}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.refused.copy_(state_dict["refused"])

    def _check_training(self) -> None:
        if not self.criterion.active:
            how = "gradients" if self.criterion.training else "criterion.train()"
            raise ValueError(f"MetaLADStep: expected a criterion that perturbs, got one without {how}")

    def _part(self) -> nn.Module:
        """What takes the virtual step."""
        return Head(self._network.model.head) if self.method == "last_layer" else self._network

    def _rates(self, module: nn.Module) -> dict[str, Any]:
        """The current learning rate of each parameter that is trained, by its name, in the order of the module."""
        of = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        rates = {n: of[id(p)] for n, p in module.named_parameters() if p.requires_grad and id(p) in of}
        if any(check.is_dtensor(p) for p in module.parameters()):
            raise TypeError("MetaLADStep: expected parameters as plain tensors, got DTensor (FSDP2)")
        if not rates:
            whose = "the head's" if self.method == "last_layer" else "the model's"
            raise ValueError(f"MetaLADStep: expected an optimizer of {whose} parameters, got one of others")
        return rates

    def _perturbed(self, out: Outputs, target: Tensor | MixedTarget) -> Tensor:
        """The sum over samples; the class statistics stay."""
        return self.criterion(out.features.detach(), out.weight, target, logits=out.logits, update=False)

    def _meta_loss(self, out: Outputs, target: Tensor) -> Tensor:
        criterion = self.criterion
        if self.outer == "perturbed":
            return self._perturbed(out, target) / self._mean_over(criterion.total_weight(target))
        options: dict[str, Any] = {"ignore_index": criterion.ignore_index}
        total = total_weight(target, num_classes=out.weight.shape[0], **options)
        loss = cross_entropy(out.logits, target, reduction="sum", backend=criterion.backend, **options)
        return loss / self._mean_over(total)

    def _mixed(self, problem: Problem, direction: list[Tensor]) -> Tensor:
        try:
            if self.method == "jvp" and not self._trusted:
                self._check_forward_mode(problem)
            return MIXED[self.method](problem, direction)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            others = [m for m in MIXED if m != self.method and works(m, problem, direction)]
            raise RuntimeError(
                f"MetaLADStep: expected a model whose operators have what method={self.method!r} needs, got"
                f" {str(error).splitlines()[0]!r}; here {', '.join(map(repr, others))} work"
            ) from error

    def _check_forward_mode(self, problem: Problem) -> None:
        """Once, at the first call: operators without forward mode may drop tangents silently."""
        theta = list(problem.theta.values())
        with torch.autocast(theta[0].device.type, enabled=False):
            with problem.run(problem.theta) as out:
                own = gradients(problem.loss(out), theta)
            sizes = [norm([g]) for g in own]
            direction = [g / s.clamp_min(TINY).to(g.dtype) for g, s in zip(own, sizes, strict=True)]
            expected, found = torch.stack(sizes).sum(), along(problem, direction).detach()
        if bool((found - expected).abs() > 0.03 * expected):
            raise RuntimeError("an operator that drops tangents")
        self._trusted = True

    @property
    def _world(self) -> int:
        return world_size(self.process_group)

    def _sum(self, values: list[Tensor]) -> list[Tensor]:
        """Over processes, in one exchange."""
        if self._world == 1:
            return values
        flat = torch.cat([v.detach().reshape(-1) for v in values])
        dist.all_reduce(flat, group=self.process_group)
        parts = zip(flat.split([v.numel() for v in values]), values, strict=True)
        return [part.view_as(v).to(v.dtype) for part, v in parts]

    def _mean_over(self, weight: Tensor) -> Tensor:
        """What to divide a sum by for the mean over all processes; 1 where there is nothing."""
        total = self._sum([weight])[0]
        return torch.where(total > 0, total, 1.0)

    def _scale(self, like: Tensor) -> Tensor:
        one = torch.ones((), device=like.device)
        return one if self.scaler is None else self.scaler.scale(one)


def _features(network: Network, images: Tensor) -> Tensor:
    with lent(network, {}, images) as out:
        return out.features
