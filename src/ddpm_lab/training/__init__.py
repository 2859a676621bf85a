"""Training: the loop (Algorithm 1), and a run folder around it that resumes bit for bit on a CPU.

May import `core` to `pictures`.
Start with `loop.training_loop`, then `run.train`. `resume` refuses what may not continue.
"""
