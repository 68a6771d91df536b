"""Measurements of kvrelay: each module prints a table and keeps its figures in benchmarks/results."""
