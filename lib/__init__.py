"""What the chapters lean on, one subject a file. A command imports this package before torch, which reads what is set
here when it is loaded."""
import os

# OpenMP's threads spin while they wait for each other. By default they do for milliseconds, and where another program
# has their core a step takes nine times as long. So many turns bridge the gap between two kernels, and no more.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Packed batches differ in crops: blocks of memory that can grow leave fewer gaps on a card.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# The products of cuBLAS repeat bit for bit only with a workspace of a fixed size (pretrain.py --deterministic).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
