"""One file an operation: a torch reference, a Triton kernel (CUDA) and one dispatching function.

The modules import anywhere: Triton is imported only when a CUDA tensor arrives (``triton_*.py``).
"""
