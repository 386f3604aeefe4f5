"""More threads for the virtual devices.

A collective holds its thread until every device has joined.  XLA keeps one thread for each virtual device, so that a
program with several independent collectives under way can run out of them and is aborted after 40 seconds; with the
"dots" rematerialisation and micro-batches on a mixed mesh that happened in one step of a hundred.
"""

import os

os.environ.setdefault("NPROC", "32")  # read when the devices are made, at the first use of jax
