"""..."""
import ctypes
import sys
import torch



def prepare_cpu():
    """Two settings that halve the time of an image on a CPU and change no result beyond rounding. For the whole process.

    Large tensors keep their pages between uses: glibc would hand them to the system after each and have them zeroed again.
    float32 products go through oneDNN, twice MKL's speed on AMD: PyTorch takes that way when bfloat16 sums are allowed,
    which only AMX units make use of, so machines with AMX are left alone."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)         # M_MMAP_MAX: nothing is mapped on its own
        libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: nothing is given back
    if hasattr(torch.backends.mkldnn, "matmul") and not torch.cpu._is_amx_tile_supported():     # since PyTorch 2.9
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
