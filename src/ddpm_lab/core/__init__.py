"""The base of all other folders: settings, errors, files, logs, processes, progress, device, seeds.

May import nothing else of this package.
Start with `config` (the settings of a run), then `settings` (how they are checked).
"""
