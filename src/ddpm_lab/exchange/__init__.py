"""Exchange with other libraries: import and export of generators, and the model card of exported weights.

May import `core` to `studies`.
Start with `import_export.export_generator`.
"""
