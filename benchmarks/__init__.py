"""Runs whose figures are reported: each is a command, and its results lie under ``benchmarks/results/``."""
