"""This machine and the packages on it. Nothing heavy is imported."""

import contextlib
import itertools
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil

from slmops.core.files import account
from slmops.core.values import Hardware

PACKAGES = (
    *("torch", "transformers", "olive-ai", "onnxruntime", "onnxruntime-genai", "onnx", "foundry-local-sdk"),
    *("prefect", "mlflow", "psutil", "peft", "accelerate", "datasets", "gguf", "tabulate"),
)
"""The packages that a job depends on most, by their names in pip."""

CPUINFO = Path("/proc/cpuinfo")
CONTROL_GROUP, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limit, use, and what of the use the kernel gives back when memory is short: version 2 of control groups, then 1.
_LIMITS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# Energy counters of the processor's packages; readable by root only on most systems.
POWERCAP = Path("/sys/class/powercap")

# What ONNX Runtime chooses its kernels by.
_X86 = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_X86_MATRIX = ("amx_tile", "amx_int8", "amx_bf16")
_ARM = ("neon", "dotprod", "i8mm", "bf16", "sve", "sve2")
# What Linux on ARM and macOS call them.
_ALIASES = {
    **{"asimd": "neon", "asimddp": "dotprod", "advsimd": "neon", "feat_dotprod": "dotprod", "feat_i8mm": "i8mm"},
    **{"feat_bf16": "bf16", "avx1_0": "avx", "avx2_0": "avx2", "avx512vnni": "avx512_vnni"},
}


def hardware() -> Hardware:
    """This machine. Cores are the logical ones that this process may use; memory is what it may use, in 10^9 bytes."""
    cores = psutil.cpu_count() or 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    facts = _linux_cpu() if sys.platform == "linux" else _macos_cpu() if sys.platform == "darwin" else {}
    features = {_ALIASES.get(name, name) for name in facts.get("features", "").lower().split()}
    return Hardware(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        processor=facts.get("name") or platform.processor() or platform.machine(),
        cores=cores,
        memory_gb=round(memory()[0] / 1e9, 1),
        isa=tuple(name for name in (*_X86, *_X86_MATRIX, *_ARM) if name in features),
    )


def physical_cores() -> int:
    """Physical cores that this process may use: threads that compute gain nothing from a second one on a core."""
    return min(psutil.cpu_count(logical=False) or 1, hardware().cores)


def memory() -> tuple[int, int]:
    """Memory that this process may use, and how much of it is available, in bytes.

    The limit of a container, or of a control group that this process is in, counts if it is lower than what the
    machine has, and so does that of a process (ulimit, prlimit), which its children have too.
    """
    system = psutil.virtual_memory()
    total, available = system.total, system.available
    own: set[Path] = {Path()}
    with contextlib.suppress(OSError):  # lines such as 4:memory:/jobs/one; the limits of /jobs count too
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            group = Path(line.split(":", 2)[2].lstrip("/"))
            own |= {group, *group.parents}
    for group, (kind, limit_file, used_file, cache) in itertools.product(own, _LIMITS):
        folder = CONTROL_GROUP / kind / group
        with contextlib.suppress(OSError, ValueError):  # "max": no limit; version 1 says so with a huge number
            limit = int((folder / limit_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / used_file).read_text()) - int(stat.get(cache, 0))
            total, available = min(total, limit), min(available, max(0, limit - used))
    if sys.platform != "win32":
        import resource

        for number in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            if (most := resource.getrlimit(number)[0]) != resource.RLIM_INFINITY:
                total, available = min(total, most), min(available, most)
    return total, available


def disk_free(folder: Path) -> int:
    """Bytes that are free where ``folder`` is, or will be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def person() -> str:
    """Who works here, as far as the system knows."""
    return f"{account()} on {platform.node()}"


def versions() -> dict[str, str]:
    """Installed versions of :data:`PACKAGES`; one that is missing is left out."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def energy_j() -> float | None:
    """Energy that the processor has used since some time ago, in joules; None if it does not say.

    From Linux's powercap interface (RAPL), which counts everything that runs on the machine. If a counter wraps round
    between two calls, their difference is negative.
    """
    # The list has packages, their parts (core, dram) and on some machines the platform (psys), which contains them.
    try:
        packages = [zone for zone in POWERCAP.glob("intel-rapl:*") if (zone / "name").read_text().startswith("package")]
        counters = [int((zone / "energy_uj").read_text()) for zone in packages]
    except (OSError, ValueError):
        return None
    return sum(counters) / 1e6 if counters else None


def _linux_cpu() -> dict[str, str]:
    """Name and features of the first core. ARM says "Features" and often gives no name."""
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
        return {"name": facts.get("model name", ""), "features": facts.get("flags", facts.get("Features", ""))}
    return {}


def _macos_cpu() -> dict[str, str]:
    """The same from sysctl, whose lines read ``hw.optional.arm.FEAT_DotProd: 1``."""
    facts: dict[str, str] = {"features": ""}
    command = ["/usr/sbin/sysctl", "machdep.cpu.brand_string", "hw.optional"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        for line in subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.splitlines():
            key, _, value = line.partition(": ")
            if key == "machdep.cpu.brand_string":
                facts["name"] = value.strip()
            elif value.strip() == "1":
                facts["features"] += f" {key.rpartition('.')[2]}"
    return facts
