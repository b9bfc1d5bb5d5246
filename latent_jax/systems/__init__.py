"""The four systems; each offers `train.protocol.System` in its ``system.py``."""
