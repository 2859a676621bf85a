"""In and out: importing and exporting generators, and the card that goes with exported weights.

May import `core` to `studies`.
Start with `generators.export_generator`.
"""
