"""The first square root on the CPU is taken here, of one number, before several threads take one together.

Of torch's first `torch.sqrt` in a process, where two threads share it, the half of one thread now and then comes out
with a relative error of 3e-4: in one process of five hundred, with PyTorch 2.13 and MKL. In a step of Adam that rank's
parameters would then differ from those of all others. After one root of one number it was none of 11,200.
"""

from __future__ import annotations

import torch

torch.sqrt(torch.ones(1, dtype=torch.float32, device="cpu"))
