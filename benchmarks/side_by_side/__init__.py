"""The sides of ``methods.py``, and the world that all of them train in."""

from ctpd_nemo.pipeline import quiet

# In every process of the benchmark, before the libraries that speak while they are imported.
quiet.before_imports()
