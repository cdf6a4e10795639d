"""Measurements of the operators against their peers; run benchmarks/bench.py."""
