"""The other ranks of tensor parallelism: each holds a ModelRunner and does what rank 0 tells it.

`python -m nanovllm.engine.workers RANK SIZE PORT` is what rank 0 starts (see nanovllm.engine.team).
"""

import gc
import json
import logging
import os
import select
import sys
import traceback
from contextlib import suppress
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import NoReturn

import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.messages import CHECK_WEIGHTS, END, STEP, unpack_path, unpack_step
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.team import START_S, Seat
from nanovllm.utils.parallel import HostGroup


def main() -> NoReturn:
    rank, size, port = map(int, sys.argv[1:])
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logging.getLogger("nanovllm").setLevel(logging.ERROR)  # rank 0 has said it
    timeout = timedelta(seconds=START_S)
    store = dist.TCPStore("127.0.0.1", port, None, False, timeout=timeout, wait_for_workers=False)
    serve(Seat(store, rank, size, is_local=True))


def _end_with(parent: int) -> None:
    """End this process when its parent ends, by whatever, or closes our standard input."""
    while os.getppid() == parent:
        if select.select([0], [], [], 0.5)[0] and not os.read(0, 1):
            break
    os._exit(0)


def serve(seat: Seat) -> NoReturn:
    """Take part in rank 0's engine, and end the process with it."""
    status = 1
    try:
        options = json.loads(seat.store.get("options"))
        options["device"] = seat.device(options["device"])
        config = Config.from_options(options.pop("model"), options)
        seat.store.set(f"ready/{seat.rank}", "")
        group = seat.connect(options["device"])
        runner = ModelRunner(config, group)
        gc.freeze()  # a full collection, for which all ranks wait, need not look at all of this
        _follow(runner, group)
        status = 0
    except Exception as error:
        text = str(error) if isinstance(error, (ValueError, TypeError)) else traceback.format_exc()
        with suppress(RuntimeError):  # rank 0 is gone
            seat.store.set(f"error/{seat.rank}", json.dumps([type(error).__name__, text]))
    sys.exit(status)


def _follow(runner: ModelRunner, group: HostGroup) -> None:
    """Do what rank 0 tells, until it says that it ends, or has ended."""
    while True:
        try:
            kind, message = group.hear()
        except RuntimeError:
            return
        if kind == STEP:
            runner.launch(unpack_step(message))
        elif kind == END:
            runner.free()
            return
        else:
            work = runner.check_weights if kind == CHECK_WEIGHTS else runner.load_weights
            group.first_error(partial(work, unpack_path(message)))


if __name__ == "__main__":
    main()
