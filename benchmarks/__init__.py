"""Scripts that measure editeval itself; run them from the repository: `python benchmarks/edit_speed.py`."""
