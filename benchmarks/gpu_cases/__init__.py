"""The cases of ``gpu_step.py``: one model in one precision on one device, each in a process of its own."""

from ctpd_nemo.pipeline import quiet

# In every process of the benchmark, before the libraries that speak while they are imported.
quiet.before_imports()
