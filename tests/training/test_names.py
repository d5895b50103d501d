"""Names of groups, classes and files are data, whatever they would tell a terminal, a spreadsheet or a reader."""

import csv
import io
import json
import os
import subprocess
import sys
import unicodedata

import pytest
import torch

from classfair._names import cell, markup, printable
from classfair.cli import main
from classfair.training import TrainConfig
from classfair.training.group_table import read_groups
from classfair.training.run_folder import RunFolder
from classfair.training.totals import Epoch, Totals

FORGED = "cat\x1b[2K\rclassfair train: done"
NASTY = ["[red]x[/]", "[/]", FORGED, "a\nb", "a\u2028b", "a\x85b", "a\x0bb", "\u202ecat", "a\udc80b", "=HYPERLINK(1)"]


@pytest.mark.parametrize("name", NASTY)
def test_one_line_on_every_way_out(name):
    for out in (printable(name), cell(name)):
        assert out.splitlines() == [out]
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in out)
        out.encode()


def test_names_of_every_script_stay_as_they_are():
    for name in ("café", "猫", "고양이", "кот", "a b", "-1", "+2.5", "a=b", "\N{CAT FACE}"):
        assert printable(name) == cell(name) == name


@pytest.mark.parametrize("name", ["=1+1", "+cmd|'/C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "=HYPERLINK(1)"])
def test_spreadsheets_compute_no_name(name):
    assert cell(name).startswith("'")


@pytest.mark.parametrize("name", NASTY)
def test_rich_shows_a_name_as_it_is(name):
    from rich.text import Text

    assert Text.from_markup(markup(name)).plain == printable(name)


@pytest.mark.parametrize("name", NASTY)
def test_statistics_of_groups_are_one_row_a_class_and_are_read_back(name, tmp_path, capsys):
    totals = Totals(2, groups=2)
    now = Epoch("ce", 0, 1, totals, totals, 0.1, [name, "other"])
    with RunFolder(tmp_path / "run") as folder:
        folder.log("ce-seed0", now)
        text = (folder.path / "statistics" / "ce-seed0-groups.csv").read_bytes().decode()
        assert len(text.splitlines()) == 5
        assert [row[1] for row in csv.reader(io.StringIO(text))][1:] == [cell(name)] * 2 + ["other"] * 2
        folder.begin("ce-seed0", 1, 2, [name, "other"], finished=False)
        assert (folder.path / "statistics" / "ce-seed0-groups.csv").read_bytes().decode() == text
    assert "lacks" not in capsys.readouterr().err


def test_errors_that_name_a_file_forge_no_line(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path / FORGED)]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert error.splitlines() == [error.rstrip("\n")]


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_terminals_of_other_encodings(encoding, tmp_path):
    """Neither the names nor our own tables may end a job after its training."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    job = ["train", "--epochs", "1", "--seeds", "2", "--loss", "ce", "--no-progress", "--output", str(tmp_path / "кот")]
    command = [sys.executable, "-m", "classfair"]
    process = subprocess.run([*command, *job], capture_output=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    assert rb"\udcd0\udcba\udcd0\udcbe\udcd1\udc82" in process.stdout  # the bytes of its name
    job = ["train", "--resume", str(tmp_path / "猫")]
    process = subprocess.run([*command, *job], capture_output=True, env=environment, check=False)
    assert process.returncode == 2
    assert rb"\udce7\udc8c\udcab" in process.stderr
    assert process.stderr.count(b"\n") == 1


# The table of groups


@pytest.fixture
def images(tmp_path):
    return [str(tmp_path / "data" / part / f"{i}.png") for part in ("train", "val") for i in range(2)]


def read(tmp_path, images, values, column="sex", header="file,sex", **options):
    rows = [f"{os.path.relpath(path, tmp_path / 'data')},{value}" for path, value in zip(images, values, strict=True)]
    (tmp_path / "g.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return read_groups(tmp_path / "g.csv", column, tmp_path / "data", images[:2], images[2:], **options)


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "N/A", "None", "none", "NULL", "<NA>", "#N/A"])
def test_words_for_missing_values_are_no_group(word, tmp_path, images):
    message = f"expected groups as sex in .*g.csv, got {word} in line 3, which stands for a missing value: --missing-"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, images, ["f", word, "m", "f"])
    groups = read(tmp_path, images, ["f", word, "m", "f"], missing_is_blank=True)
    assert groups.names == ["f", "m"]
    assert groups.train.tolist() == [0, -1]


def test_words_for_missing_values_of_other_images_do_not_matter(tmp_path, images):
    assert read(tmp_path, images, ["f", "m", "m", "f"], header="file,sex\ntrain/9.png,NA").names == ["f", "m"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "1.0", "2", "2"], "got 1 and 1.0, which are one"),
        (["-1", "-1.0", "1", "1"], "got -1 and -1.0, which are one"),
        (["01", "2", "1", "2"], "got 01 and 1, which are one"),
        (["0", "-0", "1", "1"], "got -0 and 0, which are one"),
        (["é", "e\u0301", "b", "b"], r"got .* and '.*', which are one"),
    ],
)
def test_one_group_of_two_spellings_is_named(values, message, tmp_path, images):
    with pytest.raises(ValueError, match=f"expected one spelling of every sex in .*g.csv, {message}"):
        read(tmp_path, images, values)


def test_unmatched_paths_show_the_column_and_both_spellings(tmp_path, images):
    (tmp_path / "g.csv").write_text("name,image,sex\nx,images/0.PNG,f\n")
    message = (
        r"got none of train/0.png, train/1.png, val/0.png, val/1.png \(read from its column image, which has paths such"
        r" as images/0.PNG\)"
    )
    with pytest.raises(ValueError, match=message):
        read_groups(tmp_path / "g.csv", "sex", tmp_path / "data", images[:2], images[2:])


def test_paths_that_only_look_alike_are_shown_as_they_are(tmp_path):
    """A file system that takes accents apart, and a table that does not."""
    images = [str(tmp_path / "data" / "cafe\u0301.png"), str(tmp_path / "data" / "b.png")]
    (tmp_path / "g.csv").write_text("file,sex\ncafé.png,f\nb.png,m\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"such as 'caf\\xe9.png'"):
        read_groups(tmp_path / "g.csv", "sex", tmp_path / "data", images[:1], images[1:])


def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path, images):
    os.mkfifo(tmp_path / "g.csv")
    with pytest.raises(ValueError, match="expected a regular file"):
        read_groups(tmp_path / "g.csv", "sex", tmp_path / "data", images[:2], images[2:])


def test_the_option_for_missing_groups_needs_groups():
    with pytest.raises(
        ValueError, match="expected missing_groups to be left out without groups, a CSV file, got blank"
    ):
        TrainConfig(missing_groups="blank")
    with pytest.raises(ValueError, match="expected missing_groups to be error or blank, got skip"):
        TrainConfig(missing_groups="skip")


def test_missing_groups_of_a_folder(tmp_path, capsys):
    pytest.importorskip("torchvision", reason="image folders need torchvision")
    pytest.importorskip("timm", reason="the small model is timm's")
    from PIL import Image

    rows = []
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (32, 32), (40 * i, 0, 200)).save(tmp_path / part / name / f"{i}.png")
                rows.append(f"{part}/{name}/{i}.png,{['=x', 'None'][i % 2]}")
    (tmp_path / "g.csv").write_text("\n".join(["file,kind", *rows]))
    job = ["train", "--data", f"imagefolder:{tmp_path}", "--model", "timm:test_resnet", "--img-size", "32", "-j", "0"]
    job += ["--epochs", "1", "--no-progress", "--groups", str(tmp_path / "g.csv"), "--group-column", "kind"]
    job += ["--output", str(tmp_path / "run")]
    assert main(job) == 2
    assert "got None in line 3, which stands for a missing value" in capsys.readouterr().err
    assert main([*job, "--missing-groups", "blank"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["group_names"] == ["=x"]
    assert "1,'=x,0," in (tmp_path / "run" / "statistics" / "ce-seed0-groups.csv").read_text()
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "ce-seed0.pt", weights_only=True)
    assert checkpoint["group_names"] == ["=x"]
