"""What all the rest stands on: settings and their check, errors, files, logs, processes, progress, device, seeds.

May import nothing of this package but itself.
Start with `settings` (how a setting is checked), then `config` (which settings there are).
"""
