"""The kernels for GPUs, in Triton. Imported when a call first needs one: see gpu.py beside this folder."""
