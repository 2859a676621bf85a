"""Scores: images -> features -> statistics -> distances -> a record; and the packaged classifiers.

May import `core`, `data`, `diffusion`, `models` and `sampling`.
Start with `evaluate.evaluate`; `metrics` has the formulas, `record` what a score record holds.
"""
