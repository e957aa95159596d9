"""Hydra's door to the lab: a sweeper that expands without composing, a launcher that gets the whole sweep at once.

Hydra accepts plug-ins only from the `hydra_plugins` namespace (no `__init__.py` here). All work is done in
`lora_lab.app`.
Hydra loads this file without entering it in `sys.modules`, so annotations here must not be postponed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Dict, Optional  # noqa: UP035

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class LabLauncherConf:
    """Registers `hydra/launcher=lora_lab`."""

    _target_: str = "hydra_plugins.lora_lab_launcher.LabLauncher"


@dataclass
class LabSweeperConf:
    """Registers `hydra/sweeper=lora_lab`."""

    _target_: str = "hydra_plugins.lora_lab_launcher.LabSweeper"
    params: Optional[Dict[str, str]] = None  # noqa: UP006, UP045 - OmegaConf reads this annotation


ConfigStore.instance().store(group="hydra/launcher", name="lora_lab", node=LabLauncherConf, provider="lora_lab")
ConfigStore.instance().store(group="hydra/sweeper", name="lora_lab", node=LabSweeperConf, provider="lora_lab")


class LabLauncher(Launcher):
    """Hands all points of a sweep to the lab, which checks, plans and runs them together."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.hydra_context = hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lora_lab.app.session import active_session

        active_session().handle_sweep(self.hydra_context.config_loader, self.config, job_overrides)
        return []


class LabSweeper(Sweeper):
    """The product of all swept values, as Hydra's basic sweeper has it.

    Differs from it in two things: points are not composed one by one to validate them (0.14 s each); with the launcher
    of the lab they are validated together, all errors at once. And an axis of the command line replaces one of the same
    key in `hydra.sweeper.params`.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.max_runs = config.max_runs
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lora_lab.app.overrides import expand

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides(arguments)
        keys = {override.key_or_group for override in given}
        swept = parser.parse_overrides([f"{key}={value}" for key, value in self.params.items() if key not in keys])
        points = expand([*swept, *given], max_runs=self.max_runs)
        returns = self.launcher.launch(points, initial_job_idx=0)
        for one in returns:
            _ = one.return_value  # raises what the job raised
        return returns
