"""Stages: columns to columns, before the gradient. Plain callables; Ray is added by `orchestrator/pipeline.py`."""
