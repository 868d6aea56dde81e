"""Which memory of a process the kernel was asked to have in huge pages."""

import re
from pathlib import Path

import pytest

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

only_on_demand = pytest.mark.skipif(
    not ENABLED.exists() or "[madvise]" not in ENABLED.read_text(),
    reason="this machine's kernel has huge pages for everybody, or for nobody",
)


def asked_for(pid: int | str) -> list[tuple[range, str]]:
    """Return the addresses of each such mapping, and its name, if it has one."""
    found = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if first := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)", line):
            addresses = range(int(first[1], 16), int(first[2], 16))
            name = first[3]
        elif line.startswith("VmFlags:") and "hg" in line.split():
            found.append((addresses, name))
    return found
