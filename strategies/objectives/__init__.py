"""Objectives: pure sums over weighted tokens. One family per file."""
