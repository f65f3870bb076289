"""Calls functions whose first call in a process must not run on several threads at once.

Importing this module makes each of those first calls on one thread. Python's import lock makes other
importers wait until it is done. Every module that starts threads that run a forward pass must import this
module first.

The function at fault is in oneMKL 2024.2, which torch's wheels link. The first call of any of its vector math
functions detects the processor: `mkl_vml_serv_cpu_detect` first stores the raw processor number in a global
variable, then replaces it by the number of the kernel table, without a lock. A thread that calls such a
function between the two stores reads the raw number. On processors with AVX-512, that number selects kernels
with only 12 bits of precision, and the scores of that batch are off by up to 4e-4. See
https://github.com/pytorch/pytorch/issues/188792.

In the forward pass, only `torch.tanh` in the classification head uses oneMKL's vector math. The head is
float32 in every precision, so every precision is affected.
"""

from __future__ import annotations

import torch

torch.tanh(torch.zeros(1, dtype=torch.float32))
