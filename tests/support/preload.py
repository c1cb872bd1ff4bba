"""What every rank of a test has imported before it starts: a server imports it once, and ranks are forked from it.

The run-time shape checks are installed first, as pytest's plug-in does where the tests run: so they reach the ranks.
Nothing here may start a thread, which no fork would have.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from jaxtyping import install_import_hook

install_import_hook(["distill", "students", "teacher"], "tests.typecheck.checked_tensors")

import deepspeed  # noqa: E402, F401
import nvidia.dali  # noqa: E402, F401
import torch  # noqa: E402

import distill.job.run  # noqa: E402, F401

torch.set_num_threads(1)
