"""Which files of a folder are images: links, hidden entries, pipes, and what is said of the rest."""

import os
import subprocess

import pytest
from PIL import Image

from classfair.training.scan import EXTENSIONS, Scan, left_out_line


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    for name in ("a/1.png", "a/deep/2.png", "b/3.png"):
        image(tmp_path / "train" / name)
    return tmp_path / "train"


def found(root, *others):
    scan = Scan((root, *others))
    samples = scan.samples(root, scan.classes(root))
    return [(os.path.relpath(path, root), label) for path, label in samples], scan.left_out


HAS = [("a/1.png", 0), ("a/deep/2.png", 0), ("b/3.png", 1)]


def test_images_are_sorted_by_folder_and_name(root):
    image(root / "a" / "0" / "9.png")
    assert found(root) == ([("a/1.png", 0), ("a/0/9.png", 0), ("a/deep/2.png", 0), ("b/3.png", 1)], {})


@pytest.mark.parametrize("hidden", [".hidden/1.png", "a/.ipynb_checkpoints/1.png", "a/deep/.x/y/1.png", "a/._1.png"])
def test_dot_entries_at_any_depth_are_no_images(hidden, root):
    image(root / hidden)
    samples, left_out = found(root)
    assert samples == HAS
    (entry,) = left_out["hidden"]
    assert str(root / hidden).startswith(entry)


def test_links_to_itself_to_parents_and_to_other_classes_are_not_followed(root):
    (root / "a" / "itself").symlink_to(root / "a")
    (root / "a" / "parent").symlink_to(root)
    (root / "a" / "above").symlink_to(root.parent)
    (root / "a" / "other").symlink_to(root / "b", target_is_directory=True)
    (root / "c").symlink_to(root / "b", target_is_directory=True)
    (root / "a" / "circle").symlink_to("circle")
    samples, left_out = found(root)
    assert samples == HAS
    assert {reason: len(paths) for reason, paths in left_out.items()} == {
        "folders visited once already": 5,
        "not regular files": 1,
    }


def test_a_folder_outside_is_visited_once_whoever_links_to_it(root):
    outside = image(root.parent / "store" / "4.png").parent
    for name in ("a", "b"):
        (root / name / "linked").symlink_to(outside)
    samples, left_out = found(root)
    assert samples == [*HAS[:1], *HAS[1:2], ("a/linked/4.png", 0), HAS[2]]
    assert left_out == {"folders visited once already": [str(root / "b" / "linked")]}


def test_a_class_that_is_a_link_into_a_hidden_store_is_a_class(root):
    image(root / ".store" / "c" / "5.png")
    (root / "c").symlink_to(root / ".store" / "c")
    assert found(root)[0] == [*HAS, ("c/5.png", 2)]


def test_links_do_not_bring_training_images_into_validation(root):
    val = root.parent / "val"
    val.mkdir()
    (val / "a").symlink_to(root / "a")
    image(val / "b" / "6.png")
    outside = image(root.parent / "store" / "4.png").parent
    for folder in (root, val):
        (folder / "b" / "linked").symlink_to(outside)
    scan = Scan((root, val))
    assert len(scan.samples(root, ["a", "b"])) == 4
    assert scan.samples(val, ["a", "b"]) == [(str(val / "b" / "6.png"), 1)]


def test_pipes_unknown_extensions_and_stray_files_are_counted_and_named(root):
    os.mkfifo(root / "a" / "pipe.png")  # whoever opens it waits for ever
    (root / "a" / "broken.png").symlink_to("nowhere.png")
    for name in ("a/notes.txt", "a/picture.gif", "a/1.png.bak", "b/1.heic", "README"):
        (root / name).write_text("text")
    image(root / "b" / "UPPER.PNG")
    samples, left_out = found(root)
    assert samples == [*HAS, ("b/UPPER.PNG", 1)]
    line = left_out_line(left_out, root)
    assert "2 not regular files (a/broken.png, a/pipe.png)" in line
    assert "4 of unknown extensions (a/1.png.bak, a/notes.txt, a/picture.gif, ...)" in line
    assert "1 outside of class folders (README)" in line


def test_a_folder_that_may_not_be_read_is_named(root, monkeypatch):
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    samples, left_out = found(root)
    assert samples == [HAS[0], HAS[2]]
    assert left_out == {"unreadable folders": [str(root / "a" / "deep")]}


@pytest.fixture
def deep(root, monkeypatch):
    """An image below a thousand folders, which Python itself cannot remove."""
    top = root / "b" / "d"
    monkeypatch.chdir(root / "b")
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    Image.new("RGB", (4, 4)).save("7.png")
    yield
    os.chdir(root)
    subprocess.run(["rm", "-rf", top], check=True)


@pytest.mark.usefixtures("deep")
def test_an_image_below_a_thousand_folders(root):
    assert len(found(root)[0]) == 4


def test_extensions_are_those_of_torchvision():
    folder = pytest.importorskip("torchvision.datasets.folder", reason="torchvision is the standard")
    assert set(EXTENSIONS) == set(folder.IMG_EXTENSIONS)
