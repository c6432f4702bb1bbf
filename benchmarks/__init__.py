"""Ratios against peers and floors: `python -m benchmarks [--quick] [NAME ...]`. One benchmark, one file."""
