"""``fusewright export``: a run as files for other engines, with a certificate.

``write`` makes the files by the libraries that own the formats; ``certificate`` reads them back and
compares. The records of formats are in ``recipe/export_formats.py``, the rounding of weights in
``model/rounding.py``.
"""
