"""Images that lists and tables name: the same training as from folders, the same checks."""

import json
import re

import numpy as np
import pytest
import torch

from classfair.cli import main

pytest.importorskip("torchvision", reason="image files need torchvision")
pytest.importorskip("timm", reason="the small model is timm's")

from classfair.training import TrainConfig
from classfair.training.image_folder import load_images

TINY = ("--model", "timm:test_resnet", "--img-size", "32", "-j", "0", "-b", "8", "--epochs", "1", "--no-progress")
CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def root(tmp_path):
    """Six images of each of three classes, in folders of their names, so that both ways find the same."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, number in (("train", 6), ("val", 2)):
        for name in CLASSES:
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i} a.png")
    return tmp_path / "images"


def write_lists(root):
    lists = {}
    for part in ("train", "val"):
        paths = sorted((root / part).rglob("*.png"))
        lines = [f"{path.relative_to(root)} {CLASSES.index(path.parent.name)}" for path in paths]
        lists[part] = root.parent / f"{part}.txt"
        lists[part].write_text("\n".join(lines) + "\n\n")
    return lists


def write_table(root, extra=()):
    rows = ["image,animal,side,light"]
    for path in sorted(root.rglob("*.png")):
        part, name = path.relative_to(root).parts[:2]
        rows.append(f"{path.relative_to(root)},{name},{part},{'day' if path.name[0] in '024' else 'night'}")
    table = root.parent / "table.csv"
    table.write_text("\n".join([*rows, *extra]) + "\n")
    return table


def config(data, root, **options):
    return TrainConfig.for_data(data, image_root=str(root), img_size=32, model="timm:test_resnet", **options)


def from_folders(root):
    return load_images(TrainConfig.for_data(f"imagefolder:{root}", img_size=32), 0)


def same(one, other):
    for side in ("train", "val"):
        assert getattr(one, side).samples == getattr(other, side).samples
        images = [getattr(data, side)[1, [0, 3, 5]] for data in (one, other)]
        assert torch.equal(images[0][0], images[1][0])
        assert torch.equal(images[0][1], images[1][1])


def test_a_list_is_the_folder_that_it_lists(root):
    lists = write_lists(root)
    data = load_images(config(f"list:{lists['train']}", root, val_list=str(lists["val"])), 0)
    same(data, from_folders(root))
    assert data.class_names == ["0", "1", "2"]


def test_a_table_is_the_folder_that_it_lists(root):
    options = {"label_column": "animal", "split_column": "side", "group_column": "light"}
    table = write_table(root, ["elsewhere/1.png,yak,test,day"])
    with pytest.raises(ValueError, match="got none of yak"):
        load_images(config(f"csv:{table}", root, **options), 0)
    table = write_table(root, ["elsewhere/1.png,owl,test,day"])
    data = load_images(config(f"csv:{table}", root, **options), 0)
    same(data, from_folders(root))
    assert data.class_names == list(CLASSES)
    assert data.groups.names == ["day", "night"]
    assert data.groups.train.tolist() == [0, 1, 0, 1, 0, 1] * 3
    assert data.images.line == "1 of another side (elsewhere/1.png)"


def test_numbers_as_labels_are_classes_in_their_order(root):
    rows = ["file,label"] + [f"{p.relative_to(root)},{8 + i % 3}" for i, p in enumerate(sorted(root.rglob("*.png")))]
    table = root.parent / "numbers.csv"
    table.write_text("\n".join(rows))
    data = load_images(config(f"csv:{table}", root, label_column="label", split=0.25), 0)
    assert data.class_names == ["8", "9", "10"]
    assert torch.bincount(data.train_targets).tolist() == [6, 6, 6]
    assert data.num_val == 6


def test_jobs_on_both_and_their_resume(root, tmp_path):
    lists, table = write_lists(root), write_table(root)
    job = ["train", *TINY, "--image-root", str(root)]
    assert main([*job, "--data", f"list:{lists['train']}", "--split", "0.34", "--output", str(tmp_path / "a")]) == 0
    flags = ["--label-column", "animal", "--split-column", "side", "--group-column", "light", "--fairness", "dp-l2"]
    assert main([*job, "--data", f"csv:{table}", *flags, "--output", str(tmp_path / "b")]) == 0
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert metrics["group_names"] == ["day", "night"]
    assert metrics["class_names"] == list(CLASSES)
    moved = root.rename(tmp_path / "elsewhere")
    resume = ["train", "--no-progress", "--resume", str(tmp_path / "b")]
    assert main([*resume, "--image-root", str(moved)]) == 0
    assert main(resume) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "train/cat/none.png 0\n", "got no file train/cat/none.png"),
        (lambda text: text + "train/cat/1 a.png 0\n", "expected one line per image, got train/cat/1 a.png again in"),
        (lambda text: text + "../x.png 0\n", "expected paths of images below .*, got ../x.png"),
        (lambda text: text + "train/cat/x.png\n", "expected a path and a label from 0 on in .* line 20"),
        (lambda text: text + "train/cat/x.png -1\n", "expected a path and a label from 0 on"),
        (lambda text: text + "train/cat/x.png 1.0\n", "expected a path and a label from 0 on"),
        (lambda text: text.replace(" 1\n", " 3\n"), "expected training images of every class in .*, got none of 1"),
        (lambda text: text + f"x.png {10**15}\n", "got none of 3, but label 1000000000000000"),
        (lambda text: text.replace(" 2\n", " 1\n"), "expected classes of .*, got 2 as well"),
        (lambda text: "\n", "expected a line per image in"),
        (lambda text: text + "val/cat/0 a.png 0\n", "got val/cat/0 a.png on both sides"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(change, message, root):
    lists = write_lists(root)
    lists["train"].write_text(change(lists["train"].read_text()))
    with pytest.raises(ValueError, match=message):
        load_images(config(f"list:{lists['train']}", root, val_list=str(lists["val"])), 0)


def test_a_class_without_validation_images_is_named_or_excused(root):
    lists = write_lists(root)
    lists["val"].write_text("val/cat/0 a.png 0\n")
    options = {"val_list": str(lists["val"])}
    with pytest.raises(ValueError, match="expected validation images of every class, got none of 1, 2; --allow-miss"):
        load_images(config(f"list:{lists['train']}", root, **options), 0)
    assert load_images(config(f"list:{lists['train']}", root, allow_missing=True, **options), 0).num_val == 1


@pytest.mark.parametrize("name", ["missing.txt", "latin1.txt", "."])
def test_a_list_that_cannot_be_read_is_named(name, root):
    (root / "latin1.txt").write_bytes("é 0\n".encode("latin1"))
    with pytest.raises(
        ValueError, match=f"expected a (list of images in UTF-8|regular file), got .*{re.escape(name)}?"
    ):
        load_images(config(f"list:{root / name}", root, split=0.5), 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("train/x.png,,train,day", "expected a class as animal in .*, got a blank in line 26"),
        ("train/x.png,NaN,train,day", "expected a class as animal in .*, got NaN in line 26"),
        ("train/x.png,cat,train,day", "got no file train/x.png"),
        ("train/cat/0 a.png,cat,train,day", "expected one row per image, got train/cat/0 a.png again"),
        ("train/x.png,cat,train", "expected 4 columns in .*, line 26, got 3"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(row, message, root):
    table = write_table(root, [row])
    with pytest.raises(ValueError, match=message):
        load_images(config(f"csv:{table}", root, label_column="animal", split_column="side"), 0)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("list:a.txt", {"split": 0.1}, "expected image_root with --data list:FILE, got nothing"),
        ("list:a.txt", {"image_root": "b"}, "expected split above 0, or val_list, with --data list:FILE"),
        ("list:a.txt", {"image_root": "b", "split": 0.1, "val_list": "c"}, "expected split to be left out with val_l"),
        ("list:a.txt", {"image_root": "b", "split": 0.1, "label_column": "c"}, "expected label_column with --data csv"),
        ("csv:a.csv", {"image_root": "b", "split": 0.1}, "expected label_column with --data csv:FILE.csv, got nothing"),
        ("csv:a.csv", {"image_root": "b", "label_column": "c"}, "expected split above 0, or split_column"),
        ("csv:a.csv", {"image_root": "b", "label_column": "c", "split": 0.1, "groups": "d"}, "expected groups with"),
        ("imagefolder:a", {"image_root": "b"}, "expected image_root with --data list:FILE or csv:FILE.csv"),
        ("digits", {"image_root": "b"}, "expected image_root with --data list:FILE or csv:FILE.csv"),
    ],
)
def test_options_that_do_not_go_together(data, options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.for_data(data, **options)
