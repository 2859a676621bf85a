"""Studies: a grid of runs whose cells several workers share, results with intervals, and reports as HTML.

May import `core` to `training`.
Start with `study.run_study`.
"""
