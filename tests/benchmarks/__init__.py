"""Benchmarks: run by `make bench`, never by `make test`. Each compares things within one run."""
