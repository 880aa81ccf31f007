"""Faults to put in the way of a run, and the count of what they cost."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path


class Tally:
    """Trials and losses by fault. A loss is a trial in which something that was saved is gone, or damage goes unnoticed,
    or a run that continues does not go as if nobody had disturbed it."""

    def __init__(self):
        self.trials, self.losses = Counter(), Counter()

    @contextlib.contextmanager
    def trial(self, fault: str) -> Iterator[None]:
        self.trials[fault] += 1
        try:
            yield
        except BaseException:
            self.losses[fault] += 1
            raise

    def write(self, path: Path) -> None:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "grain")}
        report = {
            "date": str(date.today()), "python": platform.python_version(), **versions, "cpus": os.cpu_count(),
            "faults": {fault: {"trials": n, "losses": self.losses[fault]} for fault, n in sorted(self.trials.items())},
            "trials": self.trials.total(), "losses": self.losses.total(),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = {"bit_flipped": flip_a_bit, "truncated": truncate, "emptied": empty, "deleted": Path.unlink}


def damages_of(directory: Path) -> Iterator[tuple[str, Path]]:
    """Every file of ``directory`` damaged in every way, one at a time; it is whole again before the next."""
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for name, damage in DAMAGES.items():
            if whole or name == "deleted":
                damage(file)
                yield name, file
                file.write_bytes(whole)


def same_files(directory: Path, expected: Path) -> bool:
    """Whether both hold files of the same names and bytes."""
    found, wanted = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (directory, expected))
    return found == wanted


def can_mount() -> bool:
    """Whether a small file system can be mounted in a namespace of one's own."""
    return shutil.which("unshare") is not None and os.system("unshare -rm true 2> /dev/null") == 0
