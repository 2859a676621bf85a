"""Scores: images -> features -> statistics -> distances -> a record; the packaged classifiers.

May import `core` to `sampling`.
Start with `evaluate.evaluate`, then `metrics`.
"""
