"""Ratios against other libraries and lower bounds: `python -m benchmarks [--quick] [NAME ...]`. One file each."""
