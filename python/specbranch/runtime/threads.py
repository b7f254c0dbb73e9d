"""torch's intra-op threads of the calling thread."""

from __future__ import annotations

import torch

# torch.set_num_threads itself: vLLM's CPU worker puts another function in its place, which warns and does nothing.
set_threads = torch._C.set_num_threads
