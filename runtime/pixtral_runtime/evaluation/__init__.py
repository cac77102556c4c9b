"""Benchmarks of the paper on any bundle: what is asked, how answers are scored, and what two scores say of each other.

`tasks` turns datasets as published into examples, `metrics` and `official_metrics` score answers, `judge` lets another
model rate them, `score` says how sure a score is, `run` does all of it. Answers come from the batch runtime.
"""
