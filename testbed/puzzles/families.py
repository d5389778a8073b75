"""The trio families by name."""

from testbed.puzzles import colours, counting
from testbed.puzzles.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (counting.FAMILY, colours.FAMILY, colours.HASTY)
}
