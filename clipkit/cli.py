"""The `clipkit` command line. Torch is not imported before a command runs, so that --help is fast."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click
from click.exceptions import Abort

from clipkit._version import __version__
from clipkit.commands import drawing, evaluation, measuring, models, packs, pictures, serving, training
from clipkit.errors import ClipkitError, UsageError
from clipkit.registry import TASKS, task_entry


class _Commands(click.Group):
    """clipkit's commands, and one for each trainable task that another package registers.

    Packages are only looked through for the list of all commands, and for a name that is none of clipkit's.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names. A line on stderr names the tasks of other packages whose command would be one of clipkit's."""
        from clipkit.log import remark

        tasks = self._foreign_tasks()
        for command in sorted(tasks.keys() & self.commands.keys()):
            entry = TASKS.entry(tasks[command])
            remark(f"clipkit: task {tasks[command]!r} ({entry.help}) has no command: clipkit has one of that name")
        return sorted({*self.commands, *tasks})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, if any."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        kind = self._foreign_tasks().get(cmd_name)
        return None if kind is None else training.training_command(kind)

    def _foreign_tasks(self) -> dict[str, str]:
        """Command -> kind of the tasks that other packages register."""
        return {task_entry(kind).command: kind for kind in TASKS if kind not in TASKS.own}

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; when it is interrupted, say whether the same command resumes."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            command = self.commands.get(ctx.invoked_subcommand or "")
            trains = command is None  # a task of another package
            raise Abort("; the same command resumes" if trains or command in RESUMED else "") from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="clipkit")
def cli() -> None:
    """Train CLIP on image-text shards, use it zero-shot, and draw with it.

    \b
    Start with:
      clipkit guided-sample "a rocket"                with the small model of the package
      clipkit classify photo.jpg --labels "dog,cat"
      clipkit app                                     both, in the browser
      clipkit demo                                    the whole chain on drawings, some minutes
      clipkit pack photos/ packs/photos               your own images
      clipkit pretrain drawings_clip.toml
      clipkit zeroshot --model runs/clip --dataset cifar100
    """


TRAINING = tuple(map(training.training_command, TASKS.own))

for command in (
    *(packs.pack, packs.verify, packs.inspect),
    *TRAINING,
    *(training.recipe, training.plan, training.demo),
    *(models.models, models.export, models.average, models.release),
    *(evaluation.zeroshot, evaluation.retrieval, evaluation.probe),
    *(pictures.similarity, pictures.classify, pictures.index, pictures.embed, pictures.search),
    *(drawing.guided_sample, drawing.noise_curve, measuring.metrics, measuring.atoms, serving.app),
):
    cli.add_command(command)

RESUMED = (*TRAINING, packs.pack, pictures.index, pictures.embed, training.demo)
"""Commands that resume when they are run again."""


TURN = 5.0
"""Seconds that other ranks wait for rank 0 to print an error that all have."""


def _complain(message: str, every_rank: bool) -> None:
    """Print one line on stderr. Errors in the arguments are the same on all ranks; others may happen on one of them.

    torchrun ends all ranks as soon as one has failed: if the others were faster than rank 0, no line would be printed.
    A rank that still runs after the wait is the only one with this error.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not every_rank:
        with suppress(KeyboardInterrupt):  # Ctrl-C ends the wait, not the message
            time.sleep(TURN)
    click.echo(f"clipkit: {message}" + (f" [rank {rank}]" if rank != "0" else ""), err=True)


def _os_reason(error: OSError) -> str:
    """A file that cannot be read or written, in one line."""
    paths = [
        os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
        for name in (error.filename, error.filename2)
        if name is not None
    ]
    return ": ".join(filter(None, (" -> ".join(paths), error.strerror or str(error))))


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a disk, or of stdout on one, that have no file name."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command; errors become one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal's encoding cannot show is escaped; it must not end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="clipkit", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        _complain(f"{' '.join(error.format_message().split())} (see --help)", every_rank=False)
        sys.exit(error.exit_code)
    except ClipkitError as error:
        _complain(str(error), every_rank=not isinstance(error, UsageError))
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `clipkit models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        _complain(_os_reason(error), every_rank=False)
        sys.exit(1)
    except (KeyboardInterrupt, Abort) as interruption:
        click.echo(f"{chr(10) * sys.stderr.isatty()}clipkit: interrupted{interruption}", err=True)  # below the ^C
        sys.exit(130)
    sys.exit(0)
