"""``fusewright export``: a run as files for other engines, with a certificate.

``options`` checks words, paths and programs; ``command`` is the way through; ``compressed``,
``gguf_file`` and ``ollama`` write by the libraries that own the formats; ``certificate`` reads back
and compares, with ``scores`` of what models compute. Formats are in ``recipe/export_formats.py``,
the rounding of weights in ``model/rounding.py``.
"""
