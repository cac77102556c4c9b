"""What a Jetson's own tools print: its power mode (nvpmodel) and its statistics (tegrastats)."""

from __future__ import annotations

import re
from dataclasses import dataclass

MIB = 1 << 20
OFF_CELSIUS = -256.0  # what tegrastats prints for a sensor whose part is switched off
POWER_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")
# The parts of a module's supply, which do not overlap, by family; the first that a board has whole counts. AGX Orin's
# VDDQ_VDD2_1V8AO is a part of VIN_SYS_5V0. Thor's VIN is the carrier board as well.
TOTAL_RAILS = (
    ("module", ("VDD_IN",)),  # Orin Nano and NX, Xavier NX
    ("module", ("POM_5V_IN",)),  # Nano
    ("module", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),  # AGX Orin
    ("module", ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0")),  # Thor
    ("module", ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")),  # AGX Xavier
    ("board", ("VIN",)),
)


@dataclass(frozen=True)
class PowerMode:
    """`default` is what the board starts in, `fastest_id` the one without caps."""

    name: str
    id: int | None = None
    default: str | None = None
    fastest_id: int | None = None

    @property
    def is_fastest(self) -> bool:
        if self.fastest_id is None or self.id is None:
            return self.name.startswith("MAXN")
        return self.id == self.fastest_id


@dataclass(frozen=True)
class Tegrastats:
    """One line of tegrastats. Loads are 0 to 1; a core that is off has None. Power is that of the moment."""

    ram_used_bytes: int
    ram_total_bytes: int
    cpu_loads: tuple[float | None, ...]
    cpu_clocks_hz: tuple[int | None, ...]
    memory_load: float | None
    memory_clock_hz: int | None
    gpu_load: float | None
    gpu_clock_hz: int | None
    temperatures_c: dict[str, float]
    power_w: dict[str, float]


def parse_nvpmodel(query: str | None, conf: str | None, status: str | None = None) -> PowerMode | None:
    """The mode, from the output of `nvpmodel -q` or else /var/lib/nvpmodel/status; names from /etc/nvpmodel.conf.

    Modes are numbered anew for each board: 0 is MAXN on AGX Orin and 15 W on Orin Nano Super.
    """
    modes = {int(number): name for number, name in POWER_MODEL.findall(conf or "")}
    default = re.search(r"<\s*PM_CONFIG\s+DEFAULT=(\d+)", conf or "")
    asked = re.search(r"NV Power Mode:\s*(\S+)(?:\s*\n\s*(\d+))?", query or "")
    kept = re.search(r"pmode:\s*(\d+)", status or "")
    if asked:
        name, number = asked[1], int(asked[2]) if asked[2] else None
    elif kept:
        number = int(kept[1])
        name = modes.get(number, str(number))
    else:
        return None
    unlimited = [(name, number) for number, name in modes.items() if name.startswith("MAXN")]
    _, fastest = max(unlimited, default=("", None))  # MAXN_SUPER before MAXN
    return PowerMode(name, number, modes.get(int(default[1])) if default else None, fastest)


def parse_tegrastats(line: str) -> Tegrastats | None:
    """A line as JetPack 4 to 7 print it; None where it is none. Clocks and EMC are there for root alone."""
    ram = re.search(r"\bRAM (\d+)/(\d+)MB", line)
    if ram is None:
        return None
    cores = re.search(r"\bCPU \[([^]]*)\]", line)
    cpus = [_load_and_clock(core) for core in cores[1].split(",")] if cores else []
    memory, gpu = (re.search(rf"\b{name} (\S+)", line) for name in ("EMC_FREQ", "GR3D_FREQ"))
    memory_load, memory_clock = _load_and_clock(memory[1] if memory else "")
    gpu_load, gpu_clock = _load_and_clock(gpu[1] if gpu else "")
    temperatures = {name: float(value) for name, value in re.findall(r"(\w+)@(-?[\d.]+)C\b", line)}
    rails = re.findall(r"\b([A-Z]\w*) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?=[\s/]|$)", line)
    return Tegrastats(
        int(ram[1]) * MIB,
        int(ram[2]) * MIB,
        tuple(load for load, _ in cpus),
        tuple(clock for _, clock in cpus),
        memory_load,
        memory_clock,
        gpu_load,
        gpu_clock,
        {name: value for name, value in temperatures.items() if value > OFF_CELSIUS},
        {name: int(milliwatts) / 1000 for name, milliwatts in rails if name != "NC"},  # not connected
    )


def total_rails(names: set[str]) -> tuple[str, tuple[str, ...]] | None:
    """What the rails of a board cover, "module" or "board", and which to add; None where they make no total."""
    return next(((scope, rails) for scope, rails in TOTAL_RAILS if names.issuperset(rails)), None)


def _load_and_clock(text: str) -> tuple[float | None, int | None]:
    """Of "12%@1344", "0%@[305,305]", "@[314,314,314]", "99%" or "off"; of several clocks the fastest."""
    load = re.match(r"(\d+)%", text)
    clocks = [int(megahertz) for megahertz in re.findall(r"\d+", text.partition("@")[2])]
    fastest = max(clocks, default=0)
    return int(load[1]) / 100 if load else None, fastest * 1_000_000 or None  # 0 is a part that sleeps
