"""The ops: one file each, one fixed order inside (see ``op.py``)."""
