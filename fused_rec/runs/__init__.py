"""Run folders: locks, atomic writes, loggers, model cards."""
