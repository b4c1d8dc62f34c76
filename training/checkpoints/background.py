"""Folders that a run writes beside its training: whole or not there, checksummed, on a thread of rank 0."""

import collections
import contextlib
import math
import threading

import paddle

from models.parallel import whole_shape
from runtime.collective import run_on_rank_0
from runtime.files import FolderWriter
from runtime.machine import available_memory
from runtime.process import SAVING_THREAD, is_refusal, one_line, say
from weights.files import save_pdparams, save_safetensors
from weights.output import is_safetensors
from weights.runs import STATE


def write_folder(folder, files, prepare=None):
    """Writes the files of an iterator as a folder, whole or not at all, on rank 0; the others only help to gather them.

    Args:
        files: yields `(name, value)`, a JSON value for a name that ends so, else arrays by name; they are written as
            safetensors or like a `.pdparams`, and not at all if there are none.
        prepare: `prepare(name, value)`, called on rank 0, returns what is written in a value's place.

    Raises:
        OSError: the file system refused; on rank 0, when all files were gathered. What had the folder's name stays.
    """
    with contextlib.ExitStack() as at_the_end:
        # The other ranks gather all files, whatever rank 0 has met.
        at_the_end.callback(collections.deque, files, maxlen=0)
        if paddle.distributed.get_rank() == 0:
            writer = FolderWriter(folder)
            at_the_end.callback(writer.discard)  # before that; what is finished stays
            for name, value in files:
                value = value if prepare is None else prepare(name, value)
                if name.endswith(".json"):
                    writer.write_json(name, value, indent=None if name == STATE else 2)
                elif value:
                    with writer.open(name) as file:
                        (save_safetensors if is_safetensors(name) else save_pdparams)(value, file)
                del value  # at 7B parameters the host has each part once, not all together
            writer.finish()


class FolderSaver:
    """Saves folders of a run beside its training, one at a time; a subclass says what is in them.

    Training waits for the copy out of the device alone; a thread of rank 0 writes, checksums and flushes. A file system
    that refuses is reported, and training goes on.

    Args:
        session: whose parts are saved.
        say: prints a line, on rank 0; it is called from the thread too.
        background: False: training waits until the folder is on the disk. So it does where the copies would take more
            than half of the memory that is free.
        after: another `FolderSaver`; what it writes at the same time is finished first.
    """

    what = refused = ""  # "checkpoints"; what follows from a refusal, in words

    def __init__(self, session, *, say=say, background=True, after=None):
        self.session, self.say, self.background, self.after = session, say, background, after
        self._thread = self._failure = None

    def files(self):
        """Yields `(name, value)` for `write_folder`; a collective.

        The arrays, missing on other ranks than 0, are copies: training may go on while they are written.
        """
        raise NotImplementedError

    def copies(self):
        """Returns how many float32 copies of the network the host holds while they are written."""
        raise NotImplementedError

    def prepare(self, name, value):
        """Returns what is written in a value's place, on rank 0, perhaps on the thread."""
        return value

    def written(self, folder):
        """Does what follows once a folder is written, on rank 0, perhaps on the thread."""

    def save(self, folder):
        """Saves the session as `folder`; a collective."""
        self.wait()
        files = self.files()
        if not self._in_background():
            self._write(folder, files)
            return
        gathered = list(files)
        if paddle.distributed.get_rank() == 0:
            # What was written is taken out of the list, so that its memory is free.
            files = (gathered.pop(0) for _ in range(len(gathered)))
            thread = threading.Thread(target=self._write, args=(folder, files), name=SAVING_THREAD)
            thread.start()
            self._thread = thread  # only now: another saver's thread may join it, which takes one that runs

    def finish(self):
        """Waits for the save under way; a collective. Raises its error, on every rank, if the last save failed."""
        self.wait()
        run_on_rank_0(lambda: self._failure)

    def wait(self):
        """Waits for the save under way, on rank 0; nothing is under way on the others."""
        if self._thread is not None:
            self._thread.join()

    def _in_background(self):
        if self.background and paddle.distributed.get_rank() == 0:
            numel = sum(math.prod(whole_shape(parameter)) for parameter in self.session.model.parameters())
            size, memory = 4 * self.copies() * numel, available_memory()
            if memory is not None and size > 0.5 * memory:
                self.background = False
                self.say(
                    f"note: {self.what} take {size / 2**30:.1f} GiB and {memory / 2**30:.1f} GiB of memory are free: "
                    "training waits while they are written"
                )
        return self.background

    def _write(self, folder, files):
        try:
            if self.after is not None:
                self.after.wait()
            write_folder(folder, files, self.prepare)
        except Exception as error:
            self._failure = error  # of the thread, it would be lost
            if not is_refusal(error):
                raise
            self.say(f"warning: {folder} is not saved: {one_line(error)}; {self.refused}")
        else:
            self._failure = None
            if paddle.distributed.get_rank() == 0:  # the others come here too, early, where training waits for it
                self.written(folder)
                self.say(f"saved {folder}")
