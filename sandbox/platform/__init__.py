"""A small PC for bare-metal kernels: one file per device, put together in ``pc.py``."""
