"""Functions whose first call in a process must not be made by several threads at once.

Importing this module makes each of those calls, on one thread: Python's import lock keeps other importers out
until the module is complete. Every module that starts threads which compute imports it first.

torch's wheels link oneMKL 2024.2. Its vector math finds out which processor it runs on in the first call of
any of its functions. `mkl_vml_serv_cpu_detect` stores the raw number of the processor in a global and then,
in a second store and without a lock, the number of the kernel table. A thread that calls such a function
between the two stores reads the raw number, and on processors with AVX-512 that selects kernels of 12 bits of
precision: scores are off by up to 4e-4, in that batch alone. See
https://github.com/pytorch/pytorch/issues/188792. Of the operators in the forward pass `torch.tanh`, in the
classification head, is the one that goes through oneMKL's vector math, in every dtype, since the head is
float32.
"""

from __future__ import annotations

import torch

torch.tanh(torch.zeros(1, dtype=torch.float32))
