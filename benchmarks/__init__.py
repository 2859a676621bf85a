"""Speed beside the peers: what is measured (`cases`), how turns are taken (`contest`), the peers as they are used.

No part of the package: it may import all of it, and nothing there imports this. `python -m benchmarks --help` begins.
"""
