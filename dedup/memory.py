"""How much memory the searches may take: what the user says, or a share of what this process may have at all."""

import os
import re
from pathlib import Path

SHARE = 4  # the tables, the workers' decoders and the system have the rest
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
CONTROL = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory/memory.limit_in_bytes", "memory.limit_in_bytes")  # of cgroups, version 2 and 1


def parse_size(text: str) -> int:
    """`4GB`, `500M`, `4000000000` → bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    size = round(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise ValueError(f"{text!r} is no amount of memory: say, for example, 4GB")
    return size


def default_budget() -> int:
    """A share of the memory of the machine, or of the control group that this process is in, if that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = Path("/proc/self/cgroup")
    own = [line.rpartition(":")[2].strip("/") for line in groups.read_text().split()] if groups.exists() else []
    for folder in {CONTROL, *(CONTROL / name for name in own)}:
        for path in (folder / name for name in LIMITS):
            if path.exists() and (limit := path.read_text().strip()).isdigit():
                limits.append(int(limit))
    return min(limits) // SHARE
