"""What the doctor looks at in its own process: Python, the hub, W&B, disks, the root. Nothing here imports torch.

Each check is given a time, since a name server, a proxy or a network disk may never answer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import platform
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import lora_lab
from lora_lab.errors import LabError
from lora_lab.record.environment import without_user_info
from lora_lab.record.ledger import Ledger
from lora_lab.record.wandb_tracker import destination_of
from lora_lab.report.checks import Check
from lora_lab.report.text import bytes_text, seconds_text
from lora_lab.schema.tracking import Tracking, WandbTracking

T = TypeVar("T")

HUB_SECONDS = 2.5
_OTHER_SECONDS = 20.0
_HUB = "https://huggingface.co"
_WANDB = "https://api.wandb.ai"
_TRUE = ("1", "ON", "YES", "TRUE")  # what the hub client takes for yes
_OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
# The study first_look left 0.54 GB in the cache (the converted model) and 0.08 GB of runs (adapters, scores, logs).
SMALL_STUDY_BYTES = 1_000_000_000


def python_check() -> Check:
    """The interpreter and the lab."""
    fact = f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    return Check("python", "ok", f"{fact}; lora-lab {lora_lab.__version__}")


def hub_check(environment: Mapping[str, str], *, seconds: float = HUB_SECONDS) -> Check:
    """Whether the hub answers within `seconds`; where it is switched off it is not asked."""
    prevents = "models and data sets of the hub that are not in the cache cannot be loaded"
    switches = [name for name in _OFFLINE_SWITCHES if environment.get(name, "").upper() in _TRUE]
    if switches:
        fact = f"switched off by {', '.join(f'{name}={environment[name]}' for name in switches)}"
        return Check("hub", "warning", fact, prevents, "unset it to fetch them; nothing else needs the hub")
    address = without_user_info(environment.get("HF_ENDPOINT") or _HUB)
    begin = time.perf_counter()
    try:
        within(seconds, lambda: _head(address, seconds))
    except Exception as error:  # noqa: BLE001 - refusals, time-outs, certificates, proxies, addresses that are none
        fact = f"{address} does not answer ({_reason(error, seconds)})"
        advice = "where there is no network, HF_HUB_OFFLINE=1 spares runs the waiting for it"
        return Check("hub", "warning", fact, prevents, advice)
    return Check("hub", "ok", f"{address} answers in {seconds_text(time.perf_counter() - begin)}")


def wandb_check(tracking: Tracking, environment: Mapping[str, str]) -> Check:
    """What would be copied to W&B, and whether package and login for it are there. A key is never read out."""
    variable = f", WANDB_MODE={environment['WANDB_MODE']}" if environment.get("WANDB_MODE") else ""
    destination = destination_of(tracking, environment)
    if destination is None or not isinstance(tracking, WandbTracking):
        return Check("wandb", "ok", f"tracking.kind={tracking.kind}{variable}: nothing is copied to W&B")
    login = _wandb_login(environment)
    how = {"offline": "copies stay on this machine", "online": "copies are sent"}[destination.mode]
    told = [f"tracking.mode={tracking.mode}{variable}: {how}", login or "not logged in"]
    if importlib.util.find_spec("wandb") is None:
        fact = f"package not installed; {', '.join(told)}"
        return Check("wandb", "warning", fact, "runs are not copied to W&B", "pip install wandb, or tracking=off")
    fact = f"{metadata.version('wandb')}; {', '.join(told)}"
    if destination.mode == "online" and login is None:
        return Check("wandb", "warning", fact, "runs are not copied to W&B", "wandb login, or tracking=offline")
    return Check("wandb", "ok", fact)


def disk_checks(root: Path, cache: Path) -> list[Check]:
    """Free space where the ledger and the cache are: one line where that is one disk."""
    places = {"root": _nearest_folder(root), "cache": _nearest_folder(cache)}
    if places["root"].stat().st_dev == places["cache"].stat().st_dev:
        places = {"root and cache": places["root"]}
    return [_disk_check(what, folder) for what, folder in places.items()]


def root_check(root: Path, cache: Path) -> Check:
    """Whether the ledger's folders can be made and written to, and a cache elsewhere; nothing is left behind."""
    with _without_traces(root / "runs", cache):
        Ledger(root).prepare()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    elsewhere = "" if cache.absolute().is_relative_to(root.absolute()) else f", and so can the cache {cache}"
    return Check("root", "ok", f"{root.absolute()} can be written to{elsewhere}")


def guarded(name: str, look: Callable[[], list[Check]], *, prevents: str, advice: str) -> list[Check]:
    """What `look` returns, or a check that says what kept it: an error, or no end to it."""
    try:
        return within(_OTHER_SECONDS, look)
    except LabError as error:
        fact = "; ".join(map(str, error.problems))
    except Exception as error:  # noqa: BLE001 - a check that fails is an answer
        fact = _reason(error, _OTHER_SECONDS)
    return [Check(name, "missing", fact, prevents, advice)]


def within(seconds: float, function: Callable[[], T]) -> T:
    """What `function` returns or raises; TimeoutError where it takes longer, and it is then left to itself."""
    outcome: list[T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            outcome.append(function())
        except Exception as error:  # noqa: BLE001 - raised again for the caller
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not outcome:
        raise TimeoutError
    return outcome[0]


def _head(address: str, seconds: float) -> None:
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "lora-lab"})
    with contextlib.closing(urllib.request.urlopen(request, timeout=seconds)):
        pass


def _reason(error: Exception, seconds: float) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return f"no answer within {seconds:g} s"
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    text = str(getattr(error, "reason", error)).strip() or type(error).__name__
    return without_user_info(" ".join(text.split()))[:200]


def _wandb_login(environment: Mapping[str, str]) -> str | None:
    """By what one is logged in: a variable, or an entry of the file where `wandb login` leaves it."""
    if environment.get("WANDB_API_KEY"):
        return "logged in by WANDB_API_KEY"
    host = urllib.parse.urlsplit(environment.get("WANDB_BASE_URL") or _WANDB).hostname
    given = environment.get("NETRC")
    files = [Path(given).expanduser()] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            hosts = netrc.netrc(file).hosts if file.is_file() else {}
        except (OSError, ValueError, netrc.NetrcParseError) as error:
            return f"{file} cannot be read ({type(error).__name__}), so login is not known"
        if host in hosts:
            return f"logged in by {file}"
    return None


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the deepest one above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _disk_check(what: str, folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    fact = f"{bytes_text(free)} free for {what} in {folder}"
    if free >= SMALL_STUDY_BYTES:
        return Check("disk", "ok", fact)
    return Check(
        "disk",
        "warning",
        fact,
        f"a study may end for want of space: first_look takes 0.62 GB, so {bytes_text(SMALL_STUDY_BYTES)} is asked for",
        f"make room there, or choose another disk: {'cache' if what == 'cache' else 'root'}=FOLDER",
    )


@contextlib.contextmanager
def _without_traces(*folders: Path) -> Iterator[None]:
    """Folders that were made within the block, and those above them, are gone afterwards unless others filled them."""
    made = [one.absolute() for folder in folders for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    finally:
        for folder in sorted(set(made), key=lambda one: len(one.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
