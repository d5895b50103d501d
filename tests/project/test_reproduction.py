"""``make reproduce``: its verdicts, its table, what it leaves on disk, and the page in docs."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.reproduction import __main__ as command
from benchmarks.reproduction import claims, papers, table
from benchmarks.reproduction.claims import HIGHER, KEPT, LOWER, NOT_RAISED, ZERO, Claim, Part, untried, verdict
from benchmarks.reproduction.study import by_claim, measure_all, measure_seed

PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"
CHEAP = papers.PARTS["classes-gaussians"]
ABOUT = {"machine": "a machine", "torch": "2", "date": "today", "commit": "abc", "minutes": 1.0}
RISES, FALLS, NEITHER = [0.1, 0.2, 0.3], [-0.1, -0.2, -0.3], [-0.1, 0.0, 0.2]


@pytest.mark.parametrize(
    ("expected", "values", "answer"),
    [
        (HIGHER, RISES, "yes"),
        (HIGHER, FALLS, "no: the other way"),
        (HIGHER, NEITHER, "no: within the error"),
        (LOWER, FALLS, "yes"),
        (LOWER, RISES, "no: the other way"),
        (LOWER, NEITHER, "no: within the error"),
        (KEPT, [0.0, -0.01, 0.01], "yes"),
        (KEPT, RISES, "yes"),
        (KEPT, FALLS, "no: the other way"),
        (KEPT, NEITHER, "no: within the error"),
        (NOT_RAISED, FALLS, "yes"),
        (NOT_RAISED, RISES, "no: the other way"),
        (ZERO, [0.0, 0.01, -0.01], "yes"),
        (ZERO, RISES, "no: further from 0 than 0.05"),
        (HIGHER, [0.1, math.nan, 0.2], "no: 1 of 3 seeds gave no finite value"),
        (HIGHER, [0.1], "not tried here: fewer than two seeds"),
    ],
)
def test_verdicts(expected, values, answer):
    assert verdict(Claim("x", "eq. 1", "text", lambda runs: 0.0, expected, margin=0.05), values) == answer


def test_every_claim_has_a_name_of_its_own():
    names = [claim.name for part in papers.PARTS.values() for claim in (*part.claims, *part.untried)]
    assert len(names) == len(set(names))
    for part in papers.PARTS.values():
        assert all(claim.measure is not None for claim in part.claims)
        assert not any("|" in claim.text + claim.where + claim.reason for claim in (*part.claims, *part.untried))
        assert all(claim.measure is None and claim.reason for claim in part.untried)
        assert not part.claims or part.seeds >= claims.MIN_SEEDS


def rows_of(page):
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [row for line in lines if (row := line[2:-2].split(" | "))[0] not in ("claim", "---")]


def test_two_seeds_of_cheap_claims_fill_the_table():
    lines = [measure_seed(CHEAP.name, seed, None) for seed in range(2)]
    other = Part("other", "A paper", "", 0, [], untried=[untried("never", "table 1", "A claim", "no data")])
    page = table.page([CHEAP, other], by_claim(lines), ABOUT)
    rows = rows_of(page)
    assert [row[0] for row in rows] == [*(claim.text for claim in CHEAP.claims), "A claim"]
    values = [line["values"]["bias-hard"] for line in lines]
    assert values[0] != values[1]
    assert rows[0][2] == f"{sum(values) / 2:+.3f} ± {abs(values[0] - values[1]) / 2:.3f} (2)"
    assert rows[0][3] == "yes"
    assert rows[-1][1:] == ["table 1", "", "not tried here: no data"]
    assert "1 were not tried" in page
    assert all(line["values"] == measure_seed(CHEAP.name, line["seed"], None)["values"] for line in lines)


def test_a_seed_that_diverges_is_shown():
    part = Part("part", "A paper", "data", 3, [Claim("x", "eq. 1", "A claim", lambda runs: 0.0)])
    lines = [{"part": "part", "seed": seed, "values": {"x": value}} for seed, value in enumerate((0.1, None, 0.3))]
    (row,) = rows_of(table.page([part], by_claim(lines), ABOUT))
    assert row[2:] == ["+0.200 ± 0.100 (2 of 3)", "no: 1 of 3 seeds gave no finite value"]
    (row,) = rows_of(table.page([part], by_claim(lines[1:2]), ABOUT))
    assert row[2] == "nothing finite (1)"


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(tmp_path):
    said, cache, head = [], tmp_path / "cache.jsonl", {"commit": "abc"}
    options = {"seeds": 2, "workers": 1, "say": said.append}
    whole = measure_all([CHEAP], cache, head, None, **options)
    assert len(said) == 2
    assert [json.loads(line) for line in cache.read_text().splitlines()] == [head, *whole]
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:2]) + lines[2][:30])  # stopped while it wrote
    again = measure_all([CHEAP], cache, head, None, **options)
    assert len(said) == 3
    assert by_claim(again) == by_claim(whole)
    assert len(measure_all([CHEAP], cache, {"commit": "other"}, None, **options)) == 2
    assert len(said) == 5


def test_one_part_is_measured_again_into_a_result(tmp_path, monkeypatch):
    """The other parts keep their values, and the page names both commits."""
    claim, names = CHEAP.claims[0].name, {"cheap": CHEAP.name, "other": "zut-digits"}
    about = {"commit": "abc", "date": "today", "machine": {"name": "a machine", "cores": 2}, "versions": {"torch": "2"}}
    lines = [
        {"part": names["cheap"], "seed": 0, "seconds": 60.0, "values": {claim: 0.1}},
        {"part": names["other"], "seed": 0, "seconds": 60.0, "values": {"rises": 0.2}},
    ]
    result = tmp_path / "result.json"
    result.write_text(json.dumps({**about, "lines": lines}))
    again = [
        {"part": CHEAP.name, "seed": seed, "seconds": 30.0, "values": {claim: -0.3}, "commit": "def"} for seed in (0, 1)
    ]
    monkeypatch.setattr(command, "measured", lambda parts, commit, arguments: list(again))
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr("sys.argv", ["reproduce", "--only", CHEAP.name, "--into", str(result)])
    command.main()
    kept = json.loads(result.read_text())
    assert {name: kept[name] for name in about} == about
    assert kept["lines"] == [*again, lines[1]]
    page = (tmp_path / "page.md").read_text()
    assert f"commit abc (later {CHEAP.name} at def)" in page
    assert "took 2 minutes" in page
    assert "-0.300 ± 0.000 (2)" in page
    assert "+0.100" not in page


def test_an_unknown_part_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["reproduce", "--only", "nothing"])
    with pytest.raises(SystemExit, match="expected parts among"):
        command.main()


def test_parts_that_need_mnist_say_so_without_it(tmp_path):
    part = papers.PARTS["zut-mnist"]
    assert measure_all([part], tmp_path / "cache.jsonl", {}, None) == []
    rows = rows_of(table.page([part], {}, ABOUT))
    assert {row[3] for row in rows} == {"not tried here: no data"}


def test_the_page_has_every_claim():
    rows = [tuple(row[:2]) for row in rows_of(PAGE.read_text())]
    expected = [(c.text, c.where) for part in papers.PARTS.values() for c in (*part.claims, *part.untried)]
    assert rows == expected, "run `make reproduce`"
