"""What stands in the text of a compiled program: the collectives of a step, and the kernels."""

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      devices: how many exchange with one another.
      bytes: of each of its results on a device.
      times: how often it runs: as often as the loops that it is in, once where they do not say how often.
    """

    kind: str
    devices: int
    bytes: tuple[int, ...]
    is_in_loop: bool
    times: int


def collectives(hlo: str) -> list[Collective]:
    """Those between several devices; a TPU's reduce-scatter is a fusion of an all-reduce and a slice, by its name."""
    bodies, found = {}, []
    for text in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", hlo):
        if name := re.match(r"(ENTRY )?%([\w.\-]+) \(", text):
            bodies["ENTRY" if name[1] else name[2]] = text

    def visit(name: str, is_in_loop: bool, times: int):
        for line in bodies[name].splitlines()[1:]:
            if match := re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)", line):
                result, kind, is_started, rest = match.groups()
                if name.startswith("all-reduce-scatter"):
                    kind, result = "reduce-scatter", re.search(r"ROOT .*? = (.*?) ", bodies[name])[1]
                sizes = [_bytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", result)]
                sizes = [max(sizes)] if is_started else sizes  # what is started gives its operands, too
                found.append(Collective(kind, _group_size(rest), tuple(sizes), is_in_loop, times))
            if loop := re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                # The number that its condition compares with.
                limits = re.findall(r"s32\[\][^ ]* constant\((\d+)\)", bodies[loop[1]])
                visit(loop[2], True, times * (int(limits[0]) if len(limits) == 1 else 1))
            else:
                for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)", line):
                    visit(called, is_in_loop, times)

    visit("ENTRY", False, 1)
    return [collective for collective in found if collective.devices > 1]


def kernels(hlo: str) -> dict[str, int]:
    """How often each kernel is in a program for TPUs, XLA's ragged-dot too; a loop's body counts once."""
    calls = [line for line in hlo.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = [re.search(r'op_name="[^"]*?(?:(ragged-dot)-(?!metadata)[\w-]+|(\w+)\)*/pallas_call)"', line) for line in calls]
    return dict(collections.Counter(name[1] or name[2] for name in names if name))


def _bytes(dtype: str, shape: str) -> int:
    size = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype.split("e")[0]) or 0) / 8
    return int(size * math.prod(int(n) for n in shape.split(",") if n))


def _group_size(text: str) -> int:
    """Of ``replica_groups=mesh['fsdp'=2,'tensor'=2] {'tensor'}``, or ``replica_groups={{0,1},{2,3}}``."""
    of_mesh = re.search(r"(?:replica_groups|source_target_pairs)=mesh\[(.*?)\] \{(.*?)\}", text)
    if of_mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", of_mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", of_mesh[2]))
    return len(re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}", text)[1].split(","))
