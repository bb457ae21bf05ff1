"""All that needs a GPU, in minutes: ``python benchmarks/gpu`` (see ``run.py``)."""
