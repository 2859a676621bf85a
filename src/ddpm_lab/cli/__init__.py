"""The command line `ddpm`: typed arguments, help, exit codes. No mathematics.

May import everything.
Start with `commands`.
"""
