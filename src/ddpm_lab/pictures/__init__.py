"""What is drawn: grids, films, the forward process, reverse trajectories, curves.

May import `core` to `evaluation`.
Start with `forward` and `reverse`.
"""
