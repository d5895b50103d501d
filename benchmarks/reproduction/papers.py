"""All parts of all papers, in the order of the table."""

from benchmarks.reproduction import classes_not_equal, group_fairness, metalad, offsets, theory, zero_uniformity
from benchmarks.reproduction.claims import Part

PARTS: dict[str, Part] = {
    part.name: part
    for paper in (theory, metalad, offsets, zero_uniformity, group_fairness, classes_not_equal)
    for part in paper.PARTS
}
