"""What stands in the text of a compiled program: the collectives of a step, and the kernels."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      devices: how many exchange with one another.
      bytes: of each of its results on a device.
      times: how often it runs: as often as the loops that it is in.
    """

    kind: str
    devices: int
    bytes: tuple[int, ...]
    is_in_loop: bool
    times: int


class _Program:
    """The computations of a program: their lines by name."""

    def __init__(self, hlo: str):
        self.computations = {}
        for text in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", hlo):
            if name := re.match(r"(ENTRY )?%([\w.\-]+) \(", text):
                self.computations["ENTRY" if name[1] else name[2]] = text.splitlines()

    def walk(self, name: str = "ENTRY", is_in_loop: bool = False, times: int = 1) -> Iterator[tuple[str, str, bool, int]]:
        """(line, computation, whether in a loop, how often it runs) of all that runs, called computations included."""
        for line in self.computations[name][1:]:
            yield line, name, is_in_loop, times
            if loop := re.search(r" = \((.*)\) while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                yield from self.walk(loop[3], True, times * self._trips(loop[1], loop[2]))
            else:
                for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)", line):
                    yield from self.walk(called, is_in_loop, times)

    def _trips(self, carried: str, condition: str) -> int:
        """The number that a loop's condition compares with; if none, the length of the largest array that it carries."""
        limits = re.findall(r"s32\[\][^ ]* constant\((\d+)\)", "\n".join(self.computations[condition]))
        shapes = [_sizes(shape) for shape in re.findall(r"\[([\d,]+)\]", carried)]
        return int(limits[0]) if len(limits) == 1 else max(shapes, key=math.prod, default=[1])[0]


def collectives(hlo: str) -> list[Collective]:
    """Those between several devices; a TPU's reduce-scatter is a fusion of an all-reduce and a slice, by its name."""
    program, found = _Program(hlo), []
    for line, name, is_in_loop, times in program.walk():
        if match := re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)", line):
            result, kind, is_started, rest = match.groups()
            if name.startswith("all-reduce-scatter"):
                kind, root = "reduce-scatter", "\n".join(program.computations[name])
                result = re.search(r"ROOT .*? = (.*?) ", root)[1]
            sizes = [_bytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", result)]
            sizes = [max(sizes)] if is_started else sizes  # what is started gives its operands, too
            found.append(Collective(kind, _group_size(rest), tuple(sizes), is_in_loop, times))
    return [collective for collective in found if collective.devices > 1]


def matmul_flops(hlo: str) -> int:
    """Floating-point operations of all matrix products of a program, those in loops as often as the loops run.

    XLA's own count takes a loop's body once. A loop that ends when the work does counts as if it never ended early.
    """
    program, total = _Program(hlo), 0
    for line, name, _, times in program.walk():
        if dot := re.search(r" = \w+\[([\d,]*)\]\S* dot\((%[\w.\-]+).*lhs_contracting_dims=\{([\d,]*)\}", line):
            definition = next(other for other in program.computations[name] if re.match(rf" *(ROOT )?{dot[2]} = ", other))
            operand = _sizes(re.search(r" = \w+\[([\d,]*)\]", definition)[1])
            total += 2 * times * math.prod(_sizes(dot[1])) * math.prod(operand[axis] for axis in _sizes(dot[3]))
    return total


def kernels(hlo: str) -> dict[str, int]:
    """How often each kernel is in a program for TPUs, XLA's ragged-dot too; a loop's body counts once."""
    calls = [line for line in hlo.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = [re.search(r'op_name="[^"]*?(?:(ragged-dot)-(?!metadata)[\w-]+|(\w+)\)*/pallas_call)"', line) for line in calls]
    return dict(collections.Counter(name[1] or name[2] for name in names if name))


def _bytes(dtype: str, shape: str) -> int:
    size = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype.split("e")[0]) or 0) / 8
    return int(size * math.prod(_sizes(shape)))


def _sizes(shape: str) -> list[int]:
    return [int(n) for n in shape.split(",") if n]


def _group_size(text: str) -> int:
    """Of ``replica_groups=mesh['fsdp'=2,'tensor'=2] {'tensor'}``, or ``replica_groups={{0,1},{2,3}}``."""
    of_mesh = re.search(r"(?:replica_groups|source_target_pairs)=mesh\[(.*?)\] \{(.*?)\}", text)
    if of_mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", of_mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", of_mesh[2]))
    return len(re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}", text)[1].split(","))
