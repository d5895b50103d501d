"""Weights that people have: of scripts, wrappers, other image sizes and channels; and models with two faces."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="image folders need torchvision")
timm = pytest.importorskip("timm", reason="the small models are timm's")

import torchvision  # noqa: E402

from classfair import _names as names  # noqa: E402
from classfair.nn import CosineLinear, replace_head  # noqa: E402
from classfair.training import TrainConfig  # noqa: E402
from classfair.training.models import build_model  # noqa: E402
from classfair.training.weights import _safe_types, fit_weights, load_weights  # noqa: E402


@pytest.fixture(autouse=True)
def _say_again():
    names.say_once.cache_clear()


def resnet(num_classes=10, **options):
    return timm.create_model("test_resnet", num_classes=num_classes, **options)


def vit(num_classes=10, img_size=32, **options):
    return timm.create_model("test_vit", num_classes=num_classes, img_size=img_size, **options)


def torchvision_vit(image_size, num_classes=10):
    shape = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    return torchvision.models.VisionTransformer(image_size, num_classes=num_classes, **shape)


def assert_loaded(model, state, but=()):
    for name, value in model.state_dict().items():
        if not name.startswith(tuple(but)):
            assert torch.equal(value, state[name]), name


def torchvision_script(model):
    """What references/classification/train.py saves."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    args = argparse.Namespace(data_path="/data", model="resnet50", lr=0.1, amp=True, device="cuda", weights=None)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}
    return {**state, "epoch": 3, "args": args}


def timm_script(model):
    """What train.py of timm saves."""
    args = argparse.Namespace(data_dir=Path("/data"), model="resnet50", mean=(0.5, 0.5, 0.5), opt_kwargs={})
    state = {"epoch": 3, "arch": "resnet50", "state_dict": model.state_dict(), "version": 2, "args": args}
    return {**state, "metric": np.float64(71.5), "step": np.int64(7), "history": np.arange(3.0), "best": np.bool_(True)}


def lightning_script(model):
    """What a Trainer saves of a module with its network as ``model``, a metric and a loss with a buffer."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {"criterion.offset": torch.zeros(10), "accuracy.total": torch.tensor(3)}
    return {"epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.5", "state_dict": state, "loops": {}}


def prefixed(prefix):
    return lambda model: {f"{prefix}{name}": value for name, value in model.state_dict().items()}


def compiled_layer(model):
    return {name.replace("layer1.", "layer1._orig_mod.", 1): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "script",
    [
        torchvision_script,
        timm_script,
        lightning_script,
        compiled_layer,
        lambda model: {"model_state_dict": model.state_dict()},
        *map(
            prefixed, ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model.module.")
        ),
    ],
)
def test_checkpoints_of_scripts_and_wrappers(script, tmp_path, capsys):
    source, model = resnet(), resnet()
    torch.save(script(source), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, source.state_dict())
    assert capsys.readouterr().err == ""


def test_lightning_writes_such_checkpoints(tmp_path):
    lightning = pytest.importorskip("lightning", reason="it writes the checkpoint")

    class Module(lightning.LightningModule):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()
            self.model = resnet()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        max_steps=0,
        barebones=False,
        enable_progress_bar=False,
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    model = resnet()
    load_weights(model, tmp_path / "w.ckpt")
    assert_loaded(model, module.model.state_dict())


def test_numbers_of_numpy_1_and_2(tmp_path):
    """They are pickled under other names."""
    source = resnet()
    torch.save({"state_dict": source.state_dict(), "metric": np.float32(1)}, tmp_path / "2.pt")
    content = (tmp_path / "2.pt").read_bytes()
    new, old = b"numpy._core.multiarray\nscalar", b"numpy.core.multiarray\nscalar"
    assert (new in content) != (old in content)
    names = {name for kind in _safe_types() if isinstance(kind, tuple) for _, name in [kind]}
    assert {"numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"} <= names


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_file_that_would_run_code_is_refused_by_the_name_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": resnet().state_dict(), "args": Evil()}, tmp_path / "w.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"got .*w.pt, which needs (posix|os).system and is not safe to load as such"):
        load_weights(resnet(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not safe to load"):
        load_weights(resnet(), tmp_path / "old.pt")
    assert not (tmp_path / "evil").exists()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="expected a regular file"):
        load_weights(resnet(), tmp_path / "w.pt")


def test_the_head_alone_may_differ_and_it_is_said(capsys):
    source, model = resnet(7), resnet(10)
    new = model.fc.weight.clone()
    fit_weights(model, source.state_dict(), "w.pt")
    assert_loaded(model, source.state_dict(), but=["fc."])
    assert torch.equal(model.fc.weight, new)
    assert capsys.readouterr().err == "classfair train: weights w.pt: new, not from it: fc.weight, fc.bias\n"
    fit_weights(model, source.state_dict(), "w.pt")
    assert capsys.readouterr().err == ""  # once


def test_a_cosine_head_is_another_head(capsys):
    source, model = resnet(), resnet()
    replace_head(model, lambda head: CosineLinear(head.in_features, 10))
    fit_weights(model, source.state_dict(), "w.pt")
    assert_loaded(model, source.state_dict(), but=["fc."])
    assert "new, not from it: fc.weight" in capsys.readouterr().err


@pytest.mark.parametrize("layer", ["conv1.0.weight", "layer1.0.conv1.weight", "layer2.0.bn1.running_mean", "bn1.bias"])
@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_every_other_difference_is_an_error_that_names_the_tensor(layer, change):
    state = resnet().state_dict()
    if change == "shape":
        state[layer] = state[layer].repeat(2, *[1] * (state[layer].dim() - 1))
        message = f"which has {layer} of .* instead of"
    elif change == "missing":
        del state[layer]
        message = f"which lacks {layer}"
    else:
        state[f"{layer}_more"] = torch.zeros(1)
        message = f"which has {layer}_more besides"
    model = resnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"expected weights of the same architecture, got w.pt, {message}"):
        fit_weights(model, state, "w.pt")
    assert_loaded(model, before)


def test_positions_of_another_image_size_are_resampled_as_timm_does(capsys):
    from timm.layers import resample_abs_pos_embed

    source, model = vit(7, img_size=64), vit(10, img_size=32)
    fit_weights(model, source.state_dict(), "w.pt")
    side = model.patch_embed.grid_size
    expected = resample_abs_pos_embed(source.pos_embed, list(side), num_prefix_tokens=1)
    assert source.pos_embed.shape != model.pos_embed.shape
    torch.testing.assert_close(model.pos_embed, expected)
    assert_loaded(model, source.state_dict(), but=["pos_embed", "head."])
    assert "new, not from it: head.weight, head.bias; resized: pos_embed" in capsys.readouterr().err


def test_positions_of_torchvisions_model(capsys):
    source, model = torchvision_vit(32), torchvision_vit(64)
    nn.init.normal_(source.encoder.pos_embedding)
    fit_weights(model, source.state_dict(), "w.pt")
    assert model.encoder.pos_embedding.shape == (1, 65, 16)
    assert torch.equal(model.encoder.pos_embedding[:, 0], source.encoder.pos_embedding[:, 0])
    assert model.encoder.pos_embedding.std() > 0.3
    assert_loaded(model, source.state_dict(), but=["encoder.pos_embedding"])
    assert "resized: encoder.pos_embedding" in capsys.readouterr().err


@pytest.mark.parametrize("make", [resnet, vit])
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_stems_of_other_channels_are_repeated_as_timm_does(make, channels, capsys):
    from timm.models import adapt_input_conv

    source, model = make(in_chans=channels), make()
    fit_weights(model, source.state_dict(), "w.pt")
    name = "conv1.0.weight" if make is resnet else "patch_embed.proj.weight"
    weight, found = source.state_dict()[name], model.state_dict()[name]
    assert f"resized: {name}" in capsys.readouterr().err
    try:
        expected = adapt_input_conv(3, weight, base_chans=channels)
    except TypeError:  # an older timm adapts weights of three channels only
        expected = weight.repeat(1, -(-3 // channels), 1, 1)[:, :3] * channels / 3
    torch.testing.assert_close(found, expected)
    three = make().state_dict()[name]
    other = make(in_chans=channels)
    fit_weights(other, {**other.state_dict(), name: three}, "w.pt")
    if channels > 1:  # for one timm adds the channels up, which is not what repeating inverts
        torch.testing.assert_close(other.state_dict()[name], adapt_input_conv(channels, three))


def config(**changes):
    return TrainConfig.for_data("imagefolder:x", **{"img_size": 32, "model": "timm:test_resnet", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "googlenet", "img_size": 64},
            "got GoogLeNetOutputs instead of logits in training; try --model-kwargs",
        ),
        ({"model": "resnet18", "batch_size": 1}, "one image, too few for its batch norm: batch_size must be 2 or more"),
    ],
)
def test_what_a_model_does_in_training_only_is_known_before(changes, message):
    with pytest.raises(ValueError, match=f"expected a model for images of .* pixels, got .*{message[4:]}"):
        build_model(config(**changes), 10, 0)


def test_auxiliary_classifiers_may_be_left_out(tmp_path):
    source = torchvision.models.googlenet(num_classes=7, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    options = {"model": "googlenet", "img_size": 64, "weights": str(tmp_path / "w.pt")}
    model = build_model(config(**options, model_kwargs=("aux_logits=False", "init_weights=False")), 10, 0)
    assert torch.equal(model.conv1.conv.weight, source.conv1.conv.weight)


def test_one_image_a_pass_is_enough_without_batch_norm():
    build_model(config(model="timm:test_vit", model_kwargs=("img_size=32",), batch_size=1), 10, 0)


def test_looking_at_a_model_leaves_its_running_averages_alone():
    state = build_model(config(), 10, 0).state_dict()
    assert all((value == 0).all() for name, value in state.items() if name.endswith("running_mean"))
    assert all((value == 0).all() for name, value in state.items() if name.endswith("num_batches_tracked"))
