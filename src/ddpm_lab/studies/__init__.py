"""Studies: a grid of runs, its cells shared among workers, results with intervals, reports as HTML.

May import `core` to `training`.
Start with `study.run_study`.
"""
