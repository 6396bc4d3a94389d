"""TensorBoard and Weights & Biases, for those who ask: the rows of log.jsonl, as they are written.

    python train.py --env hopper --tensorboard      # then: tensorboard --logdir runs
    python train.py --env hopper --wandb            # WANDB_PROJECT, WANDB_MODE=offline as usual

Neither is needed: log.jsonl has every number. TensorBoard's files are in the run's folder.
"""

import os
import secrets
import sys
from contextlib import suppress

from files import write_atomically
from plumbing import UserError, check_package, first_line

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # flag -> what pip calls it
WANDB_SECONDS = 10  # how long W&B may take to answer before the run begins


def check_trackers(settings):
    """Raises UserError for a tracker that is asked for but not installed."""
    for flag, package in PACKAGES.items():
        if settings.get(flag):
            check_package(package, f"--{flag}")


class Trackers:
    """Copies of the log's rows for those that settings ask for; `add` a row, `close` at the end.

    folder: the run's; config: of its config.json; step: the last one of a run that goes on, None
    for a new one. Raises UserError if W&B cannot be reached or does not know the user.
    """

    def __init__(self, settings, folder, config, step=None):
        self.writer = self.run = None
        if settings.get("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            # rows that a kill left behind, and that come again, are hidden
            self.writer = SummaryWriter(folder, purge_step=None if step is None else step + 1)
        if settings.get("wandb"):
            self.run = begin_wandb(folder, config)

    def add(self, row):
        """A row as run_folder.append_to_log takes it.

        A tracker that fails is left out from then on. That is said, and ends no training:
        log.jsonl has every number.
        """
        numbers = scalars(row)
        try:
            if self.writer is not None:
                for name, value in numbers.items():
                    self.writer.add_scalar(name, value, row["step"])
                self.writer.flush()
            if self.run is not None:
                self.run.log(numbers | {"step": row["step"]})
        except Exception as error:  # of the disk, the network, and the packages' own
            print(f"\ntracking ends at step {row['step']}: {first_line(error)}", file=sys.stderr)
            self.writer = self.run = None

    def close(self):
        with suppress(OSError):  # of a full disk
            if self.writer is not None:
                self.writer.close()
        if self.run is not None:
            self.run.finish()


def begin_wandb(folder, config):
    """W&B's run of a folder: the same one again where a run goes on."""
    import wandb

    known = folder / "wandb-id.txt"
    name = known.read_text().strip() if known.is_file() else secrets.token_hex(4)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lamo"),
            id=name,
            name=folder.name,
            resume="allow",
            dir=folder,
            config=config,
            settings=wandb.Settings(init_timeout=WANDB_SECONDS, silent=True),
        )
    except Exception as error:  # of its own kinds, and the network's
        how = "wandb login, or WANDB_MODE=offline, or leave --wandb out"
        raise UserError(f"W&B cannot begin ({first_line(error)}); {how}") from error
    write_atomically(known, lambda file: file.write(f"{name}\n".encode()))
    run.define_metric("*", step_metric="step")
    return run


def scalars(row):
    """{name: number} of a row: losses as train/..., evaluations as evaluation score/target N, .."""
    if "evaluation" not in row:
        kept = {k: v for k, v in row.items() if k not in ("step", "seconds") and v is not None}
        return {f"train/{name}": value for name, value in kept.items()}
    numbers = {}
    for result in row["evaluation"]:
        target = "policy" if result["target"] is None else f"target {result['target']:g}"
        for name in ("return_mean", "return_std", "score", "length_mean"):
            numbers[f"evaluation {name}/{target}"] = result[name]
    return numbers
