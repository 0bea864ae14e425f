"""The door of the training phases: what each of them repeats around its loop.

`Run` has the flags, refuses a run that was made otherwise, goes on where a stopped one was, shows
the bar, writes the log, saves, ends on Ctrl-C with all saved, shares the work among processes, and
refuses a loss that is not finite. It is no trainer: forward, loss, backward, clip and step are the
phase's own.
"""

import math
import random
import time

from support.model.adapters import adapter_state, weights_of
from support.model.checkpoints import load_checkpoint, save_checkpoint
from support.running import errors, files, processes
from support.running.flags import command, flags

import torch
from tqdm import tqdm

# What the bar shows of the rows of a log
SHOWN = ("loss", "reward", "val_reward", "accuracy", "kl")


class Run:
    """One phase of a run.

    args: its flags. data: the folder of the samples. name: of its adapter, log and checkpoint under
    --out. update: how many updates are done. epoch: the one at hand, from 1. best: the reward and
    the update of the best validation so far. rows: of the log, those before a stop too.
    """

    # As they are, so that a phase needs this door alone
    gather = staticmethod(processes.gather)
    sum_gradients = staticmethod(processes.sum_gradients)
    at_work = staticmethod(errors.working_on)

    def __init__(self, phase, doc, **own_flags):
        self.args = flags(phase, doc, **own_flags)
        if self.args.grad_accum % processes.WORLD:  # N processes are to train as one does
            given = f"--grad-accum is {self.args.grad_accum}, not a multiple of"
            errors.stop(f"{given} the {processes.WORLD} processes; give one, or start fewer")
        torch.manual_seed(self.args.seed)  # of new adapters
        self.start = time.time()
        self.data = self.args.out / "data"
        self.name = phase.rpartition(".")[2]
        self.size = self.args.batch_size * self.args.grad_accum  # of an update of `epochs`
        self.update, self.epoch, self.best = 0, 1, (-1.0, 0)
        self.began, self.validation = self.start, 0.0  # of the update at hand; seconds of the last
        self.shown, self.warned, self.inputs = {}, set(), []

    @property
    def adapter(self):
        """The folder of the result."""
        return self.args.out / self.name

    @property
    def checkpoint(self):
        return self.args.out / f"{self.name}.checkpoint"

    def agrees(self, before, *names):
        """Ends the program where a phase before was made with other values of these flags."""
        files.agrees(self.args, before, *names)

    def starts_from(self, before, script, *names):
        """The folder of the adapter that a phase before made, with the same values of these flags.
        Ends the program where it did not, or is missing: script makes it."""
        self.inputs += weights_of(self.args, before, script, *names)
        return self.args.out / before

    def reads(self, *inputs, ignore=()):
        """Ends the program where the phase is finished, or was begun with other values or other
        input files. ignore: flags that do not change what it makes."""
        # Before its configuration: killed between the two, no run goes on from other weights
        state = load_checkpoint(self.checkpoint, self.args.restart)
        files.begin(self.args, self.name, *self.inputs, *inputs, ignore=ignore)
        if state and state["finished"]:
            if not (self.adapter / "adapter_model.safetensors").exists():
                errors.stop(f"{self.adapter} was finished and is gone; --restart makes it again")
            print(f"{self.adapter} is finished; --restart begins again")
            raise SystemExit

    # The loop -------------------------------------------------------------------------------------
    def updates(self, count, vlm, optimizer):
        """Yields the numbers of the updates that are left, from 0.

        Gives the active adapter, the optimizer and the log what they were at the last checkpoint.
        Saves after every --save-every updates, and on Ctrl-C, which then ends the program.
        """
        self.vlm, self.optimizer, self.count = vlm, optimizer, count
        state = load_checkpoint(self.checkpoint, model=vlm.model, optimizer=optimizer)
        if state:
            self.update, self.best = state["update"], state["best"]
            print(f"going on after update {self.update}")
        log = self.args.out / f"log/{self.name}.jsonl"
        self.lines = files.Log(log, state["logged"] if state else ())
        self.rows = self.lines.rows
        processes.catch_interrupts()
        bar = dict(total=count, initial=self.update, desc=self.name, unit="update")
        with tqdm(**bar, disable=processes.RANK > 0) as self.bar:
            first = self.update
            for update in range(first, count):
                self.began = time.time()
                yield update
                if update == first:
                    left, took = count - first, time.time() - self.began - self.validation
                    validations = left // getattr(self.args, "val_every", left) + 1
                    total = took * left + self.validation * validations
                    processes.say_hours(self.name, total)
                self.update = update + 1
                self.bar.update()
                if self.update % self.args.save_every == 0 or processes.interrupted():
                    self.save(finished=False)
                    processes.leave_if_interrupted()

    def epochs(self, rows, vlm, optimizer):
        """Yields the batch of each update that is left: --batch-size times --grad-accum rows, fewer
        at the end of an epoch. Each epoch goes through all rows in an order of its own."""
        size = self.size  # whatever `memory` made of --batch-size
        in_epoch = math.ceil(len(rows) / size)
        print(f"{len(rows)} rows, {in_epoch * self.args.epochs} updates of {size}")
        for update in self.updates(in_epoch * self.args.epochs, vlm, optimizer):
            epoch, number = divmod(update, in_epoch)
            self.epoch = epoch + 1
            yield shuffled(rows, self.args.seed, epoch)[number * size : (number + 1) * size]

    def stream(self, rows, size):
        """The rows of the update at hand, where each takes `size` and epochs follow each other
        without a gap."""
        found = []
        for i in range(self.update * size, (self.update + 1) * size):
            epoch, number = divmod(i, len(rows))
            found.append(shuffled(rows, self.args.seed, epoch)[number])
        return found

    def share(self, rows):
        """This process's part of a batch, which a message on memory would name."""
        mine = processes.share(rows)
        self.at_work(mine)
        return mine

    def total(self, number):
        """The sum of a number over the processes."""
        return sum(self.gather([number]))

    def check(self, loss, norm, rows):
        """Ends the program before a step that would spoil the weights. rows: of the batch."""
        if not math.isfinite(loss + norm):
            ids = [row["id"] for row in rows]
            found = f"update {self.update + 1}: loss {loss}, gradient norm {norm}; samples {ids}"
            errors.stop(f"{found}; lower --lr, with --restart")

    def set_rate(self, optimizer):
        """The learning rate of the update at hand: linear warm-up over the first share --warmup of
        the updates, then a cosine to zero, as both papers have it (IVT, Section 4.1)."""
        warm = max(1, round(self.args.warmup * self.count))
        rate = self.args.lr * (self.update + 1) / warm
        if self.update >= warm:
            part = (self.update - warm) / max(1, self.count - warm)
            rate = self.args.lr * 0.5 * (1 + math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def log(self, update=None, **row):
        """A line of the log, by default of the update at hand, counted from 1; some of it on the
        bar."""
        if update is not None:  # a validation, before the update at hand
            self.validation = time.time() - self.began
        self.lines.write(update=self.update + 1 if update is None else update, **row)
        self.shown |= {key: value for key, value in row.items() if key in SHOWN}
        self.bar.set_postfix(self.shown, refresh=False)

    # The end --------------------------------------------------------------------------------------
    def save(self, finished):
        """All state of the run in one file, its log too. What is drawn at random depends on the
        seed and the number of the update or prompt alone: there is no random state to keep."""
        save_checkpoint(
            self.checkpoint,
            adapter=adapter_state(self.vlm.model, self.vlm.model.active_adapter),
            optimizer=self.optimizer.state_dict(),
            update=self.update,
            best=self.best,
            logged=self.rows,
            finished=finished,
        )

    def finish(self, then):
        """To be called when the adapter is saved: nothing is left to do but `then`, a script."""
        self.save(finished=True)
        result = ", ".join(f"{key} {value:.3f}" for key, value in self.shown.items())
        if self.best[0] >= 0:
            result = "best validation reward {:.3f}, of update {}".format(*self.best)
        minutes = processes.minutes(self.start)
        print(f"{result}; adapter in {self.adapter}, {minutes}; next: {command(self.args, then)}")


def shuffled(rows, seed, epoch):
    """The rows in the order of an epoch, which depends on the seed and the epoch alone: a run that
    was resumed sees what an unbroken one would have seen."""
    return random.Random(f"{seed} {epoch}").sample(rows, len(rows))
