"""Benchmarks of the losses against the field's own ways of computing them. See README.md in this folder."""
