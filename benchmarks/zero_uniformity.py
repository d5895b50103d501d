"""What a probe in every batch costs a training step of a convolutional net: ``python -m benchmarks.zero_uniformity``.

Steps take turns in one process and one thread, every other round in reverse order, timed by the clock of the process,
which stops while others run. Ratios to the plain step: of the least times, and quartiles of those of a round. ``plain
again`` is the plain step once more: how far it is from 1 is the noise.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import classfair

#: What a probe may cost beyond its share of the batch.
ALLOWED = 0.03


def network() -> nn.Sequential:
    """Six convolutions with batch norm, 10 million multiplications for an image of 32 x 32 pixels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100))


def stepper(size: int, mode: str | None) -> Callable[[], Any]:
    """One training step, with a probe or without."""
    model = network()
    net = model if mode is None else classfair.ZeroUniformity(model, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, target = torch.randn(size, 3, 32, 32), torch.arange(size) % 100

    def step() -> None:
        optimizer.zero_grad()
        output = net(images)
        if mode is None:
            loss = F.cross_entropy(output, target)
        else:
            logits, response = output
            loss = F.cross_entropy(logits, target) + 0.1 * classfair.zero_uniformity_loss(response)
        loss.backward()
        optimizer.step()

    return step


def measure(size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step."""
    steps = {"plain": stepper(size, None), "plain again": stepper(size, None)}
    steps |= {mode: stepper(size, mode) for mode in ("concat", "separate")}
    for step in steps.values():
        step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(rounds):
        for name in list(steps)[:: 1 if done % 2 else -1]:
            start = time.process_time()
            steps[name]()
            samples[name].append(time.process_time() - start)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| batch | step | time | least | median | quartiles | allowed |\n" + "| --- " * 7 + "|")
    for size in (64, 256):
        samples = measure(size, rounds)
        plain = samples.pop("plain")
        for name, seconds in samples.items():
            low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, plain, strict=True)], n=4)
            allowed = f"{(size + 1) / size + ALLOWED:.3f}" if name == "concat" else ""
            least = min(seconds) / min(plain)
            times = f"{1e3 * min(seconds):.0f} ms | {least:.3f} | {middle:.3f} | {low:.3f} to {high:.3f}"
            print(f"| {size} | {name} | {times} | {allowed} |", flush=True)


if __name__ == "__main__":
    main()
