"""What the devices of a compiled program send each other."""

import math
import re
from typing import NamedTuple

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


class Collective(NamedTuple):
    """One collective of a program, or of the body of a loop; ``bytes`` of each of its results on a device."""

    kind: str
    devices: int
    bytes: tuple[int, ...]
    is_in_loop: bool


def collectives(program) -> list[Collective]:
    """Of a compiled program, those between several devices."""
    found = []
    parts = re.split(r"^ENTRY ", program.as_text(), flags=re.MULTILINE)
    for is_in_loop, part in zip((True, False), parts, strict=True):
        for result, kind, rest in re.findall(rf" = (.*?) ({KINDS})\((.*)", part):
            arrays = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", result)  # f32[2,3]
            sizes = [int(bits) // 8 * math.prod(map(int, filter(None, shape.split(",")))) for bits, shape in arrays]
            found.append(Collective(kind, _group_size(rest), tuple(sizes), is_in_loop))
    return [collective for collective in found if collective.devices > 1]


def _group_size(text: str) -> int:
    """Of ``replica_groups=mesh['fsdp'=2,'tensor'=2] {'tensor'}``, or ``replica_groups={{0,1},{2,3}}``."""
    of_mesh = re.search(r"(?:replica_groups|source_target_pairs)=mesh\[(.*?)\] \{(.*?)\}", text)
    if of_mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", of_mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", of_mesh[2]))
    return len(re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}", text)[1].split(","))
