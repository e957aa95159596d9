"""The command line: `lora-lab COMMAND ...`.

`run` and `plan` are Hydra applications (any Hydra flag works); the others read the ledger or prepare the machine. Exit
codes: 0 done, 2 bad input, 3 some runs failed, 4 machine (device, disk, network), 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from lora_lab import __version__
from lora_lab.errors import LabError, MachineError, nearest

# Command -> module with `main(arguments) -> exit code`, imported on demand, so that `plan` stays torch-free; and help.
COMMANDS = {
    "run": ("lora_lab.app.hydra_commands", "train and score one trial, a sweep (-m), or a study (-m study=NAME)"),
    "reproduce": ("lora_lab.app.reproduce_command", "a study of published claims: run what is missing, judge, draw"),
    "plan": (
        "lora_lab.app.hydra_commands",
        "what `run` would do: trials, duplicates, parameters, steps; --memory: what each takes, and whether it fits",
    ),
    "runs": ("lora_lab.app.ledger_commands", "list the ledger, or export a slice of it (--format csv|parquet|json)"),
    "report": ("lora_lab.app.report_command", "the page of a study, or of the whole ledger: one HTML file"),
    "compare": ("lora_lab.app.ledger_commands", "two runs: difference of configuration, paired difference of scores"),
    "merge": (
        "lora_lab.app.merge_command",
        "adapters into the base, or several into one (linear, cat, svd, ties, dare)",
    ),
    "generate": ("lora_lab.app.model_commands", "what a run's model answers to a prompt"),
    "eval": (
        "lora_lab.app.eval_command",
        "lm-eval's own command and flags, with the model lora_lab, outside the ledger",
    ),
    "wandb": ("lora_lab.app.wandb_commands", "copy runs to W&B again (push), or make a study's workspace there"),
    "fetch": (
        "lora_lab.app.fetch_command",
        "models, data sets and tasks into the cache, for a machine without a network",
    ),
    "doctor": ("lora_lab.app.doctor", "what this machine has and lacks; whether a study can run without a network"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors of the lab are printed without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Tokenizers' threads and a fork do not mix, and hubs get no pings from a lab.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return _dispatch(arguments)
    except LabError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - a reader such as `head` has left; nothing to say
        return 0
    except OSError as error:  # the machine's last word: what was written is whole or not there
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return MachineError.exit_code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"lora-lab {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f'error: unknown command "{arguments[0]}"{nearest(arguments[0], list(COMMANDS))}', file=sys.stderr)
        return 2
    module, _ = COMMANDS[arguments[0]]
    command: int = importlib.import_module(module).main(arguments)
    return command


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: lora-lab COMMAND [...]\n\n" + "\n".join(lines) + "\n\nlora-lab COMMAND --help says more."


if __name__ == "__main__":
    sys.exit(main())
