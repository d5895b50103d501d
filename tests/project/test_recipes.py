"""What docs/recipes.md says is true, beyond that its code runs (which tests/project/test_docs.py sees to)."""

import os
import re
import socket
import subprocess
import sys
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter

import classfair
from tests.project.test_docs import ROOT, for_torchrun, python_blocks, run_block

RECIPES = ROOT / "docs" / "recipes.md"


def recipe(heading):
    """The python block under a heading."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", RECIPES.read_text(), re.M | re.S)
    (block,) = re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)
    return block


def changed(block, old, new):
    assert block.count(old) == 1
    return block.replace(old, new)


def gradient(model):
    """One vector; the next backward starts from zero."""
    result = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return result


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_links_lead_to_headings():
    text = RECIPES.read_text()
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.*)$", text, re.M)}
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert len(links) > 8
    assert set(links) <= headings
    for file in re.findall(r"\]\((\w[^):]*\.md)\)", text):
        assert (RECIPES.parent / file).is_file()


class Interrupted(Exception):
    pass


def interrupted_after(epochs):
    """A print that raises with the first line of an epoch, after its checkpoint was written."""
    lines = []

    def write(*args, end="\n"):
        lines.append(args)
        if len(lines) > 2 * epochs - 2:
            raise Interrupted

    return write


@pytest.mark.parametrize("forget", [(), ('"criterion": criterion, ', '"warmup": warmup, ')])
def test_a_resumed_plain_loop_ends_as_an_uninterrupted_one(forget, here):
    block = recipe("Plain loop")
    for part in forget:
        block = changed(block, part, "")
    names = run_block(block)
    names["print"] = lambda *args, **keywords: None
    expected = names["train"](here / "whole.pt", 4).state_dict()
    names["print"] = interrupted_after(1)
    with pytest.raises(Interrupted):
        names["train"](here / "parts.pt", 4)
    assert torch.load(here / "parts.pt", weights_only=True)["epochs"] == 1
    names["print"] = lambda *args, **keywords: None
    got = names["train"](here / "parts.pt", 4).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected) is not bool(forget)


def test_accumulated_gradient_is_that_of_the_whole_step():
    torch.manual_seed(0)
    names = run_block(recipe("Gradient accumulation and mixed precision"))
    model, criterion, scaler = (names[name] for name in ("model", "criterion", "scaler"))
    x, y = names["images"][names["kept"]], names["labels"][names["kept"]].clone()
    order = torch.randperm(len(y))[:90]
    x, y = x[order], y[order]
    y[:12] = -100
    sizes = (16, 16, 32, 26)

    model.zero_grad()
    names["accumulate"](list(zip(x.split(sizes), y.split(sizes), strict=True)))
    accumulated = gradient(model) / scaler.get_scale()
    mean = classfair.ClassBalancedLoss(names["counts"], beta=0.99)
    mean(model(x), y).backward()
    expected = gradient(model)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        (mean(model(a), b) / len(sizes)).backward()
    mean_of_means = gradient(model)
    assert distance(accumulated, expected) < 0.01  # what float16 leaves
    assert distance(mean_of_means, expected) > 0.1

    total = sum(criterion.total_weight(part) for part in y.split(sizes))
    assert total == pytest.approx(float(classfair.total_weight(y, weight=criterion.reweight)))
    with torch.autocast("cpu", torch.float16):
        logits = model(x)
        loss, stats = criterion.with_stats(logits, y)
    assert (logits.dtype, loss.dtype, stats.mass.dtype) == (torch.float16, torch.float32, torch.float32)


def test_a_step_of_ignored_labels():
    model = torch.nn.Linear(3, 2)
    criterion = classfair.CrossEntropyLoss(reduction="sum")
    y = torch.full((4,), -100)
    for clamp, expected in ((0.0, "nan"), (1e-12, "0.0")):
        loss = criterion(model(torch.randn(4, 3)), y) / criterion.total_weight(y).clamp_min(clamp)
        loss.backward()
        assert str(loss.item()) == expected
        assert not gradient(model).any()


def test_penalty_of_a_step_from_its_micro_batches():
    torch.manual_seed(0)
    names = run_block(recipe("Penalties on statistics, with accumulation"))
    model, penalty = names["model"], names["penalty"]
    order = torch.randperm(1200)[:150]
    parts = [[names[name][i] for name in ("images", "labels", "group")] for i in order.split((50, 30, 70))]
    x, y, g = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    mean = classfair.CrossEntropyLoss()

    def objective(x, y, g):
        loss, stats = mean.with_stats(model(x), y, group=g, num_groups=2)
        return loss, penalty(stats.mass)

    model.zero_grad()
    names["accumulate"](parts)
    accumulated = gradient(model)
    loss, whole = objective(x, y, g)
    (loss + whole).backward()
    expected = gradient(model)
    assert distance(accumulated, expected) < 1e-4
    for part in parts:  # the other objective
        loss, own = objective(*part)
        (loss * len(part[1]) / len(y) + own / len(parts)).backward()
    assert distance(gradient(model), expected) > 0.01


def test_penalties_of_micro_batches_are_larger_the_smaller_they_are():
    torch.manual_seed(0)
    names = run_block(recipe("Penalties on statistics, with accumulation"))
    order = torch.randperm(1200)
    averages = []
    with torch.no_grad():
        for size in (1200, 200, 50, 20):
            penalties = []
            for i in order.split(size):
                logits, g = names["model"](names["images"][i]), names["group"][i]
                stats = classfair.cross_entropy_with_stats(logits, names["labels"][i], group=g, num_groups=2)[1]
                penalties.append(float(names["penalty"](stats.mass)))
            averages.append(np.mean(penalties))
    assert all(b > 1.2 * a for a, b in pairwise(averages))


TORCHRUN = "Several processes: DDP"


def test_scripts_for_torchrun_are_those_tested_here():
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert [block for file in files for block in python_blocks(file) if for_torchrun(block)] == [recipe(TORCHRUN)]


# Threads of gloo that DDP keeps alive can abort an interpreter that is being torn down (pytorch issue 190489 and pull
# request 179291): not what is tested here, so the process leaves without it, once all work is done.
LEAVE = "\nimport os, sys\n\nsys.stdout.flush()\nos._exit(0)\n"


def torchrun(world, script, folder):
    (folder / "train_ddp.py").write_text(script + LEAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    process = subprocess.run(
        [*command, "train_ddp.py"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("worst_class_accuracy") == 1  # one process speaks
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The script's result in this process, and the labels that it evaluates."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "RANK": "0",
            "WORLD_SIZE": "1",
        }
        free.close()
        for name, value in address.items():
            patch.setenv(name, value)
        patch.chdir(tmp_path_factory.mktemp("alone"))
        try:
            names = run_block(recipe(TORCHRUN))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return torch.load("result.pt", weights_only=True), names["labels"][1200:]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_trains_the_same_model(world, alone, tmp_path):
    expected, evaluated = alone
    got = torchrun(world, recipe(TORCHRUN), tmp_path)
    torch.testing.assert_close(got["model"], expected["model"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["train_mass"], expected["train_mass"], rtol=1e-4, atol=1e-3)
    assert torch.equal(got["val_count"][0], torch.bincount(evaluated))  # every image exactly once


@pytest.mark.slow
def test_local_means_and_local_penalties_train_another_model(alone, tmp_path):
    script = changed(recipe(TORCHRUN), "        dist.all_reduce(total)\n        stats = stats.all_reduce()\n", "")
    script = changed(script, "loss * world / total", "loss / total")
    got, expected = torchrun(2, script, tmp_path)["model"], alone[0]["model"]
    assert max(distance(got[name], expected[name]) for name in expected) > 0.01


def test_what_compiles_again_and_what_does_not(here):
    torch._dynamo.reset()
    block = changed(recipe("torch.compile"), "fullgraph=True", "fullgraph=True, backend=counter")
    names = run_block(f"from torch._dynamo.testing import CompileCounter\n\ncounter = CompileCounter()\n{block}")
    counter, compiled, criterion = (names[name] for name in ("counter", "compiled", "criterion"))
    x, y = names["images"], names["labels"]
    assert counter.frame_count == 1  # four epochs of a warm-up
    for size, graphs in ((100, 1), (60, 2), (40, 2), (77, 2)):
        compiled(x[:size], y[:size])
        assert counter.frame_count == graphs
    with torch.no_grad():
        criterion.eval()
        compiled(x[:100], y[:100])
        compiled(x[:100], y[:100])
    criterion.train()
    assert counter.frame_count == 3
    schedule = classfair.DeferredReweighting(criterion, classfair.class_counts(y, 10), start=2)
    counts = []
    for _ in range(5):
        compiled(x[:100], y[:100])
        counts.append(counter.frame_count)
        schedule.step()
    assert counts == [3, 3, 4, 4, 4]


def test_a_python_number_compiles_again():
    torch._dynamo.reset()
    counter = CompileCounter()
    offset = torch.tensor([0.0, -1.0])

    @torch.compile(fullgraph=True, backend=counter)
    def loss(logits, target, strength):
        return classfair.cross_entropy(logits, target, offset=strength * offset)

    for epoch in range(2):
        loss(torch.randn(4, 2, requires_grad=True), torch.tensor([0, 1, 1, 0]), epoch / 10)
    assert counter.frame_count == 2


def test_mixed_labels_of_timm_are_its_dense_targets():
    data = pytest.importorskip("timm.data", reason="timm's Mixup needs timm")
    g = torch.Generator().manual_seed(0)
    x, y, logits = torch.rand(16, 1, 8, 8, generator=g), torch.arange(16) % 5, torch.randn(16, 5, generator=g)
    for mode in ("batch", "pair", "elem"):
        options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.0, "mode": mode}
        np.random.seed(0)  # noqa: NPY002  (timm draws from it)
        images, dense = data.Mixup(**options, num_classes=5)(x.clone(), y)
        np.random.seed(0)  # noqa: NPY002
        mixup = data.Mixup(**options, num_classes=16)
        collate = classfair.data.MixedTargetCollate(lambda x, rows, mixup=mixup: mixup(x, rows.argmax(1)))
        mixed_images, mixed = collate(list(zip(x.clone(), y, strict=True)))
        assert torch.equal(mixed_images, images)
        assert not torch.equal(images, x)
        torch.testing.assert_close(classfair.cross_entropy(logits, mixed), classfair.cross_entropy(logits, dense))


def test_counts_of_an_image_folder_as_timm_reads_it(tmp_path):
    data = pytest.importorskip("timm.data", reason="image folders of timm need timm")
    from PIL import Image

    for name, images in (("b", 2), ("a", 3)):
        (tmp_path / name).mkdir()
        for i in range(images):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    names = {"classfair": classfair, "dataset_train": data.create_dataset("", root=str(tmp_path))}
    (line,) = re.findall(r"^\+ *counts = (.*)$", RECIPES.read_text(), re.M)
    assert eval(line.replace("args.num_classes", "2"), names).tolist() == [3, 2]


@pytest.mark.filterwarnings("ignore")  # of Lightning: few workers, what torch will rename
def test_lightning_resumes_and_counts_every_image_once(here):
    pytest.importorskip("lightning", reason="the recipe needs Lightning")
    names = run_block(recipe("Lightning"))
    Classifier, Trainer, quiet = names["Classifier"], names["lightning"].Trainer, names["quiet"]
    options = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 0, **quiet}

    def fit(epochs, **keywords):
        torch.manual_seed(0)
        model, trainer = Classifier(), Trainer(max_epochs=epochs, **options)
        trainer.fit(model, **keywords)
        return model, trainer

    expected, trainer = fit(3)
    metrics = trainer.callback_metrics
    assert (metrics["train_samples"], metrics["val_samples"]) == (len(names["kept"]), len(names["val_set"]))
    first, trainer = fit(1)
    assert not torch.equal(first.criterion.offset, expected.criterion.offset)
    trainer.save_checkpoint("half.ckpt")
    resumed, _ = fit(3, ckpt_path="half.ckpt", weights_only=False)
    assert resumed.warmup.last_epoch == expected.warmup.last_epoch == 3
    for name, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.slow
def test_lightning_in_two_processes(tmp_path):
    pytest.importorskip("lightning", reason="the recipe needs Lightning")
    script = changed(recipe("Lightning"), "devices=1", 'devices=2, strategy="ddp"')
    script += 'seen = [int(trainer.callback_metrics[f"{stage}_samples"]) for stage in ("train", "val")]\n'
    script += 'torch.save(seen, f"seen{trainer.global_rank}.pt")\n'
    script += "trainer.strategy.barrier()\n" + LEAVE
    (tmp_path / "script.py").write_text(script)
    process = subprocess.run(
        [sys.executable, "script.py"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert [torch.load(tmp_path / f"seen{rank}.pt") for rank in range(2)] == [[372, 597]] * 2


def test_deferred_reweighting_has_begun():
    names = run_block(recipe("LDAM-DRW"))
    assert torch.equal(names["criterion"].reweight, classfair.effective_number_weights(names["counts"], 0.9999))
    assert float(names["criterion"].margin.max()) == pytest.approx(0.5 * 30)


def test_corrections_after_training_help():
    torch.manual_seed(0)
    names = run_block(recipe("After training"))
    part = names["test"]
    with torch.no_grad():
        plain = names["balanced_accuracy"](names["model"](names["images"][part]), part)
        for predict in (names["adjusted"], names["normalized"]):
            assert names["balanced_accuracy"](predict(part, 0.75), part) > plain + 0.01


ACCELERATE = "Hugging Face accelerate"


def test_accelerate_takes_the_gradient_of_the_whole_step():
    torch.manual_seed(0)
    names = run_block(recipe(ACCELERATE))
    model, criterion = names["model"], names["criterion"]
    batches = list(names["loader"])[-3:]  # the last one is smaller
    model.zero_grad()
    names["accumulate"](batches)
    accumulated = gradient(model)
    x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    (criterion(model(x), y) / criterion.total_weight(y)).backward()
    assert distance(accumulated, gradient(model)) < 1e-5


def steps_in_groups(sync_with_dataloader):
    """How often an optimizer of accelerate steps in 2 epochs of 8 micro-batches, 4 of which are fetched at a time."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    plugin = accelerate.utils.GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=sync_with_dataloader)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.randn(16, 3), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = 0
    for _ in range(2):
        batches = iter(loader)
        while group := list(islice(batches, 4)):
            for x in group:
                with accelerator.accumulate(model):
                    accelerator.backward(model(x).sum())
                    before = model.weight.detach().clone()
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += not torch.equal(before, model.weight)
    return steps


def test_batches_fetched_ahead_inside_accumulate():
    assert steps_in_groups(sync_with_dataloader=False) == 4
    assert steps_in_groups(sync_with_dataloader=True) == 10  # as docs/recipes.md warns: 4 for each last group


def test_a_probe_leaves_labels_and_precision_alone():
    pytest.importorskip("torchmetrics", reason="the recipe's metric is torchmetrics'")
    from sklearn.metrics import average_precision_score

    names = run_block(recipe("Multi-label heads, with a probe"))
    model = names["train"](0.1)
    precision, response = names["evaluate"](model)
    x, there = names["pairs"](torch.arange(1200, 1498), torch.arange(1498, 1796))
    with torch.no_grad():
        expected = average_precision_score(there.numpy(), model(x).sigmoid().numpy(), average="macro")
    assert float(precision) == pytest.approx(expected, abs=1e-5)
    assert there.sum(1).unique().tolist() == [1, 2]  # the same digit twice is one label
    plain_precision, plain_response = names["evaluate"](names["train"](0.0))
    assert response < 0.1 * plain_response
    assert abs(precision - plain_precision) < 0.05


def test_the_covariance_gradient_is_that_of_the_whole_virtual_step():
    names = run_block(recipe("MetaSAug"))
    images, labels, kept, meta = (names[name] for name in ("images", "labels", "kept", "meta"))
    assert not set(kept.tolist()) & set(meta.tolist())
    assert torch.bincount(labels[meta]).tolist() == [10] * 10
    assert names["statistics"].count.tolist() == (12 * names["counts"]).tolist()
    names["images"], net = images.double(), names["net"].double()
    names["class_weight"] = names["class_weight"].double()
    x, y, cov = names["images"][kept[:60]], labels[kept[:60]], names["statistics"].cov.double()
    got = names["covariance_gradient"](cov, x, y)
    direction = torch.randn(cov.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def meta_loss(cov):
        copy = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        loss, _ = names["augmented_loss"](copy, cov, x, y)
        for p, g in zip(copy.values(), torch.autograd.grad(loss, tuple(copy.values())), strict=True):
            p.data -= 0.1 * g
        logits = torch.func.functional_call(net, copy, (names["images"][meta],))[1]
        return float(torch.nn.functional.cross_entropy(logits, labels[meta]))

    step = 1e-4
    expected = (meta_loss(cov + step * direction) - meta_loss(cov - step * direction)) / (2 * step)
    assert float((got * direction).sum()) == pytest.approx(expected, rel=1e-5)
    assert float(got.abs().max()) > 1e-6
