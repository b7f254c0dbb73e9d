"""What a layer frees is kept for the next one."""

import ctypes
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes
import torch
from specbranch.runtime.model import keep_freed_memory

class Heap(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap

def has_pages_of_its_own(size):
    before = heap().hblks
    activations = torch.empty(size, dtype=torch.uint8)
    return heap().hblks > before

print(has_pages_of_its_own(30 << 20))
keep_freed_memory()
print([has_pages_of_its_own(size) for size in (1 << 20, 5 << 20, 30 << 20)])
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"
)
def test_activations_come_from_memory_that_was_freed() -> None:
    """In a process of its own: what was freed before decides too."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True", "[False, False, False]"]
