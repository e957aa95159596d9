"""Where a run ran: machine, packages, code version. Torch-free; facts about a GPU are handed in by the caller.

Environment variables are recorded by an allow-list only, and credentials inside URLs are cut out.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import lora_lab

_PACKAGES = (
    "lora-lab",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "lm_eval",
    "hydra-core",
    "reasoning-gym",
    "numpy",
)
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]*@")
_GIT_SECONDS = 10


def environment(gpu: Mapping[str, Any] | None) -> dict[str, Any]:
    """Facts about this process's surroundings, as JSON values.

    `gpu` is what the caller knows about accelerators (`{"names": [...], ...}`), None where there is none.
    """
    cpu, cores, memory_bytes = cpu_model(), psutil.cpu_count(logical=True), psutil.virtual_memory().total
    gpu_names = [] if gpu is None else [str(name) for name in gpu["names"]]
    return {
        "machine_id": machine_id(cpu=cpu, cores=cores, memory_bytes=memory_bytes, gpu_names=gpu_names),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "python_implementation": platform.python_implementation(),
        "cpu": cpu,
        "cores": cores,
        "usable_cores": _usable_cores(),
        "memory_bytes": memory_bytes,
        "gpu": None if gpu is None else dict(gpu),
        "packages": {package: _version(package) for package in _PACKAGES},
        "code": code_version(),
        "variables": {name: without_user_info(os.environ[name]) for name in _VARIABLES if name in os.environ},
    }


def machine_id(*, cpu: str, cores: int | None, memory_bytes: int, gpu_names: Sequence[str]) -> str:
    """Twelve hexadecimal digits that are equal for machines whose times may be compared."""
    content = json.dumps([cpu, cores, memory_bytes, list(gpu_names)])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count(logical=True)


def _version(package: str) -> str | None:
    """The installed version, or None where the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def code_version() -> dict[str, Any]:
    """Commit and dirty flag of the lab's own checkout when the process first asked; else null and the reason."""
    checkout = Path(lora_lab.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return {"commit": None, "dirty": None, "reason": "lora_lab does not run from a git checkout"}
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        dirty = _git(checkout, "status", "--porcelain") != ""
    except (OSError, subprocess.SubprocessError) as error:
        return {"commit": None, "dirty": None, "reason": f"git did not answer: {_git_reason(error)}"}
    return {"commit": commit, "dirty": dirty, "reason": None}


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments],
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_GIT_SECONDS,
        check=True,
    )
    return done.stdout.strip()


def _git_reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr).strip().splitlines()
        return lines[0] if lines else f"exit code {error.returncode}"
    return str(error)


def load_average() -> float | None:
    """Runnable processes on average over the last minute, to be kept beside every time; None where unknown."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def utc_now() -> str:
    """The present as ISO 8601 in UTC with milliseconds. For people; nothing is ordered or decided by it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def without_user_info(text: str) -> str:
    """`text` with the `user:password@` of every URL in it cut out."""
    return _USER_INFO.sub("", text)
