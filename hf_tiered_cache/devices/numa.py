"""Which processors are near a device: memory they touch first is near it too.

A copy that crosses the sockets' own link is slower and takes its bandwidth from others. Linux tells
the node of a PCI device, and the processors of a node, in /sys.
"""

from pathlib import Path

SYSFS = Path("/sys")


def cpus_near(pci_address: str, sysfs: Path = SYSFS) -> frozenset[int]:
    """The processors of the memory node that a PCI device (such as "0000:3b:00.0") belongs to;
    empty where the system does not tell, or has one node only."""
    try:
        node = int((sysfs / "bus/pci/devices" / pci_address.lower() / "numa_node").read_text())
        nodes = list((sysfs / "devices/system/node").glob("node[0-9]*"))
        if node < 0 or len(nodes) < 2:
            return frozenset()
        return parse_cpu_list((sysfs / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


def parse_cpu_list(text: str) -> frozenset[int]:
    """The numbers of a list such as "0-3,8,10-11". Raises ValueError for anything else."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)
