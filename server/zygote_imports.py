"""What the zygote imports: what an engine and a worker on a CPU import before they load.

Only multiprocessing's fork server imports this, in the process that engine and worker are forked
from (`server.zygote`).
"""

import gc
import os
import signal

from server import zygote
from server.launch import die_with_parent

die_with_parent(signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends when nobody needs it any more
zygote.environment = dict(os.environ)

import vllm.v1.engine.core  # noqa: E402
import vllm.v1.executor.multiproc_executor  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
from vllm.utils.system_utils import set_process_title  # noqa: E402

import server.worker.extension  # noqa: E402
import server.worker.processor  # noqa: E402, F401

set_process_title("Zygote")  # which also finds where a title goes, before variables change
gc.freeze()  # what is shared with the forked stays shared
